"""Whether layers of a model can be replaced at all: each is tried with an exact stand-in before anything is fitted.

A replacement is another module with the same function, so the model's outputs must stay what they are. They do not
where a closure, a hook or a plain list still holds the old module, where a forward asks `isinstance(layer, nn.Linear)`,
or where it reads the weight's values. Such layers stay dense, with that reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankopt.core.errors import TaskError
from rankopt.core.records import Layer
from rankopt.model.composites import take_ordinary_path
from rankopt.model.forward import inference, map_tensors, outputs, random_numbers, run, to_device
from rankopt.model.layer_kinds import copy_geometry
from rankopt.model.lazy_weight import LazyWeight

Item = TypeVar("Item")

TOLERANCE = 1e-5  # of the largest output: kernels may add in another order

HELD = (
    "not reached through its name in the model (a list, closure or hook holds the module itself): "
    "keep it in an nn.ModuleList or call it as self.NAME"
)
READ = "its weight's values are read outside its own forward (tied or standardised weights)"
CHANGED = "an exact replacement changes the model's output (does its forward ask isinstance?)"


class StandIn(nn.Module):
    """A layer in another module's shape: the same function, and only what a replacement offers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = [layer]  # in a list: not a submodule, as a replacement's parts are others
        self.called = self.read = 0
        copy_geometry(self, layer)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer does."""
        self.called += 1
        return self.inner[0](x)

    @property
    def weight(self) -> Tensor:
        """The layer's weight; reads of its values are counted."""
        whole: Tensor = self.inner[0].weight  # type: ignore[assignment]

        def build() -> Tensor:
            self.read += 1
            return whole

        return LazyWeight(whole.shape, whole, build)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        return getattr(self.inner[0], "bias", None)


def check_copy(model: nn.Module, batches: Sequence[Any]) -> nn.Module:
    """A deep copy of a model that computes the same as the model.

    Args:
        model: Any module.
        batches: Calibration inputs; the first one or two are used.

    Raises:
        TaskError: If the model cannot be copied, or its copy computes something else: a closure or a hook still
            refers to the original.
    """
    try:
        expected = all_outputs(model, batches[0])
    except Exception as error:  # whatever the forward raises
        raise TaskError(f"the model does not run on a calibration batch: {type(error).__name__}: {error}") from error
    again = all_outputs(model, batches[0])
    # Whatever the original keeps of a call is now of another input.
    all_outputs(model, batches[1] if len(batches) > 1 else _flipped(batches[0]))
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # whatever a user's class raises
        raise TaskError(
            f"the model cannot be copied ({type(error).__name__}: {error}): make copy.deepcopy work"
        ) from error
    if not same(expected, again):
        return copied  # it keeps a state between calls, or draws numbers that no seed holds: nothing to compare with
    try:
        found = all_outputs(copied, batches[0])
    except Exception as error:  # whatever the forward raises
        raise TaskError(
            f"a copy of the model does not run ({type(error).__name__}: {error}): {_suspects(model)}"
        ) from error
    if not same(expected, found):
        raise TaskError(f"a copy of the model computes something else than the model: {_suspects(model)}")
    return copied


def irreplaceable(model: nn.Module, layers: Sequence[Layer], batch: Any) -> dict[str, str]:
    """The layers that no other module can take the place of.

    Args:
        model: The model, its composite modules expanded. It is not changed.
        layers: The layers that may be factorised.
        batch: A calibration input.

    Returns:
        Layer name -> why it must stay dense.
    """
    trial = Trial(model, batch)
    stand_ins: dict[str, StandIn] = {}

    def works(some: Sequence[Layer]) -> bool:
        nonlocal stand_ins
        copied, stand_ins = _with_stand_ins(model, some)
        return trial.works(copied)

    at_fault = faulty(layers, works)  # `stand_ins` are now those of all others
    reasons = {x.name: _why(trial, x) for x in at_fault}
    reasons |= {name: HELD for name, s in stand_ins.items() if not s.called}
    return reasons | {name: READ for name, s in stand_ins.items() if s.read}


