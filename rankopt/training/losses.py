"""What a compressed model learns from: labels, a teacher's predictions, the dense model's feature maps."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.core.errors import TaskError
from rankopt.core.records import Task
from rankopt.model.composites import expand_composites
from rankopt.model.forward import (
    class_axis,
    find_output,
    inference,
    main_output,
    map_tensors,
    model_input,
    run,
    to_device,
)
from rankopt.training.loop import Loss, divergence, labelled
from rankopt.training.recipe import Recipe

Maps = Mapping[str, Sequence[Tensor]]
"""Name -> a module's outputs, one for each of its calls."""


def factorised(model: nn.Module) -> list[str]:
    """The names of the layers that were replaced, in the model's order."""
    return [name for name, module in model.named_modules() if hasattr(module, "method") and hasattr(module, "rank")]


def blocks(model: nn.Module) -> list[str]:
    """The names of the modules that hold the replaced layers; a layer of the model itself is its own block."""
    return [*dict.fromkeys(name.rpartition(".")[0] or name for name in factorised(model))]


def with_same_names(dense: nn.Module, names: Sequence[str]) -> nn.Module:
    """The dense model, or an unfolded copy, with a module under each name. Raises TaskError if there is none."""
    known = dict(dense.named_modules())
    if not known.keys() >= set(names):
        dense = expand_composites(copy.deepcopy(dense), names)
        known = dict(dense.named_modules())
    missing = sorted(set(names) - known.keys())
    if missing:
        raise TaskError(f"the dense model has no module {missing[0]!r}: give the task that the model was made from")
    return dense


@contextmanager
def recorded(model: nn.Module, names: Sequence[str], apart: bool = False) -> Iterator[dict[str, list[Tensor]]]:
    """Fills the outputs of the modules of these names. apart: no gradient passes through their inputs.

    What goes on through the model is a copy, which it may change in place.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)

    def note(name: str, out: Any) -> Any:
        z = find_output(out)
        if z is not None:
            found[name].append(z)
        return out.clone() if isinstance(out, Tensor) else out

    modules = [(name, model.get_submodule(name)) for name in names]
    handles = [m.register_forward_hook(lambda m, args, out, name=name: note(name, out)) for name, m in modules]
    if apart:
        handles += [
            m.register_forward_pre_hook(lambda m, args: map_tensors(args, lambda t: t.detach())) for _, m in modules
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def distance(maps: Maps, wanted: Maps) -> Tensor:
    """Mean over modules of ‖y − ŷ‖² / ‖y − mean(y)‖², y what is wanted."""
    parts = []
    for name, outputs in maps.items():
        pairs = [(_full(a), _full(b)) for a, b in zip(outputs, wanted[name], strict=True)]
        error = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
        spread = torch.stack([(b - b.mean()).square().sum() for _, b in pairs]).sum()
        parts.append(error / spread.clamp_min(1e-12))
    if not parts:
        raise TaskError("no factorised layer was reached by a batch, so no feature maps can be compared")
    return torch.stack(parts).mean()


def _wide(out: Any) -> Any:
    """An output for a task's own loss; one of a class of its own stays what it is."""
    return out if isinstance(out, dict) and type(out) is not dict else map_tensors(out, _full)


def _full(z: Tensor) -> Tensor:
    """Losses are not for half precision."""
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


def has_labels(task: Task) -> bool:
    """Whether labels can be learnt from, beside or instead of predictions."""
    return task.train is not None and task.loss is not None


