"""Latency as a cost: layers and candidates timed on a device, and corrected by whole models.

Layer times do not simply add up. With t the sum of the free layers' times and T what a whole model takes, measured
on the dense model and on a few plans (of random factors: times do not depend on the values of weights),

    T = T_dense − β (t_dense − t),    β by least squares over the plans,

and a candidate costs β times its own time. The residual of that line is kept beside it; the last word has a
measurement of the rebuilt model: see promise.py.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.candidates.cache import Cache
from rankopt.candidates.latency_table import (
    Conditions,
    LatencyTable,
    Timing,
    find_table,
    interleaved,
    machine,
    passes,
    read_table,
)
from rankopt.candidates.pareto import dense_candidate
from rankopt.candidates.quantize import in_each_precision
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError
from rankopt.core.files import digest
from rankopt.core.records import DENSE, RECONSTRUCTED, SAME, Candidate, Layer
from rankopt.decompositions.plan import assemble
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.forward import batch_size, inference, map_tensors, run, to_device
from rankopt.model.quantization import quantize_

POINTS = {"eager": 400, "onnxruntime": 8, "compile": 3}  # ranks of a layer and family that are timed; seconds each


CHUNK, CHUNK_WEIGHTS = 8, 2**26  # candidates timed side by side with the dense layer


SHARES = (0.2, 0.4, 0.6, 0.8)  # plans for the correction: every layer near this share of its dense time


REPEATS = 15  # of a whole model


NEAREST = 5


LEAST = 0.5  # β, and the inverse of its largest: what is beyond is a busy machine's noise


@dataclass
class Latencies:
    """Nanoseconds of every layer and candidate under some conditions, and how they add up."""

    conditions: Conditions
    machine: str
    foreign: bool  # measured on another machine: nothing can be checked here
    dense: int  # the whole model, measured
    slope: float  # β
    residual: float  # the worst of the line's, over the dense model's time
    plans: int  # that the line was fitted to
    gap: float | None  # median relative error of interpolating a measured time from its neighbours; None: all measured
    entries: dict[str, dict[str, int]] = field(repr=False)  # layer -> candidate -> ns
    curves: dict[tuple[str, str, str], tuple[list[int], list[float]]] = field(
        repr=False
    )  # layer, family, precision -> macs, ns

    def of_layer(self, layer: Layer) -> int:
        """β times the dense layer's time."""
        return round(self.slope * self.entries[layer.name][DENSE])

    def of(self, layer: Layer, candidate: Candidate) -> int:
        """β times a candidate's time; interpolated over MACs where its rank was not timed."""
        if candidate.unchanged or candidate.form == RECONSTRUCTED:
            return self.of_layer(layer)
        name = key(candidate)
        if name in self.entries[layer.name]:
            return round(self.slope * self.entries[layer.name][name])
        macs, times = self.curves[layer.name, candidate.method, candidate.precision]
        return round(self.slope * float(np.interp(candidate.cost.macs, macs, times)))

    def with_layer(self, layer: Layer) -> Layer:
        """The layer with its latency among its costs."""
        return dataclasses.replace(layer, cost=dataclasses.replace(layer.cost, latency=self.of_layer(layer)))

    def with_candidates(self, layer: Layer, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The candidates with theirs; one that is slower than dense is there in its reconstructed form, too.

        Without those that build a weight of rounded factors: these are not timed.
        """
        found = []
        for one in candidates:
            if one.form == RECONSTRUCTED and one.precision != SAME:
                continue
            found.append(dataclasses.replace(one, cost=dataclasses.replace(one.cost, latency=self.of(layer, one))))
            slower = found[-1].cost.latency > self.of_layer(layer)
            if slower and one.precision == SAME and RECONSTRUCTED in DECOMPOSITIONS[one.method].forms:
                cost = DECOMPOSITIONS[one.method].cost(layer, one.rank, RECONSTRUCTED)
                cost = dataclasses.replace(cost, latency=self.of_layer(layer))
                found.append(dataclasses.replace(one, form=RECONSTRUCTED, cost=cost))
        return found

    def about(self) -> dict[str, Any]:
        """For result.json."""
        numbers = {"slope": self.slope, "residual": self.residual, "plans": self.plans, "interpolation": self.gap}
        return {"conditions": str(self.conditions), "machine": self.machine, "foreign": self.foreign, **numbers}


def key(candidate: Candidate) -> str:
    """A candidate's name in a table."""
    if candidate.unchanged:
        return DENSE
    words = [candidate.method, "x".join(map(str, candidate.rank)), candidate.precision * (candidate.precision != SAME)]
    return " ".join(word for word in words if word)


# --- measuring -----------------------------------------------------------------------------------


def measure_latencies(
    whole: nn.Module,
    model: nn.Module,
    layers: Sequence[Layer],
    space: SearchSpace,
    example_input: Any,
    conditions: Conditions,
    cache: Cache,
    progress: Any,
    out: Path | None = None,
) -> Latencies:
    """Times of all that a search space allows, from a table where it has them; what is measured is added to it.

    whole: the user's model; model: with its composite modules unfolded; layers: its free ones. out: the table to
    write, default: one of the cache for this machine and these conditions. Raises RankoptError for a table of
    another machine that lacks something.
    """
    here = machine(conditions)
    path = out or (find_table(conditions.table) if conditions.table else _default_path(cache, conditions, here))
    table = read_table(path, conditions) if path.is_file() else LatencyTable(conditions.measured, here)
    foreign = table.machine != here
    inputs = layer_inputs(model, layers, expanded(example_input, conditions.batch))
    signatures = {x.name: signature(model.get_submodule(x.name), inputs[x.name]) for x in layers}
    offers = {x.name: timed_candidates(x, space, POINTS[conditions.runtime]) for x in layers}

    todo = {signatures[x.name]: x for x in layers if _missing(table, signatures[x.name], offers[x.name])}
    name = digest(repr(whole), sorted(signatures.values()), space.families)
    if foreign and (todo or name not in table.models):
        raise RankoptError(
            f"{path} holds no times of this model's layers on {table.machine}: there, run "
            f"rankopt hardware TASK --latency-on {_without_table(conditions)} --out {path.name}"
        )
    for text, layer in progress(todo.items(), "timing layers", len(todo)):
        missing = _missing(table, text, offers[layer.name])
        found = time_layer(model.get_submodule(layer.name), layer, inputs[layer.name], missing, conditions)
        known = table.layers.setdefault(text, {DENSE: found[DENSE]})
        ratio = known[DENSE][0] / found[DENSE][0]  # what was timed before and now meet in the dense layer
        known |= {k: [max(1, round(ns * ratio)), spread] for k, (ns, spread) in found.items() if k != DENSE}
        table.save(path)

    entries = {x.name: {k: int(ns) for k, (ns, _) in table.layers[signatures[x.name]].items()} for x in layers}
    if name not in table.models:
        table.models[name] = _time_plans(whole, layers, offers, entries, example_input, conditions, progress)
        table.save(path)
    slope, residual = fit_line(table.models[name], sum(e[DENSE] for e in entries.values()))
    curves, gap = _curves(layers, offers, entries, space)
    dense = table.models[name]["dense"]
    plans = len(table.models[name]["plans"])
    return Latencies(conditions, table.machine, foreign, dense, slope, residual, plans, gap, entries, curves)


def _default_path(cache: Cache, conditions: Conditions, here: str) -> Path:
    return cache.path(f"hardware-{digest(conditions.measured, here)}", "json")


def _without_table(conditions: Conditions) -> str:
    return str(dataclasses.replace(conditions, table=""))


def expanded(example_input: Any, batch: int) -> Any:
    """The first example of an input, so many times."""
    n = batch_size(example_input)
    return map_tensors(
        example_input,
        lambda t: t[:1].expand(batch, *t.shape[1:]).contiguous() if t.ndim and len(t) == n else t,
    )


def layer_inputs(model: nn.Module, layers: Sequence[Layer], x: Any) -> dict[str, list[Tensor]]:
    """Name -> the layer's inputs, one for each of its calls."""
    found: dict[str, list[Tensor]] = {x.name: [] for x in layers}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].clone()))
        for name, kept in found.items()
    ]
    try:
        with inference(model):
            run(model, to_device(x, model))
    finally:
        for handle in handles:
            handle.remove()
    return found


