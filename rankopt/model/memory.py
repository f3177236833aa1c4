"""Memory of a model while it runs and on disk: counted, hence the same on every machine; on a GPU, measured there."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from rankopt.model.forward import device_of, inference, map_tensors, run, to_device
from rankopt.model.inputs import one_example

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""Names of dtypes in safetensors files."""


def peak_memory(model: nn.Module, example_input: Any) -> int:
    """Peak bytes of all tensors that live at the same time in a forward pass of one example in eval mode.

    Weights, buffers, the input, activations and tensors built from weights on the way (dequantized or reconstructed
    ones) count with the sizes of their storages; workspace inside kernels and torch itself do not. Of a model on a GPU
    it is what torch's allocator there was asked for, with the kernels' workspace. Attention takes its ordinary path.
    torch.distributed._tools.mem_tracker gives the same numbers, but fails on weights that take no gradient.

    Args:
        model: The model.
        example_input: A tensor, or a tuple or dict of the forward's arguments; the first example is used.
    """
    if (device := device_of(model)).type == "cuda":
        return measured_peak(model, example_input, GpuAllocator(device))
    x = map_tensors(
        to_device(one_example(model, example_input), model), lambda t: t.clone()
    )  # with a storage of its own
    live = Live()
    map_tensors((x, *model.parameters(), *model.buffers()), live.see)
    with live, inference(model):  # in this order: what .eval() builds stays while the model runs
        run(model, x)
    return live.peak


class Allocator(Protocol):
    """What gives out a device's memory, and how much of it."""

    def now(self) -> int:
        """Bytes that were asked for and are in use."""

    def peak(self) -> int:
        """The most bytes in use at once since the last reset."""

    def reset(self) -> None:
        """Begin to look for the peak from now on."""


class GpuAllocator:
    """torch's caching allocator. What it was asked for does not depend on what it gave out before; what it gives does.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        """See `Allocator`."""
        return int(torch.cuda.memory_stats(self.device)["requested_bytes.all.current"])

    def peak(self) -> int:
        """See `Allocator`."""
        return int(torch.cuda.memory_stats(self.device)["requested_bytes.all.peak"])

    def reset(self) -> None:
        """See `Allocator`."""
        torch.cuda.reset_peak_memory_stats(self.device)


def measured_peak(model: nn.Module, example_input: Any, allocator: Allocator) -> int:
    """Peak bytes that a model takes on its device in a forward pass of one example in eval mode, weights included.

    Args:
        model: The model.
        example_input: A tensor, or a tuple or dict of the forward's arguments; the first example is used.
        allocator: That of the device.
    """
    example = one_example(model, example_input)
    with inference(model):  # libraries take their workspace at their first call and keep it, whatever runs then
        run(model, to_device(example, model))
    allocator.reset()
    before = allocator.now()
    own = copy.deepcopy(model)
    x = to_device(example, own)
    with inference(own):
        run(own, x)
    return allocator.peak() - before


class Live(TorchDispatchMode):
    """Dispatch mode that adds up the sizes of living storages.

    Attributes:
        now: Bytes of all storages seen that live.
        peak: The largest `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed.

        Args:
            tensor: The tensor.
        """
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        self.seen[storage] = storage.nbytes()
        self._add(storage.nbytes())
        weakref.finalize(storage, self._add, -storage.nbytes())

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.see, result)
        return result


class Entry(NamedTuple):
    """A tensor's entry in a safetensors file."""

    dtype: torch.dtype
    shape: Sequence[int]

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers.

    Args:
        model: The model.
    """
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def file_size(model: nn.Module) -> int:
    """Bytes of the model.safetensors that `decompositions.plan.save` would write.

    Args:
        model: The model.
    """
    return size_of_file(*_saved(model))


def _saved(model: nn.Module) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors in a model's file, and its metadata: the names of those that share another's memory."""
    from safetensors.torch import _remove_duplicate_names

    state = model.state_dict()
    twins = {twin: name for name, twins in _remove_duplicate_names(state).items() for twin in twins}
    return {name: Entry(t.dtype, tuple(t.shape)) for name, t in state.items() if name not in twins}, twins


def size_of_file(tensors: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of a safetensors file: 8 for a length, a JSON header padded to a multiple of 8, and the tensors.

    Args:
        tensors: Name -> entry.
        metadata: The file's metadata.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        start, end = end, end + entry.bytes
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