def faulty(items: Sequence[Item], works: Callable[[Sequence[Item]], bool]) -> list[Item]:
    """The items to leave out, so that the others work together; each is found by bisection.

    Args:
        items: What may be at fault.
        works: Whether some of the items work together; none of them always do.
    """
    found: list[Item] = []
    left, good = list(items), 0  # the first `good` of those left work
    while not works(left):
        bad = len(left)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if works(left[:middle]) else (good, middle)
        found.append(left.pop(bad - 1))
    return found


class Trial:
    """A model's outputs for a batch, to compare those of changed copies with.

    Args:
        model: Any module.
        batch: Its input.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model, self.batch = model, batch
        self.expected = all_outputs(model, batch)
        self.repeats = same(self.expected, all_outputs(model, batch))

    def works(self, model: nn.Module) -> bool:
        """Whether a model runs, and computes the same; the latter only of models that repeat themselves."""
        try:
            return same(self.expected, all_outputs(model, self.batch)) or not self.repeats
        except Exception:  # noqa: BLE001  # whatever the forward raises
            return False


def _with_stand_ins(model: nn.Module, layers: Sequence[Layer]) -> tuple[nn.Module, dict[str, StandIn]]:
    """A copy that shares the model's parameters and has stand-ins in the place of layers; and these, by name."""
    small = light_copy(model)
    stand_ins: dict[str, StandIn] = {}
    for layer in layers:
        stand_ins[layer.name] = new = StandIn(small.get_submodule(layer.name))
        if layer.name == "":
            small = new
            continue
        for name in (layer.name, *layer.aliases):
            small.set_submodule(name, new)
    return take_ordinary_path(small), stand_ins


def _why(trial: Trial, layer: Layer) -> str:
    """Why a layer that is at fault must stay dense."""
    copied, _ = _with_stand_ins(trial.model, [layer])
    try:
        all_outputs(copied, trial.batch)
    except Exception as error:  # noqa: BLE001  # whatever the forward raises
        return f"the model does not run with a replacement in its place ({type(error).__name__}: {error})"
    return CHANGED


def light_copy(model: nn.Module) -> nn.Module:
    """A deep copy that shares the model's parameters, for changes of its modules.

    Args:
        model: Any module.
    """
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def all_outputs(model: nn.Module, batch: Any, seed: int = 0) -> list[Tensor]:
    """Every floating-point tensor that the model returns for a batch, in order.

    Args:
        model: Any module.
        batch: Its input.
        seed: Of the random numbers that its forward may draw.
    """
    with inference(model), random_numbers(seed):
        return [z.detach() for z in outputs(run(model, to_device(batch, model))).values()]


def draws_random_numbers(model: nn.Module, batch: Any) -> bool:
    """Whether the outputs depend on the random state, in eval mode too (dropout left on, a VAE, stochastic depth).

    Args:
        model: Any module.
        batch: Its input.
    """
    return not same(all_outputs(model, batch, 0), all_outputs(model, batch, 1))


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two lists of outputs agree, up to the order of additions.

    Args:
        a: The expected tensors.
        b: The others.
    """
    if [t.shape for t in a] != [t.shape for t in b]:
        return False
    pairs = [(x.float().cpu(), y.float().cpu()) for x, y in zip(a, b, strict=True)]
    return all(
        torch.allclose(
            x, y, rtol=0, atol=TOLERANCE * max(float(x.nan_to_num(0, 0, 0).abs().max()), 1e-6), equal_nan=True
        )
        for x, y in pairs
        if x.numel()
    )


def _flipped(batch: Any) -> Any:
    """Another input of the same shapes: the examples in the opposite order."""
    return map_tensors(batch, lambda t: t.flip(0) if t.ndim else t)


def _suspects(model: nn.Module) -> str:
    """What may refer to the original, in words."""
    hooked = [
        name or "the model"
        for name, m in model.named_modules()
        if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)
    ]
    if hooked:
        return (
            f"a hook or forward of {', '.join(map(repr, hooked[:3]))} refers to the original, make it use its arguments"
        )
    return "a closure or a list in it refers to the original's modules, keep them as attributes"