def signature(module: nn.Module, inputs: Sequence[Tensor]) -> str:
    """What the time of a layer depends on, in words; equal layers are timed once."""
    return f"{module!r} on {', '.join('x'.join(map(str, x.shape)) for x in inputs)}"


def timed_candidates(layer: Layer, space: SearchSpace, points: int) -> list[Candidate]:
    """The candidates of a layer to time: of each family so many, evenly spread over their MACs."""
    found = in_each_precision(layer, dense_candidate(layer), space.precisions)
    for family in space.families:
        decomposition = DECOMPOSITIONS[family]
        if decomposition.forms[0] == RECONSTRUCTED:  # runs as the dense layer does
            continue
        ranks = space.ranks(family, layer)
        every = [Candidate(family, r, decomposition.cost(layer, r), error=0.0) for r in ranks]
        every.sort(key=lambda c: c.cost.macs)
        chosen = np.linspace(0, len(every) - 1, min(points, len(every))).round().astype(int)
        some = [every[i] for i in dict.fromkeys(chosen.tolist())]
        found += some + [c for one in some for c in in_each_precision(layer, one, space.precisions)]
    return found


def _missing(table: LatencyTable, text: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    known = table.layers.get(text, {})
    return [c for c in candidates if key(c) not in known]


class EachCall(nn.Module):
    """A layer that is called several times in a forward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [self.module(x) for x in inputs]


def time_layer(
    module: nn.Module, layer: Layer, inputs: Sequence[Tensor], candidates: Sequence[Candidate], conditions: Conditions
) -> dict[str, Timing]:
    """Times of a layer ("dense") and of candidates with random factors.

    Each is timed in turns with the dense layer and a few others, and counts as the ratio to the dense layer there.
    """
    of_dense: list[int] = []
    shares: dict[str, tuple[float, float]] = {}
    for some in _chunks(layer, candidates):
        modules = [module, *(random_replacement(module, layer, c) for c in some)]
        dense, *others = sample_modules(modules, inputs, conditions)
        of_dense += dense
        for c, samples in zip(some, others, strict=True):
            shares[key(c)] = ratio(samples, dense), Timing.of(samples).spread
    whole = Timing.of(of_dense)
    return {DENSE: whole} | {
        k: Timing(max(1, round(whole.ns * share)), spread) for k, (share, spread) in shares.items()
    }


def sample_modules(modules: Sequence[nn.Module], inputs: Sequence[Tensor], conditions: Conditions) -> list[list[int]]:
    """Nanoseconds of modules on a layer's inputs, taken in turns."""
    if len(inputs) > 1:
        modules = [EachCall(m) for m in modules]
    return interleaved(passes(modules, tuple(inputs), conditions), conditions)


def ratio(samples: Sequence[int], others: Sequence[int]) -> float:
    """The median of what was measured in turns, one over the other."""
    return median(a / b for a, b in zip(samples, others, strict=True))


def _chunks(layer: Layer, candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """A few at a time, so that no more than CHUNK_WEIGHTS are in memory; one empty chunk if there is none."""
    size = max(1, min(CHUNK, CHUNK_WEIGHTS // max(layer.weights, 1)))
    return [list(candidates[i : i + size]) for i in range(0, max(len(candidates), 1), size)]


def random_replacement(module: nn.Module, layer: Layer, candidate: Candidate) -> nn.Module:
    """A layer as a candidate has it, its factors drawn."""
    new = copy.deepcopy(module)
    if candidate.method != DENSE:
        new = random_factors(DECOMPOSITIONS[candidate.method].build(module, layer, candidate.rank))
    return quantize_(new, candidate.precision)


def random_factors(module: nn.Module) -> nn.Module:
    """Fill a replacement in place so that signals keep their size: numbers that vanish would be slow."""
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.normal_(0, p[0].numel() ** -0.5)
    return module.eval()


# --- whole models --------------------------------------------------------------------------------


def _time_plans(
    whole: nn.Module,
    layers: Sequence[Layer],
    offers: dict[str, list[Candidate]],
    entries: dict[str, dict[str, int]],
    example_input: Any,
    conditions: Conditions,
    progress: Any,
) -> dict[str, Any]:
    """{"dense": ns, "plans": [[sum of the layers' times, ns], ...]}."""
    x = expanded(example_input, conditions.batch)
    sums, ratios, times = [], [], []
    plans = [_plan_near(share, layers, offers, entries) for share in SHARES]
    for plan in progress(plans, "timing whole models", len(plans)):
        small = assemble(whole, layers, plan, lambda new, _: random_factors(new))
        dense, one = interleaved(passes([whole, small], x, conditions), conditions, REPEATS)
        sums.append(sum(_time(entries[layer.name], c) for layer, c in zip(layers, plan, strict=True)))
        ratios.append(ratio(one, dense))
        times.append(median(dense))
    dense_ns = round(median(times))
    return {"dense": dense_ns, "plans": [[s, round(r * dense_ns)] for s, r in zip(sums, ratios, strict=True)]}


def _plan_near(
    share: float, layers: Sequence[Layer], offers: dict[str, list[Candidate]], entries: dict[str, dict[str, int]]
) -> list[Candidate]:
    """Of each layer one of the NEAREST candidates to a share of the dense layer's time, in turn."""
    plan = []
    for number, layer in enumerate(layers):
        times, goal = entries[layer.name], share * entries[layer.name][DENSE]
        own = [c for c in offers[layer.name] if c.precision == SAME] or [dense_candidate(layer)]
        nearest = sorted(own, key=lambda c: abs(_time(times, c) - goal))[:NEAREST]
        plan.append(nearest[number % len(nearest)])
    return plan


def _time(times: dict[str, int], candidate: Candidate) -> int:
    return times[key(candidate)]


def fit_line(model: dict[str, Any], dense_sum: int) -> tuple[float, float]:
    """β, and the worst residual over the dense model's time."""
    saved = np.array([[dense_sum - s, model["dense"] - ns] for s, ns in model["plans"]], float)
    t, whole = saved[:, 0], saved[:, 1]
    if not t.any():
        return 1.0, 0.0
    slope = min(max(float(t @ whole / (t @ t)), LEAST), 1 / LEAST)
    return slope, float(np.abs(whole - slope * t).max() / model["dense"])


def _curves(
    layers: Sequence[Layer], offers: dict[str, list[Candidate]], entries: dict[str, dict[str, int]], space: SearchSpace
) -> tuple[dict[tuple[str, str, str], tuple[list[int], list[float]]], float | None]:
    """Times over MACs by layer and family, and how well a time is found from its neighbours (None: no need)."""
    curves, errors, sparse = {}, [], False
    for layer in layers:
        for family, precision in {(c.method, c.precision) for c in offers[layer.name]}:
            own = [c for c in offers[layer.name] if (c.method, c.precision) == (family, precision)]
            macs, times = [c.cost.macs for c in own], [float(_time(entries[layer.name], c)) for c in own]
            curves[layer.name, family, precision] = macs, times
            for i in range(1, len(own) - 1):
                guess = np.interp(macs[i], [macs[i - 1], macs[i + 1]], [times[i - 1], times[i + 1]])
                errors.append(abs(guess / times[i] - 1))
            sparse |= family != DENSE and len(own) < len(space.ranks(family, layer))
    return curves, round(median(errors), 4) if sparse and errors else None