class TrainingLoss:
    """A step's loss on a batch: labels, a teacher's predictions, the dense model's feature maps.

        (1 − w) L(ŷ, labels) + w T² KL(teacher ‖ model) + f Σ_l ‖y_l − ŷ_l‖² / ‖y_l − mean‖² / layers

    (Hinton 2015; Romero 2015), L with smoothed labels (Szegedy 2016) the task's own loss and the mean over classes of
    −log p. Without labels, or a loss for them, w is 1.
    """

    def __init__(self, recipe: Recipe, task: Task, teacher: nn.Module, model: nn.Module) -> None:
        self.recipe = recipe
        self.criterion = task.loss if has_labels(task) else None
        if self.criterion is None and (recipe.smoothing or not recipe.distill):
            raise TaskError("smoothing, or distill=0, is for labels: give the task train and loss, or leave these out")
        self.weight = recipe.distill if self.criterion is not None else 1.0
        self.names = factorised(model) if recipe.features else []
        if recipe.features and not self.names:
            raise TaskError("the model has no factorised layer whose feature maps could be compared: give features=0")
        self.dense = with_same_names(task.model, self.names)
        self.teacher = self.dense if teacher is task.model else teacher

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        x = as_input(batch, model, self.recipe)
        with recorded(model, self.names) as maps, autocast(self.recipe, x):
            out = run(model, x)
        z = _full(main_output(out))
        loss: Any = 0.0
        with recorded(self.dense, self.names) as wanted, inference(self.dense), autocast(self.recipe, x):
            taught = run(self.dense, x) if self.names or (self.weight and self.teacher is self.dense) else None
        if self.weight:
            if self.teacher is not self.dense:
                taught = self._asked(x)
            loss += self.weight * divergence(z, _full(main_output(taught)).to(z.device), self.recipe.temperature)
        if self.names:
            loss += self.recipe.features * distance(maps, wanted)
        if self.weight < 1:
            loss += (1 - self.weight) * self._labels(_wide(out), to_device(_target(batch), model))
        return loss

    def _asked(self, x: Any) -> Any:
        try:
            with inference(self.teacher), autocast(self.recipe, x):
                return run(self.teacher, to_device(x, self.teacher))
        except Exception as error:
            raise TaskError(f"the teacher cannot take the task's inputs: {type(error).__name__}: {error}") from error

    def _labels(self, out: Any, target: Any) -> Tensor:
        assert self.criterion is not None
        loss, smoothing = labelled(self.criterion, out, target), self.recipe.smoothing
        if smoothing:
            z = main_output(out)
            axis = class_axis(z)
            if axis is None:
                raise TaskError("the model has one output, where there are no labels to smooth: give smoothing=0")
            loss = (1 - smoothing) * loss - smoothing * F.log_softmax(z, axis).mean()
        return loss


def as_input(batch: Any, model: nn.Module, recipe: Recipe) -> Any:
    """The input in a batch, on the model's device and in the recipe's memory format."""
    x = to_device(model_input(batch), model)
    return map_tensors(x, in_channels_last) if recipe.channels_last else x


def in_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def autocast(recipe: Recipe, x: Any) -> Any:
    """torch's mixed precision, if the recipe wants it, on the device of an input."""
    kinds: list[str] = []
    map_tensors(x, lambda t: kinds.append(t.device.type))
    return torch.autocast(kinds[0], torch.bfloat16, enabled=recipe.precision == "bfloat16")


def _target(batch: Any) -> Any:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TaskError("train must give (input, target) for the task's loss: give these, or distill=1")
    return batch[1]


def layer_by_layer(dense: nn.Module, names: Sequence[str], recipe: Recipe) -> Loss:
    """A loss (model, inputs): each named module's output towards the dense model's, all at once and each by itself.

    A module sees what comes to it in the compressed model and is to put out what the dense model's puts out (He et
    al. 2017, asymmetric reconstruction); no gradient passes from one to another.
    """
    teacher = with_same_names(dense, names)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = as_input(batch, model, recipe)
        with recorded(teacher, names) as wanted, inference(teacher), autocast(recipe, x):
            run(teacher, x)
        with recorded(model, names, apart=True) as maps, autocast(recipe, x):
            run(model, x)
        return distance(maps, wanted)

    return loss


Namer = Callable[[nn.Module], list[str]]


UNITS: dict[str, Namer] = {"layers": factorised, "blocks": blocks}
