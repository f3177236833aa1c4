"""Memory while a model runs, and bytes of its file, as costs: counted, the same on every machine.

Weights add up, activations do not: at every moment those of one place in the model live. A limit on memory therefore
counts the bytes of weights beside the dense model's highest activations, and a candidate that would raise these is
not offered: the peak of any plan is at most the sum. A file's header is counted at its longest. Both are counted
again on the rebuilt model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankopt.core.records import DENSE, Candidate, Cost, Layer
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.forward import inference, map_tensors, one_example, run, to_device
from rankopt.model.memory import Live, file_size, peak_memory
from rankopt.model.quantization import quantize_

ENTRY = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},')  # of a tensor in a file's header, without its numbers


def measured(model: nn.Module, example_input: Any) -> dict[str, int]:
    """The memory and disk of a whole model."""
    return {"memory": peak_memory(model, example_input), "disk": file_size(model)}


@dataclass
class MemoryCosts:
    """What a model's layers and candidates take in memory and on disk."""

    modules: dict[str, nn.Module]  # the layers, without storage
    inputs: dict[str, list[Tensor]]  # of every call, without storage
    room: dict[str, int]  # by which a layer may raise the activations over those at its call
    dense: Cost

    @classmethod
    def of(cls, whole: nn.Module, model: nn.Module, layers: Sequence[Layer], x: Any, dense: Cost) -> MemoryCosts:
        """whole: the user's model; model: with its composite modules unfolded; x: an example; dense: what it costs."""
        inputs, before = _calls(model, layers, x)
        weights = sum(t.numel() * t.element_size() for t in (*whole.parameters(), *whole.buffers()))
        room = {name: dense.memory - weights - live for name, live in before.items()}
        modules = {x.name: copy.deepcopy(model.get_submodule(x.name)).to("meta").eval() for x in layers}
        return cls(modules, inputs, room, dense)

    def with_layer(self, layer: Layer) -> Layer:
        """The layer with its memory and disk among its costs: the file's header at its shortest."""
        entries = sum(ENTRY + len(layer.name) + len(name) for name in self.modules[layer.name].state_dict())
        cost = dataclasses.replace(layer.cost, memory=layer.cost.bytes, disk=layer.cost.bytes + entries)
        return dataclasses.replace(layer, cost=cost)

    def with_candidates(self, layer: Layer, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The candidates with theirs, without those that would raise the peak."""
        found = []
        for one in candidates:
            new = self._module(layer, one)
            if self._raises(layer, new) <= self.room[layer.name]:
                cost = dataclasses.replace(
                    one.cost, memory=one.cost.bytes, disk=one.cost.bytes + self._header(layer, new)
                )
                found.append(dataclasses.replace(one, cost=cost))
        return found

    def _module(self, layer: Layer, candidate: Candidate) -> nn.Module:
        """A layer as a candidate has it, without storage."""
        module = self.modules[layer.name]
        if candidate.method == DENSE:
            return quantize_(copy.deepcopy(module), candidate.precision)
        new = DECOMPOSITIONS[candidate.method].build(module, layer, candidate.rank, candidate.form)
        return quantize_(new, candidate.precision).eval()

    def _raises(self, layer: Layer, module: nn.Module) -> int:
        """Bytes that live at most while it runs, beside its input and its own weights."""
        most = 0
        for x in self.inputs[layer.name]:
            live = Live()
            map_tensors((x, *module.parameters(), *module.buffers()), live.see)
            before = live.now
            with live, inference(module):
                module(x)
            most = max(most, live.peak - before)
        return most

    def _header(self, layer: Layer, module: nn.Module) -> int:
        """Of its tensors' entries in a file, at their longest."""
        digits = 2 * len(str(self.dense.disk))
        shapes = {name: len(",".join(map(str, t.shape))) for name, t in module.state_dict().items()}
        return sum(ENTRY + len(layer.name) + 1 + len(name) + shape + digits for name, shape in shapes.items())


def _calls(
    model: nn.Module, layers: Sequence[Layer], example_input: Any
) -> tuple[dict[str, list[Tensor]], dict[str, int]]:
    """Name -> the layer's inputs, without storage; and -> the most bytes of activations that lived at its calls."""
    x = map_tensors(to_device(one_example(example_input), model), lambda t: t.clone())
    live, weights = Live(), Live()
    map_tensors([*model.parameters(), *model.buffers()], weights.see)
    map_tensors((x, *model.parameters(), *model.buffers()), live.see)
    inputs: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    before = dict.fromkeys(inputs, 0)

    def note(name: str, args: tuple[Any, ...]) -> None:
        before[name] = max(before[name], live.now - weights.now)
        inputs[name].append(args[0].to("meta"))

    handles = [model.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: note(n, args)) for n in inputs]
    try:
        with live, inference(model):
            run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, before
