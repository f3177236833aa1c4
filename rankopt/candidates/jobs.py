"""Jobs of fitting: how long they take, and whether a GPU or the cores beside it take them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from rankopt.candidates.calibration import statistics_bytes
from rankopt.candidates.input_moments import is_wide, sketch_rows
from rankopt.core.records import Layer, Rank
from rankopt.decompositions.parameter_search import affordable_steps
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.variable_projection import OutputSolved


class Request(NamedTuple):
    """Fits of one family to one layer, which share work.

    Attributes:
        layer: The layer.
        family: Name of the decomposition.
        ranks: The ranks to fit.
        steps: Optimisation steps of each, before the family's own factor.
        factors: Whether the factors are kept; otherwise only errors are estimated, which takes less.
    """

    layer: Layer
    family: str
    ranks: tuple[Rank, ...]
    steps: int
    factors: bool = True


BESIDE = 3
"""How many steps starts, exact solutions and stored errors take as long as."""


PER_WORK = 4
"""Multiply-accumulates of a step for each unit of `work_of`: 2 to 8 in convolutions and wide Linears."""


GPU_STEP = 8e-3
"""Seconds of a step of a batch on a GPU, which waits for launches: 5 to 12 ms on an H200, whatever the size."""


GPU_RATE = 1e12
"""Multiply-accumulates that a GPU does in a second beside that: measured on an H200 with CP of 4,608 inputs."""


STACK_BYTES, STACK_BYTES_CPU = 2**31, 2**25
"""Bytes of statistics of layers that are fitted at once, on a GPU and on a core."""


STACK_COPIES = 8
"""How many times its statistics' bytes a stack takes on a GPU: in float64, stacked, their roots, in float32."""


SHARES = 3
"""Stacks of average length for each core: the more there are, the less some cores wait for others in the end."""


WORTH = 3.0
"""A stack on a core is cut if its products take more than this many times as long as its overhead.

Beyond that a stack saves next to nothing, and leaves the core's cache: MiniLM's first fits took 1.3 times as long."""


class Estimate(NamedTuple):
    """Seconds of fits on one core.

    Attributes:
        overhead: Those that go to the overhead of operations, which the jobs of a stack share.
        products: Those that go to products.
    """

    overhead: float
    products: float


