"""Peak memory and file size as costs of layers and candidates; counted, so the same on every machine.

Of a model on a GPU, memory is measured there: see `model.memory.peak_memory`.

Neither quite adds up over layers. Of activations only those of one place in the model are alive at a time, and a module
that holds several maps (attention, an LSTM) takes another course once it is expanded into its parts. In a file, the
header has a line for each tensor, whose length depends on all tensors before it, and is padded. What is added up is
therefore an estimate, and each plan that a search considers is counted as a whole on its own model:

- *memory*: the bytes of a layer's weights, of what .eval() keeps beside them (a reconstructed weight), and of what it
  holds while it runs beyond the peak of the model's activations;
- *disk*: the bytes of its weights and the length of their lines in the header.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.candidates.model_layers import ModelLayers
from rankopt.core.records import DENSE, Candidate, Cost, Layer
from rankopt.decompositions.plan import assemble
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.forward import hooked, inference, map_tensors, run, to_device
from rankopt.model.inputs import one_example
from rankopt.model.memory import Live, file_size, peak_memory, stored_bytes
from rankopt.model.quantization import quantize_

# Length of a tensor's line in the header of a safetensors file, without its name and numbers.
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
    """Memory and disk costs of a model's layers, candidates and plans.

    Attributes:
        model_layers: The model and its factorisable layers.
        modules: The layers by name, on the meta device.
        inputs: The input of each call of a layer, by layer name, on the meta device.
        room: Bytes that a layer may hold at its calls without raising the model's peak, by layer name.
        shared: For parts of composites, by layer name: a part's share of the lines in the file's header, once as long
            as the composite is whole, and once it is expanded, beside its own lines then.
        dense: Costs of the dense model, with memory and disk.
        counted: What plans were found to cost.
    """

    model_layers: ModelLayers
    modules: dict[str, nn.Module]
    inputs: dict[str, list[Tensor]]
    room: dict[str, int]
    shared: dict[str, tuple[int, int]]
    dense: Cost
    counted: dict[Any, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, model_layers: ModelLayers, dense: Cost) -> MemoryCosts:
        """Run a model once to see what is alive at each call of a layer.

        Args:
            model_layers: The model and its factorisable layers.
            dense: Costs of the dense model, with memory and disk.
        """
        model, expanded = model_layers.model, model_layers.unfolded
        inputs, before, peak = _calls(model_layers)
        weights = stored_bytes(model)
        room = {name: max(dense.memory - weights, peak) - live for name, live in before.items()}
        modules = {name: copy.deepcopy(expanded.get_submodule(name)).to("meta").eval() for name in inputs}
        own = {name for name, _ in model.named_modules(remove_duplicate=False)}
        parts: dict[str, list[str]] = defaultdict(list)
        for name in inputs.keys() - own:
            parts[name.rpartition(".")[0]].append(name)
        shared: dict[str, tuple[int, int]] = {}
        for parent, names in parts.items():
            whole, others = (_header(parent, m.get_submodule(parent), dense) for m in (model, expanded))
            others -= sum(_header(name, modules[name], dense) for name in names)
            shared |= dict.fromkeys(names, (whole // len(names), others // len(names)))
        return cls(model_layers, modules, inputs, room, shared, dense)

    def with_layer(self, layer: Layer) -> Layer:
        """Add memory and disk to a dense layer's costs.

        Args:
            layer: One of the model's layers.
        """
        lines = _header(layer.name, self.modules[layer.name], self.dense)
        if layer.name in self.shared:
            lines = self.shared[layer.name][0]
        cost = dataclasses.replace(layer.cost, memory=layer.cost.bytes, disk=layer.cost.bytes + lines)
        return dataclasses.replace(layer, cost=cost)

    def with_candidates(self, layer: Layer, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Add memory and disk to candidates' costs.

        Args:
            layer: One of the model's layers.
            candidates: Candidates for it.
        """
        return [dataclasses.replace(c, cost=self._cost(layer, c)) for c in candidates]

    def count(self, candidates: Sequence[Candidate]) -> dict[str, int]:
        """Count a whole plan, on its model with weights of zero.

        Args:
            candidates: One candidate per layer.

        Returns:
            The costs "memory" and "disk" in bytes.
        """
        key = tuple(c.label for c in candidates)
        if key not in self.counted:
            model = assemble(self.model_layers.model, self.model_layers.layers, candidates, _zeros)
            self.counted[key] = measured(model, self.model_layers.example_input)
        return self.counted[key]

    def _cost(self, layer: Layer, candidate: Candidate) -> Cost:
        new = self._module(layer, candidate)
        lines = _header(layer.name, new, self.dense) + self.shared.get(layer.name, (0, 0))[1]
        kept, most = self._activations(layer, new)
        memory = candidate.cost.bytes + kept + max(0, most - self.room[layer.name])
        return dataclasses.replace(candidate.cost, memory=memory, disk=candidate.cost.bytes + lines)

    def _module(self, layer: Layer, candidate: Candidate) -> nn.Module:
        """A candidate's replacement of a layer, on the meta device."""
        module = self.modules[layer.name]
        if candidate.method == DENSE:
            return quantize_(copy.deepcopy(module), candidate.precision)
        new = DECOMPOSITIONS[candidate.method].build(module, layer, candidate.rank, candidate.form)
        return quantize_(new, candidate.precision).eval()

    def _activations(self, layer: Layer, module: nn.Module) -> tuple[int, int]:
        """Bytes that a replacement keeps in eval mode beside its weights, and most bytes beyond while it runs."""
        kept, most = 0, 0
        for x in self.inputs[layer.name]:
            live = Live()
            map_tensors((x, *module.parameters(), *module.buffers()), live.see)
            before = live.now
            with live, inference(module):
                kept = live.now - before
                live.peak = live.now
                module(x)
            most = max(most, live.peak - before - kept)
        return kept, most


def _zeros(new: nn.Module, candidate: Candidate) -> None:
    """Fill a replacement with zeros, in the precision of its candidate."""
    if candidate.method != DENSE:
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.zero_()
    quantize_(new, candidate.precision)


def _header(prefix: str, module: nn.Module, dense: Cost) -> int:
    """Length of the lines of a module's tensors in the file's header, at their longest."""
    digits = 2 * len(str(dense.disk))
    shapes = {name: len(",".join(map(str, t.shape))) for name, t in module.state_dict().items()}
    return sum(ENTRY + len(prefix) + 1 + len(name) + shape + digits for name, shape in shapes.items())


def _calls(model_layers: ModelLayers) -> tuple[dict[str, list[Tensor]], dict[str, int], int]:
    """Run a model whose composites are expanded.

    Returns:
        By layer name the input of each call, on the meta device; by layer name the most bytes of activations alive at a
        call; and the peak of activations.
    """
    model = model_layers.unfolded
    x = map_tensors(to_device(one_example(model, model_layers.example_input), model), lambda t: t.clone())
    live, weights = Live(), Live()
    map_tensors([*model.parameters(), *model.buffers()], weights.see)
    map_tensors((x, *model.parameters(), *model.buffers()), live.see)
    seen: dict[str, list[tuple[Any, ...]]] = {layer.name: [] for layer in model_layers.layers}
    before = dict.fromkeys(seen, 0)

    def note(name: str, args: tuple[Any, ...]) -> None:
        before[name] = max(before[name], live.now - weights.now)
        seen[name].append((args[0].shape, args[0].stride(), args[0].dtype))

    with hooked(model, seen, on_input=note), live, inference(model):
        run(model, x)
    inputs = {
        name: [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in calls]
        for name, calls in seen.items()
    }
    return inputs, before, live.peak - weights.now
