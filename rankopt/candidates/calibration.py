"""Calibration statistics: input moments and output metrics of all layers, measured on real batches.

The error of a candidate weight Ŵ is measured as tr(H (W − Ŵ) S (W − Ŵ)ᵀ), with the input moment S = E[x xᵀ] and the
output metric H = E[g gᵀ], which says how strongly the model's outputs respond to each output of the layer.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.candidates.cache import Cache
from rankopt.candidates.input_moments import WIDEST, is_wide, moments, sketch_rows
from rankopt.candidates.output_metrics import output_metrics
from rankopt.candidates.pool import WORKER_BYTES, NotSentError, Pool
from rankopt.core.errors import RankoptError
from rankopt.core.files import available_memory, gigabytes
from rankopt.core.progress import Progress
from rankopt.core.records import Layer
from rankopt.core.text import few
from rankopt.model.forward import input_tensors, model_input
from rankopt.model.inputs import check_batches

log = logging.getLogger(__name__)

CALIBRATION_BYTES = 2**31
"""The most bytes of inputs that are held in memory: of large images fewer than `CALIBRATION_EXAMPLES` are taken."""

BLOCK_BYTES = 2**30
"""The most bytes of statistics that are summed at once, unless a single layer has more: the layers are taken in blocks,
each with its own runs over the calibration data."""


class WithinMemory:
    """Calibration batches up to `CALIBRATION_BYTES`, and at least one.

    Args:
        batches: A task's calibration batches.

    Attributes:
        cut: Whether the last iteration left batches out.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        check_batches(batches)
        self.batches, self.cut = batches, False

    def __iter__(self) -> Iterator[Any]:
        total, self.cut = 0, False
        for batch in self.batches:
            size = sum(t.numel() * t.element_size() for t in input_tensors(model_input(batch)))
            total += size
            if total > CALIBRATION_BYTES and total > size:
                self.cut = True
                return
            yield batch


