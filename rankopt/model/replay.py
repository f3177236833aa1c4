"""Runs of a model that begin at one of its layers: what modules before it return is taken from a recorded run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

from torch import Tensor, nn

from rankopt.model.forward import hooked, inference, input_tensors, map_tensors, run, to_device


class Replay:
    """Repeats of a model's run on one input, after a layer was changed, that skip the modules before this layer.

    A module whose calls all end before the first call of a layer returns the same whatever the layer becomes, as long
    as modules work on their inputs alone. Only the outermost of these modules are recorded. Code of the forward outside
    of modules runs again, so that any forward is allowed. A forward that changes a module's output in place, draws
    random numbers or keeps a state may yet compute something else: compare with a whole run before trusting it.

    Args:
        model: The model. Parts behind a layer may be replaced between runs.
        layers: Names of the layers that runs may begin at.
        x: An input that is like the ones to come.

    Attributes:
        before: The recorded modules before each layer. Layers that are not called are missing.
    """

    def __init__(self, model: nn.Module, layers: Collection[str], x: Any) -> None:
        self.model = model
        first, last = _order_of_calls(model, x)
        self.before = {name: _outermost(last, first[name]) for name in layers if name in first}
        self._recorded: dict[str, list[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """All but what was recorded, which only this process needs."""
        return {**self.__dict__, "_recorded": {}}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context: the run within is the one that later runs repeat."""
        self._recorded = {name: [] for names in self.before.values() for name in names}

        def keep(name: str, _args: Any, _kwargs: Any, out: Any) -> None:
            self._recorded[name].append(map_tensors(out, Tensor.clone))

        with hooked(self.model, list(self._recorded), on_output=keep):
            yield

    @contextmanager
    def starting_at(self, layer: str) -> Iterator[None]:
        """Context: the run within, one on the recorded input, begins at a layer.

        Args:
            layer: Its name.
        """
        with ExitStack() as stack:
            for name in self.before.get(layer, ()):
                stack.enter_context(_returning(self.model.get_submodule(name), self._recorded[name]))
            yield

    def recorded_bytes(self) -> int:
        """Bytes of what is recorded."""
        return sum(t.numel() * t.element_size() for t in input_tensors(list(self._recorded.values())))


def _order_of_calls(model: nn.Module, x: Any) -> tuple[dict[str, int], dict[str, int]]:
    """When each module's first call began and its last one ended, in the order of `named_modules`: parents first."""
    clock = count()
    first: dict[str, int] = {}
    last: dict[str, int] = {}

    def begin(name: str, _args: Any) -> None:
        first.setdefault(name, next(clock))

    def end(name: str, *_: Any) -> None:
        last[name] = next(clock)

    names = [name for name, _ in model.named_modules()]
    with inference(model), hooked(model, names, begin, end):
        run(model, to_device(x, model))
    return first, {name: last[name] for name in names if name in last}


def _outermost(last: Mapping[str, int], start: int) -> list[str]:
    """The outermost modules whose calls all end before a time."""
    found: list[str] = []
    for name, end in last.items():
        if end < start and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


@contextmanager
def _returning(module: nn.Module, outputs: list[Any]) -> Iterator[None]:
    """Context: a module returns these outputs, one a call, without computing anything."""
    calls = iter(outputs)
    own = vars(module).get("forward")
    # Copies, as what follows may work in place.
    module.forward = lambda *_args, **_kwargs: map_tensors(next(calls), Tensor.clone)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
