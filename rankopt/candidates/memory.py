"""Peak memory and file size as costs of layers and candidates; counted, so the same on every machine.

Weights add up over layers, activations do not: only those of one place in the model are alive at a time. A layer's
memory cost is therefore the bytes of its weights, added to the dense model's peak of activations, and candidates that
would raise this peak are not offered. The sum bounds the true peak of any plan from above. For disk, a file's header
is counted at its greatest possible length. Both are counted exactly on the rebuilt model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankopt.candidates.model_layers import ModelLayers
from rankopt.core.records import DENSE, Candidate, Cost, Layer
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.forward import hooked, inference, map_tensors, run, to_device
from rankopt.model.inputs import one_example
from rankopt.model.memory import Live, file_size, peak_memory
from rankopt.model.quantization import quantize_

# Length of a tensor's entry in the header of a safetensors file, without its name and numbers.
ENTRY = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},')


def measured(model: nn.Module, example_input: Any) -> dict[str, int]:
    """Measure a whole model.

    Args:
        model: The model.
        example_input: An input that it accepts.

    Returns:
        The costs "memory" and "disk" in bytes.
    """
    return {"memory": peak_memory(model, example_input), "disk": file_size(model)}


@dataclass
class MemoryCosts:
    """Memory and disk costs of a model's layers and candidates.

    Attributes:
        modules: The layers by name, on the meta device.
        inputs: The input of each call of a layer, by layer name, on the meta device.
        room: Bytes by which a layer may raise the activations above those alive at its call, by layer name.
        expanded: Length of the entries in the file's header of the composite that a layer is a part of: all its parts
            get entries of their own if one of them changes. By layer name, of such parts only.
        dense: Costs of the dense model, with memory and disk.
    """

    modules: dict[str, nn.Module]
    inputs: dict[str, list[Tensor]]
    room: dict[str, int]
    expanded: dict[str, int]
    dense: Cost

    @classmethod
    def of(cls, model_layers: ModelLayers, dense: Cost) -> MemoryCosts:
        """Run a model once to see what is alive at each call of a layer.

        Args:
            model_layers: The model and its factorisable layers.
            dense: Costs of the dense model, with memory and disk.
        """
        model, unfolded = model_layers.model, model_layers.unfolded
        inputs, before = _calls(model_layers)
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        room = {name: dense.memory - weights - live for name, live in before.items()}
        modules = {name: copy.deepcopy(unfolded.get_submodule(name)).to("meta").eval() for name in inputs}
        own = {name for name, _ in model.named_modules(remove_duplicate=False)}
        parents = {name: name.rpartition(".")[0] for name in inputs if name not in own}
        expanded = {name: _header(parent, unfolded.get_submodule(parent), dense) for name, parent in parents.items()}
        return cls(modules, inputs, room, expanded, dense)

    def with_layer(self, layer: Layer) -> Layer:
        """Add memory and disk to a dense layer's costs, its entries in the file's header at their shortest.

        Args:
            layer: One of the model's layers.
        """
        entries = sum(ENTRY + len(layer.name) + len(name) for name in self.modules[layer.name].state_dict())
        if layer.name in self.expanded:  # the dense file has none of them
            entries = 0
        cost = dataclasses.replace(layer.cost, memory=layer.cost.bytes, disk=layer.cost.bytes + entries)
        return dataclasses.replace(layer, cost=cost)

    def with_candidates(self, layer: Layer, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Add memory and disk to candidates' costs.

        Args:
            layer: One of the model's layers.
            candidates: Candidates for it.

        Returns:
            The candidates, without those that would raise the model's peak of activations.
        """
        found = []
        for one in candidates:
            new = self._module(layer, one)
            if self._raises(layer, new) <= self.room[layer.name]:
                header = _header(layer.name, new, self.dense) + self.expanded.get(layer.name, 0)
                cost = dataclasses.replace(one.cost, memory=one.cost.bytes, disk=one.cost.bytes + header)
                found.append(dataclasses.replace(one, cost=cost))
        return found

    def _module(self, layer: Layer, candidate: Candidate) -> nn.Module:
        """A candidate's replacement of a layer, on the meta device."""
        module = self.modules[layer.name]
        if candidate.method == DENSE:
            return quantize_(copy.deepcopy(module), candidate.precision)
        new = DECOMPOSITIONS[candidate.method].build(module, layer, candidate.rank, candidate.form)
        return quantize_(new, candidate.precision).eval()

    def _raises(self, layer: Layer, module: nn.Module) -> int:
        """Peak bytes while a replacement runs, beyond its input and its weights."""
        most = 0
        for x in self.inputs[layer.name]:
            live = Live()
            map_tensors((x, *module.parameters(), *module.buffers()), live.see)
            before = live.now
            with live, inference(module):
                module(x)
            most = max(most, live.peak - before)
        return most


def _header(prefix: str, module: nn.Module, dense: Cost) -> int:
    """Length of a module's entries in the file's header, at their longest."""
    digits = 2 * len(str(dense.disk))
    shapes = {name: len(",".join(map(str, t.shape))) for name, t in module.state_dict().items()}
    return sum(ENTRY + len(prefix) + 1 + len(name) + shape + digits for name, shape in shapes.items())


def _calls(model_layers: ModelLayers) -> tuple[dict[str, list[Tensor]], dict[str, int]]:
    """By layer name, the input of each call on the meta device, and the most bytes of activations alive at a call."""
    model = model_layers.unfolded
    x = map_tensors(to_device(one_example(model, model_layers.example_input), model), lambda t: t.clone())
    live, weights = Live(), Live()
    map_tensors([*model.parameters(), *model.buffers()], weights.see)
    map_tensors((x, *model.parameters(), *model.buffers()), live.see)
    inputs: dict[str, list[Tensor]] = {layer.name: [] for layer in model_layers.layers}
    before = dict.fromkeys(inputs, 0)

    def note(name: str, args: tuple[Any, ...]) -> None:
        before[name] = max(before[name], live.now - weights.now)
        inputs[name].append(args[0].to("meta"))

    with hooked(model, inputs, on_input=note), live, inference(model):
        run(model, x)
    return inputs, before