def calibrate(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    progress: Progress,
    rows: dict[str, int] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Measure input moments and output metrics.

    Args:
        model: The model.
        layers: Its layers to measure.
        batches: Inputs of the model.
        progress: Progress callback.
        rows: As of `moments`.

    Returns:
        Input moments S by layer name, and output metrics H by layer name, float64 on the CPU. See `moments` and
        `output_metrics`.

    Raises:
        RankoptError: There is less memory than the statistics take.
    """
    s: dict[str, Tensor] = {}
    h: dict[str, Tensor] = {}
    for _, moment, metric in calibrate_blocks(model, blocks(layers), batches, progress, {} if rows is None else rows):
        s.update((name, t.double()) for name, t in moment.items())
        h.update((name, t.double()) for name, t in metric.items())
    return s, h


def calibrate_blocks(
    model: nn.Module,
    parts: Sequence[Sequence[Layer]],
    batches: Sequence[Any],
    progress: Progress,
    rows: dict[str, int],
) -> Iterator[tuple[Sequence[Layer], dict[str, Tensor], dict[str, Tensor]]]:
    """As `calibrate`, one block of layers after the other, so that only the statistics of one are held at a time.

    Args:
        model: The model.
        parts: Blocks of its layers.
        batches: Inputs of the model.
        progress: Progress callback.
        rows: As of `moments`.

    Yields:
        A block with its S and H.

    Raises:
        RankoptError: There is less memory than the statistics of a block take.
    """
    if not parts:
        return
    most = max(map(block_bytes, parts))
    _check_memory(model, max(parts, key=block_bytes), most)
    log.info(
        "calibration takes up to %s of memory beside the model, %d runs over the data", gigabytes(most), len(parts)
    )
    total = 2 * len(batches) * len(parts)
    steps = iter(progress(range(total), "calibrating", total))
    for part in parts:
        s = _as_stored(moments(model, part, batches, lambda: next(steps), rows))
        h = _as_stored(output_metrics(model, part, batches, lambda: next(steps)))
        yield part, s, h
    next(steps, None)


def _measure_away(
    shared: tuple[nn.Module, Sequence[Any]], block: int, part: Sequence[Layer], gradients: bool
) -> tuple[int, dict[str, Tensor]]:
    """In another process: the number of a block, and its output metrics or input moments as they are stored."""
    model, batches = shared
    if gradients:
        return block, _metric_entries(_as_stored(output_metrics(model, part, batches)))
    rows: dict[str, int] = {}
    return block, _moment_entries(_as_stored(moments(model, part, batches, rows=rows)), rows)


def _moment_entries(s: Mapping[str, Tensor], rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Input moments as they are stored, each with the number of vectors that it is the mean of."""
    return {f"moment.{n}": t for n, t in s.items()} | {f"rows.{n}": torch.tensor([rows[n]]) for n in s}


def _metric_entries(h: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output metrics as they are stored."""
    return {f"metric.{n}": t for n, t in h.items()}


def shares(layers: Sequence[Layer], n: int = 3) -> list[list[Layer]]:
    """Divide layers into shares whose input moments take about equally long, in the order of the layers.

    Args:
        layers: The layers.
        n: The most shares.
    """
    found: list[list[Layer]] = [[] for _ in range(n)]
    work = [0.0] * n
    for layer in sorted(layers, key=_moment_work, reverse=True):
        least = work.index(min(work))
        found[least].append(layer)
        work[least] += _moment_work(layer)
    return [sorted(share, key=layers.index) for share in found if share]


def _moment_work(layer: Layer) -> float:
    """Products that the input moment takes for one example; as many vectors as the layer has outputs by channel."""
    return layer.macs / layer.out_channels * layer.patch


def _as_stored(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics in float32 on the CPU; they are taken out of the dictionary one by one."""
    return {name: found.pop(name).float().cpu() for name in list(found)}


def blocks(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Divide layers into blocks whose statistics take up to `BLOCK_BYTES` while they are summed.

    Args:
        layers: The layers, in the model's order.
    """
    found: list[list[Layer]] = []
    room = 0
    for layer in layers:
        size = 2 * statistics_bytes(layer)
        if not found or size > room:
            found.append([])
            room = BLOCK_BYTES
        found[-1].append(layer)
        room -= size
    return found


def block_bytes(layers: Sequence[Layer]) -> int:
    """The most bytes that measuring the statistics of some layers takes: float64 sums, a batch's, and their products.

    Args:
        layers: The layers.
    """
    sizes = [2 * statistics_bytes(x) for x in layers]
    return sum(sizes) + 2 * max(sizes, default=0)


def statistics_bytes(layer: Layer) -> int:
    """The most bytes of a layer's input moment and output metric, as they are stored: in float32.

    Args:
        layer: The layer.
    """
    rows = 1 if layer.kind == "Embedding" else 1 + sketch_rows(layer) if is_wide(layer) else layer.patch
    moment = rows * layer.patch
    return 4 * layer.groups * (moment + layer.out_channels**2)


def _check_memory(model: nn.Module, layers: Sequence[Layer], needed: int) -> None:
    """Raise RankoptError if the statistics of a block do not fit into the memory that is free."""
    sizes = {x.name: 2 * statistics_bytes(x) for x in layers}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    weight = next(model.parameters(), torch.empty(0))
    free = available_memory()
    where = "memory"
    if weight.is_cuda:
        on_gpu = free_on_gpu(weight.device)
        free, where = (on_gpu, "GPU memory") if free is None or on_gpu < free else (free, where)
    if free is not None and needed > free:
        raise RankoptError(
            f"the calibration statistics of {len(sizes)} layers take {gigabytes(needed)}, and {gigabytes(free)} of "
            f"{where} are free: keep the widest layers dense (keep_dense in a search space; "
            f"{', '.join(map(repr, largest))} take {gigabytes(sum(map(sizes.__getitem__, largest)))}), or use a larger "
            "machine"
        )


def free_on_gpu(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process may still take.

    Args:
        device: The GPU.
    """
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def wide_layers(statistics: Statistics) -> list[str]:
    """Warn of layers whose inputs' moment is a sketch that is not exact.

    Args:
        statistics: The statistics of the layers that may be factorised.
    """
    names = [repr(x.name) for x in statistics.layers if is_wide(x) and statistics.rows(x.name) > sketch_rows(x)]
    if not names:
        return []
    return [
        f"{few(names, 3)}: more than {WIDEST:,} inputs, of whose correlations only the strongest directions are kept "
        "to save memory"
    ]


def without_input(statistics: Statistics) -> list[str]:
    """Warn of layers that no input reaches, or nothing but zeros.

    Args:
        statistics: The statistics of all layers.
    """
    blind = [repr(x.name) for x in statistics.layers if not statistics.rows(x.name)]
    if not blind:
        return []
    return [
        f"no calibration input, or nothing but zeros, reaches {few(blind, 3)}: how much they "
        "matter is unknown, and a plan may leave next to nothing of them; give data that reaches them, or name them in "
        "keep_dense"
    ]


def without_metric(statistics: Statistics) -> list[str]:
    """Warn of layers that no gradient reaches, if there are any.

    Args:
        statistics: The statistics of all layers.
    """
    blind = [x.name for x in statistics.layers if statistics.rows(x.name) and not statistics.has_metric(x.name)]
    if not blind:
        return []
    return [
        f"no gradient of the model's outputs reaches {len(blind)} of {len(statistics.layers)} layers (the first: "
        f"{blind[0]!r}; a part under no_grad, for example), so all outputs of these count the same in their fits"
    ]


def few_examples(statistics: Statistics) -> list[str]:
    """Warn of layers whose statistics are of fewer vectors than they have directions.

    Args:
        statistics: The statistics of all layers.
    """
    short = [(x.name, statistics.rows(x.name), x.patch) for x in statistics.layers if x.kind != "Embedding"]
    short = [(name, rows, size) for name, rows, size in short if 0 < rows < size]
    if not short:
        return []
    name, rows, size = min(short, key=lambda x: x[1] / x[2])
    return [
        f"{len(short)} of {len(statistics.layers)} layers see fewer vectors than they have inputs (the most extreme, "
        f"{name!r}: {rows:,} for {size:,}), so what they lose on other data is uncertain: give more calibration data"
    ]


def _in_float64(found: Mapping[str, Tensor]) -> tuple[Any, Any]:
    s, h = (found[kind].double() if kind in found else None for kind in ("moment", "metric"))
    return s, h


class StoredStatistics:
    """What `Statistics` gives, where it lies in the cache already; it can be sent to processes that share the cache.

    Args:
        cache: The cache.
        entries: The key of the entry of each layer, by layer name.
    """

    def __init__(self, cache: Cache, entries: Mapping[str, str]) -> None:
        self.cache, self.entries = cache, entries

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        found = self.read(name, "moment", "metric")
        if found is None:
            raise self.cache.lost()
        return _in_float64(found)

    def read(self, name: str, *kinds: str) -> dict[str, Tensor] | None:
        """Some of a layer's tensors, by kind, as far as they are there; None if the entry is missing or damaged.

        Args:
            name: The layer's name.
            kinds: "moment", "metric" or "rows".
        """
        wanted = {f"{kind}.{name}": kind for kind in kinds}
        found = self.cache.read_tensors(self.entries[name], wanted)
        return None if found is None else {wanted[key]: t for key, t in found.items()}


class Statistics(Mapping[str, tuple[Any, Any]]):
    """Calibration statistics by layer name: (input moment S, output metric H), each None where there is none.

    They are kept in the cache, a file for each of `blocks`, and measured when first needed. Each access reads one
    layer's, so that memory holds no more than these.

    Args:
        model: The model.
        layers: Its layers to measure.
        batches: Inputs of the model.
        key: Content hash of model, layers and batches, under which results are cached.
        cache: The cache.
        progress: Progress callback.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        batches: Sequence[Any],
        key: str,
        cache: Cache,
        progress: Progress,
    ) -> None:
        self.model, self.layers, self.batches = model, layers, batches
        self.key, self.cache, self.progress = key, cache, progress
        self._blocks = blocks(layers)
        self._block_of = {layer.name: i for i, block in enumerate(self._blocks) for layer in block}
        self.stored = StoredStatistics(cache, {name: self._file(i) for name, i in self._block_of.items()})
        self._sound: set[str] = set()

    def ensure_cached(self, pool: Pool | None = None) -> None:
        """Measure the statistics that are not in the cache; leave reading the others until they are needed.

        Args:
            pool: Processes that measure, with the same results; None for this one.
        """
        self._measure(
            [i for i in range(len(self._blocks)) if not self.cache.path(self._file(i), "safetensors").is_file()], pool
        )

    def _file(self, block: int) -> str:
        return f"statistics-{self.key}-{block}"

    def _measure(self, wanted: Sequence[int], pool: Pool | None = None) -> None:
        """Measure blocks and write them to the cache."""
        if not wanted:
            return
        self.cache.check_writable()
        if pool is not None:
            try:
                self._measure_on(pool, wanted)
            except NotSentError as error:
                log.info("statistics are measured in this process: %s", error)
            else:
                return
        rows: dict[str, int] = {}
        parts = [self._blocks[i] for i in wanted]
        measured = calibrate_blocks(self.model, parts, self.batches, self.progress, rows)
        for i, (_, s, h) in zip(wanted, measured, strict=True):
            self.cache.write_tensors(self._file(i), _moment_entries(s, rows) | _metric_entries(h))

    def _measure_on(self, pool: Pool, wanted: Sequence[int]) -> None:
        """Measure blocks in other processes: of each the metrics, and the moments in shares of its layers.

        Each share takes runs of its own, which cost far less than the moments, and its sums are those of all at once.
        """
        calls = []
        for i in wanted:
            calls += [(i, self._blocks[i], True), *((i, share, False) for share in shares(self._blocks[i]))]
        missing = Counter(block for block, _, _ in calls)
        found: dict[int, dict[str, Tensor]] = defaultdict(dict)
        memory = WORKER_BYTES + max(block_bytes(part) for _, part, _ in calls)
        measured = pool(_measure_away, calls, memory, (self.model, self.batches))
        for i, entries in self.progress(measured, "calibrating", len(calls)):
            found[i] |= entries
            missing[i] -= 1
            if not missing[i]:
                self.cache.write_tensors(self._file(i), found.pop(i))

    def _read(self, name: str, *kinds: str) -> dict[str, Tensor]:
        """Some of a layer's entries, by kind; those that there are."""
        found = self.stored.read(name, *kinds)
        if found is None:  # not there yet, or damaged
            self._measure([self._block_of[name]])
            found = self.stored.read(name, *kinds)
        if found is None:
            raise self.cache.lost()
        return found

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        found = self._read(name, "moment", "metric")
        self._sound.add(name)
        return _in_float64(found)

    def ensure_sound(self, name: str) -> None:
        """Measure a layer's statistics again if they are damaged; they are looked at once.

        Args:
            name: The layer's name.
        """
        if name not in self._sound:
            self._read(name, "moment", "metric")
            self._sound.add(name)

    def shapes(self, name: str) -> dict[str, list[int]]:
        """The shapes of what there is of a layer: "moment" and "metric".

        Args:
            name: The layer's name.
        """
        wanted = {f"{kind}.{name}": kind for kind in ("moment", "metric")}
        found = self.cache.read_shapes(self._file(self._block_of[name]), wanted)
        return {wanted[key]: shape for key, shape in found.items()}

    def rows(self, name: str) -> int:
        """How many vectors a layer's input moment is the mean of; 0 if no input reached it.

        Args:
            name: The layer's name.
        """
        return int(self._read(name, "rows").get("rows", 0))

    def has_metric(self, name: str) -> bool:
        """Whether there is an output metric of a layer.

        Args:
            name: The layer's name.
        """
        return "metric" in self._read(name, "metric")

    def __iter__(self) -> Iterator[str]:
        return iter(layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)
