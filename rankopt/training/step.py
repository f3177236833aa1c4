"""One step of a training, recorded as a CUDA graph where that is possible.

A step of a compressed model launches hundreds of small kernels, and launching them takes longer than running them. A
CUDA graph launches all of them at once. For each shape of batches, the first WARM_UP steps are ordinary ones; the
next is recorded, and then replayed for every batch of that shape. Recording runs no kernel, so that weights, buffers
and the optimizer's state are those of ordinary steps all along.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from rankopt.core.allocator import keep_freed_memory
from rankopt.core.text import one_line
from rankopt.model.forward import input_tensors, map_tensors

WARM_UP = 3  # ordinary steps before one is recorded, in which libraries choose their kernels and set up workspaces
MOST_SHAPES = 4  # of batches that are recorded: each graph keeps the memory of a whole step
WORTH_IT = 20  # steps from which on recording pays


Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> a scalar to minimise."""


Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Records the GPU work of a function -> what replays it."""


@dataclass
class Capture:
    """How the steps of a training are recorded, and what came of it.

    Attributes:
        record: Records a function.
        shapes: How many shapes of batches were recorded.
        reason: Why steps are not recorded; empty while they are.
    """

    record: Record
    shapes: int = 0
    reason: str = ""


def cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record a function on the current CUDA stream, which must not be the default one.

    Args:
        work: The function.

    Returns:
        What replays it.

    Raises:
        RuntimeError: It cannot be recorded, for instance because it waits for the GPU.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream = torch.cuda.current_stream()
    numbers = torch.cuda.get_rng_state(stream.device)
    try:
        # Other threads, such as a loader's that pins memory, may go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
    except Exception:
        _FAILED.append(graph)
        _clean_up(stream.device, pool)
        torch.cuda.set_rng_state(numbers, stream.device)
        raise
    return graph.replay


_FAILED: list[Any] = []  # torch keeps pointers to graphs whose recording failed


def _clean_up(device: torch.device, pool: Any) -> None:
    """Undo what torch leaves behind where a recording fails.

    Its allocator counts the recording as under way, so that the next `torch.cuda.empty_cache()` would be an internal
    error; and its generator does so, too, so that random operations would be. A recording that succeeds ends the
    latter.
    """
    with suppress(RuntimeError):  # the error of the recording, once more
        torch.cuda.synchronize(device)
    with suppress(RuntimeError):  # unless the end of the recording got this far
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with suppress(RuntimeError):
        clean = torch.cuda.CUDAGraph()
        clean.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        clean.capture_end()


def recorder(device: torch.device) -> Record | None:
    """Return what records steps on a device; None where nothing does.

    Args:
        device: The device of the model.
    """
    return cuda_graph if device.type == "cuda" else None


def can_fuse(parameters: Sequence[Tensor]) -> bool:
    """Whether torch's fused optimizers take some parameters, as recording needs: dense ones, all on one device.

    Args:
        parameters: The parameters to train.
    """
    dense = all(p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last) for p in parameters if p.ndim)
    return dense and len({p.device for p in parameters}) == 1 and all(p.is_floating_point() for p in parameters)


class Step:
    """Loss, gradients, clipping and optimizer; the gradients stay until the next step.

    Args:
        model: The model.
        loss: Maps (model, batch) to a scalar.
        optimizer: The optimizer; only with `fused=True` is a step recorded.
        clip: Largest norm of the gradient of all parameters together; None: no clipping.
        capture: How steps are recorded; None: not at all.
        tf32: Whether float32 matrix products may round their inputs to TensorFloat-32.
    """

    def __init__(  # what a step consists of
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        capture: Capture | None = None,
        tf32: bool = False,
    ) -> None:
        self.model, self.loss, self.optimizer, self.clip, self.capture = model, loss, optimizer, clip, capture
        self.products = tensor_float_32 if tf32 else nullcontext
        self.moving = [p for group in optimizer.param_groups for p in group["params"]]
        self.seen: Counter[str] = Counter()
        self.recorded: dict[str, _Recorded] = {}
        if capture is not None and not all(group.get("fused") for group in optimizer.param_groups):
            capture.reason = "the optimizer is not fused"

    def __call__(self, batch: Any) -> Tensor:
        """Do one step.

        Args:
            batch: The batch.

        Returns:
            The loss, detached. Reading it waits for the device.
        """
        if self.capture is None or self.capture.reason:
            return self.run(batch)
        shapes = _shapes(batch)
        if known := self.recorded.get(shapes):
            return known(batch)
        self.seen[shapes] += 1
        if self.seen[shapes] == WARM_UP:
            return self._watched(batch)
        if self.seen[shapes] < WARM_UP or len(self.recorded) == MOST_SHAPES:
            return self.run(batch)
        return self._record(shapes, batch)

    def run(self, batch: Any, rates: Sequence[Tensor] = ()) -> Tensor:
        """Do one step without recording it.

        Args:
            batch: The batch.
            rates: Learning rates of the optimizer's groups as tensors, which a recorded step reads; empty for the
                optimizer's own.

        Returns:
            The loss, detached.
        """
        with self.products():
            self.optimizer.zero_grad(set_to_none=True)
            value = self.loss(self.model, batch)
            value.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.moving, self.clip)
            with _rates_from(self.optimizer, rates):
                self.optimizer.step()
        return value.detach()

    def _watched(self, batch: Any) -> Tensor:
        """An ordinary step that looks for random numbers which a replay would not draw again."""
        before = _cpu_random_states()
        value = self.run(batch)
        if _cpu_random_states() != before:
            self._give_up("a step draws random numbers on the CPU")
        return value

    def _record(self, shapes: str, batch: Any) -> Tensor:
        assert self.capture is not None
        self.optimizer.zero_grad(set_to_none=True)  # the graph then writes gradients instead of adding to them
        try:
            recorded = _Recorded(self, batch, self.capture.record)
        except Exception as error:  # noqa: BLE001  # whatever the model does
            cause = error.__context__ if isinstance(error.__context__, Exception) else error
            text = (str(cause).splitlines() or [""])[0]
            self._give_up(one_line(f"{type(cause).__name__}: {text}"))
            return self.run(batch)
        self.recorded[shapes] = recorded
        self.capture.shapes += 1
        return recorded(batch)

    def _give_up(self, reason: str) -> None:
        assert self.capture is not None
        self.capture.reason = reason
        self.recorded.clear()


class _Recorded:
    """A step recorded for batches of one shape.

    Args:
        step: The step.
        batch: A batch of that shape.
        record: Records a function.
    """

    def __init__(self, step: Step, batch: Any, record: Record) -> None:
        device = step.moving[0].device
        self.optimizer = step.optimizer
        self.inputs = map_tensors(batch, lambda t: t.to(device, copy=True))
        self.rates = [torch.full((), float(group["lr"]), device=device) for group in self.optimizer.param_groups]
        self.value = torch.zeros((), device=device)
        self.changed = [*step.model.parameters(), *step.model.buffers()]

        def work() -> None:
            self.value.copy_(step.run(self.inputs, self.rates))

        self.replay = record(work)

    def __call__(self, batch: Any) -> Tensor:
        for own, new in zip(input_tensors(self.inputs), input_tensors(batch), strict=True):
            own.copy_(new, non_blocking=True)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.replay()
        increment_version(self.changed)  # autograd and caches of weights do not see what a graph writes
        return self.value.clone()


def _shapes(batch: Any) -> str:
    """What must be the same for a batch to be given to a recorded step: shapes, and values that are no tensors."""
    return repr(map_tensors(batch, lambda t: f"{tuple(t.shape)} {t.dtype}"))


def _cpu_random_states() -> tuple[Any, ...]:
    state: Any = np.random.get_state()  # the one that a model may draw from
    kind, keys, *rest = state
    return random.getstate(), kind, keys.tobytes(), rest, torch.get_rng_state().numpy().tobytes()


@contextmanager
def _rates_from(optimizer: torch.optim.Optimizer, rates: Sequence[Tensor]) -> Iterator[None]:
    """Context: the optimizer reads its learning rates from tensors, without waiting for the device."""
    groups = optimizer.param_groups if rates else []
    kept: list[dict[str, Any]] = [{key: group[key] for key in ("lr", "capturable") if key in group} for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group:  # Adam's; a fused optimizer keeps all of its state on the device anyway
            group["capturable"] = True
    try:
        yield
    finally:
        for group, values in zip(groups, kept, strict=True):
            group.update(values)


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Context: float32 matrix products on a GPU may use TensorFloat-32; convolutions may by default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def device_settings(device: torch.device) -> AbstractContextManager[None]:
    """Context of a training on a device: settings with which its steps are fast.

    Args:
        device: The device of the model.
    """
    if device.type == "cuda":
        return _gpu_settings(device)
    return keep_freed_memory() if device.type == "cpu" else nullcontext()


@contextmanager
def _gpu_settings(device: torch.device) -> Iterator[None]:
    """A stream of its own, since none is recorded on the default one, and cuDNN's fastest kernels for each shape."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    outside = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(outside)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outside.wait_stream(stream)
        torch.backends.cudnn.benchmark = benchmark


def pinned(batch: Any) -> Any:
    """A batch whose tensors in main memory are page-locked, from where they are copied without waiting.

    Args:
        batch: The batch.
    """

    def pin(t: Tensor) -> Tensor:
        return t.pin_memory() if t.device.type == "cpu" and t.layout == torch.strided and t.numel() else t

    return map_tensors(batch, pin)