class Job(NamedTuple):
    """A request, and the key under which the cache holds its fits."""

    layer: Layer
    family: str
    ranks: tuple[Rank, ...]
    steps: int
    factors: bool
    key: str

    def seconds(self) -> float:
        """Estimate how long the fits take on one core."""
        return sum(self.on_a_core())

    def on_a_core(self) -> Estimate:
        """Estimate what the fits take on one core of a server of 2024."""
        layer = self.layer
        width = min(layer.patch, 2 + 2 * sketch_rows(layer)) if is_wide(layer) else layer.patch  # products with S
        if DECOMPOSITIONS[self.family].closed_form:  # in float64
            outputs = layer.out_channels
            return Estimate(0.0, 1e-3 + layer.groups * 5e-11 * outputs * (layer.patch * width + 10 * outputs**2))
        work = work_of(layer, self.family, self.ranks) * width // layer.patch
        steps = math.ceil(self.steps * DECOMPOSITIONS[self.family].effort)
        steps = affordable_steps(steps, max(1, PER_WORK * work // len(self.ranks))) + BESIDE
        return Estimate(steps * 2.5e-4 * (4 + len(self.ranks)), steps * 1.5e-10 * work)

    def seconds_on_gpu(self, layers: int) -> float:
        """Estimate how long the fits of some layers like this one take at once on a GPU.

        Args:
            layers: How many.
        """
        family = DECOMPOSITIONS[self.family]
        if family.closed_form:
            return layers * GPU_STEP
        work = work_of(self.layer, self.family, self.ranks)
        steps = math.ceil(self.steps * family.effort)
        steps = affordable_steps(steps, max(1, PER_WORK * work // len(self.ranks)))
        alike = {repr(family.padding(self.layer, r)) for r in self.ranks} if isinstance(family, OutputSolved) else {""}
        return (steps + BESIDE) * (len(alike) * GPU_STEP + layers * PER_WORK * work / GPU_RATE)


def takes_a_step(request: Request) -> bool:
    """Whether a step of the smallest rank is within the bound on a fit's operations, if there are to be steps.

    Args:
        request: The fits.
    """
    if request.steps == 0 or DECOMPOSITIONS[request.family].closed_form:
        return True
    least = min(work_of(request.layer, request.family, [rank]) for rank in request.ranks)
    return affordable_steps(1, PER_WORK * max(1, least)) > 0


Stack = list[int]
"""Numbers of jobs of one family, whose layers have equal shapes and are fitted at once."""


def stacks(
    jobs: Sequence[Job], kind: Callable[[Layer], str], most: int = STACK_BYTES, without: Collection[int] = ()
) -> list[Stack]:
    """Gather the jobs that can be fitted at once: of ranks that are alike and equal steps.

    Those of the same layers follow each other, whose statistics are then read once.

    Args:
        jobs: The jobs.
        kind: What layers that are fitted at once have in common.
        most: Bytes of statistics of a stack, unless a single layer has more.
        without: Numbers of jobs that are left out.
    """
    kinds = {name: kind(layer) for name, layer in {job.layer.name: job.layer for job in jobs}.items()}
    found: dict[str, dict[str, list[int]]] = {}
    for number, job in ((n, job) for n, job in enumerate(jobs) if n not in without):
        alike = DECOMPOSITIONS[job.family].alike(job.layer, job.ranks)
        same = job.key if alike is None else repr((job.family, alike, job.steps, job.factors))
        found.setdefault(kinds[job.layer.name], {}).setdefault(same, []).append(number)
    cut = []
    for numbers in (numbers for of_kind in found.values() for numbers in of_kind.values()):
        size = max(1, most // statistics_bytes(jobs[numbers[0]].layer))
        cut += [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return cut


def seconds_on_a_core(stack: Sequence[Job]) -> float:
    """Estimate how long the fits of a stack take on one core.

    Args:
        stack: Its jobs.
    """
    return _together([job.on_a_core() for job in stack])


def _together(jobs: Sequence[Estimate]) -> float:
    return max(job.overhead for job in jobs) + sum(job.products for job in jobs)


def for_cores(jobs: Sequence[Job], found: Sequence[Stack], cores: int) -> list[Stack]:
    """Cut stacks into parts that save time, so that all cores are busy to the end.

    Args:
        jobs: The jobs.
        found: Their stacks.
        cores: How many cores there are.

    Returns:
        The parts, the longest first.
    """
    own = {i: jobs[i].on_a_core() for stack in found for i in stack}

    def seconds(stack: Stack) -> float:
        return _together([own[i] for i in stack])

    share = sum(map(seconds, found)) / (SHARES * cores) if cores > 1 else math.inf
    cut = []
    for stack in found:
        longest = min(share, (1 + WORTH) * max(own[i].overhead for i in stack))
        parts = max(1, min(len(stack), math.ceil(seconds(stack) / max(longest, 1e-9))))
        cut += [stack[i::parts] for i in range(parts)]
    return sorted(cut, key=seconds, reverse=True)


def for_gpu(jobs: Sequence[Job], found: Sequence[Stack], cores: int, start_up: float = 0.0) -> list[Stack]:
    """Choose the stacks that a GPU takes, so that it and the cores beside it are done soonest by their estimates.

    The GPU takes those first of which it saves the cores the most time for its own.

    Args:
        jobs: The jobs.
        found: Their stacks.
        cores: How many cores there are.
        start_up: Seconds until they begin.

    Returns:
        Some of the stacks, in the same order.
    """
    here = [seconds_on_a_core([jobs[i] for i in stack]) for stack in found]
    longest = [max(jobs[i].seconds() for i in stack) for stack in found]
    there = [jobs[stack[0]].seconds_on_gpu(len(stack)) for stack in found]
    order = sorted(range(len(found)), key=lambda i: there[i] / here[i])

    def ends(count: int) -> float:
        left = order[count:]
        on_cores = start_up + max(*(longest[i] for i in left), sum(here[i] for i in left) / cores) if left else 0.0
        return max(on_cores, sum(there[i] for i in order[:count]))

    chosen = order[: min(range(len(found) + 1), key=ends)]
    return [found[i] for i in sorted(chosen)]


def rough_seconds(request: Request) -> float:
    """A rough measure of how dear fits are, several times their seconds on one core; products count most.

    Args:
        request: The fits.
    """
    if DECOMPOSITIONS[request.family].closed_form:  # one eigendecomposition for all ranks
        outputs, inputs = request.layer.out_channels, request.layer.patch
        return 1e-3 + request.layer.groups * 4e-10 * outputs * (inputs**2 + 10 * outputs**2 + 2 * outputs * inputs)
    work = work_of(request.layer, request.family, request.ranks)
    return (request.steps + 1) * (0.5e-3 * len(request.ranks) + 4e-9 * work)


def work_of(layer: Layer, family: str, ranks: Sequence[Rank]) -> int:
    """A rough measure of what a step of fits takes.

    Args:
        layer: The layer.
        family: Name of the decomposition.
        ranks: The ranks.
    """
    return sum(DECOMPOSITIONS[family].weights(layer, r) for r in ranks) * layer.patch
