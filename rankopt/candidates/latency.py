"""Latency and energy as costs: layers and candidates are measured on a device, then calibrated against whole models.

The times of single layers do not add up to that of the model. With t the sum of the free layers' times and T the
whole model's time, both measured on the dense model and on a few plans with random factors (times do not depend on
the values of weights), a line is fitted:

    T = T_dense − β (t_dense − t),    β by least squares over the plans,

and a candidate's latency is β times its own time. The residual of the line is reported with the result. The chosen
plan is measured again as a whole: see search/latency_check.py. Energies are measured and used in the same way; where
names and comments here say time, it may be energy.
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
from rankopt.candidates.instruments import LATENCY, Instrument
from rankopt.candidates.latency_table import (
    Conditions,
    LatencyTable,
    Measurements,
    ModelTimes,
    Timing,
    find_table,
    interleaved,
    machine,
    passes,
    read_table,
)
from rankopt.candidates.model_layers import ModelLayers
from rankopt.candidates.pareto import dense_candidate
from rankopt.candidates.quantize import in_each_precision
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError
from rankopt.core.files import digest
from rankopt.core.records import DENSE, MEASURED, RECONSTRUCTED, SAME, Candidate, Layer
from rankopt.core.result_record import Metric
from rankopt.decompositions.plan import assemble
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.forward import hooked, inference, run, to_device
from rankopt.model.inputs import expanded
from rankopt.model.quantization import quantize_

CHUNK, CHUNK_WEIGHTS = 8, 2**26  # candidates, and dense weights, timed side by side
SHARES = (0.2, 0.4, 0.6, 0.8)  # one plan for the line per share: each layer near this share of its dense time
NEAREST = 5  # candidates near a share that the layers of a plan take in turn
LEAST = 0.5  # smallest β, and the inverse of the largest: a β outside is noise of a busy machine


Curves = dict[tuple[str, str, str], tuple[list[int], list[float]]]
"""(layer, family, precision) -> MACs and costs of the candidates that were measured, by rising MACs."""


@dataclass
class MeasuredCosts:
    """What every layer and candidate takes under some conditions, and the line by which that adds up.

    Attributes:
        instrument: What was measured.
        conditions: Device, runtime and batch size.
        machine: Description of the machine that the times are from.
        foreign: Whether that is another machine, so that nothing can be measured here.
        dense: Nanoseconds, or nanojoules for one example, of the whole dense model.
        slope: β, the factor from a layer's own time to its share of the model's.
        residual: Largest residual of the line, relative to the dense model's time.
        plans: Number of plans that the line was fitted to.
        gap: Median relative error of interpolating a measured time from its neighbours; None if every rank was
            timed.
        entries: Nanoseconds or nanojoules by layer name and candidate (see `key`).
        curves: Times over MACs, to interpolate between the ranks that were timed.
    """

    instrument: Instrument
    conditions: Conditions
    machine: str
    foreign: bool
    dense: int
    slope: float
    residual: float
    plans: int
    gap: float | None
    entries: dict[str, dict[str, int]] = field(repr=False)
    curves: Curves = field(repr=False)

    @property
    def metric(self) -> Metric:
        """The metric of `MEASURED`."""
        return self.instrument.metric

    def of_layer(self, layer: Layer) -> int:
        """Return a dense layer's cost.

        Args:
            layer: One of the layers that were timed.
        """
        return round(self.slope * self.entries[layer.name][DENSE])

    def of(self, layer: Layer, candidate: Candidate) -> int:
        """Return a candidate's cost, interpolated over MACs if its rank was not measured.

        Args:
            layer: One of the layers that were timed.
            candidate: A candidate for it.
        """
        if candidate.unchanged or candidate.form == RECONSTRUCTED:
            return self.of_layer(layer)
        name = key(candidate)
        if name in self.entries[layer.name]:
            return round(self.slope * self.entries[layer.name][name])
        macs, times = self.curves[layer.name, candidate.method, candidate.precision]
        return round(self.slope * float(np.interp(candidate.cost.macs, macs, times)))

    def with_layer(self, layer: Layer) -> Layer:
        """Add the metric to a layer's costs.

        Args:
            layer: One of the layers that were timed.
        """
        return dataclasses.replace(layer, cost=layer.cost.with_metric(self.metric, self.of_layer(layer)))

    def with_candidates(self, layer: Layer, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Add the metric to candidates' costs.

        Args:
            layer: One of the layers that were timed, with their costs.
            candidates: Candidates for it.

        Returns:
            The candidates. One that takes more than the dense layer is also offered in its reconstructed form, which
            runs as the dense layer does. Quantized candidates in reconstructed form are left out: they are not timed.
        """
        found = []
        for one in candidates:
            if one.form == RECONSTRUCTED and one.precision != SAME:
                continue
            found.append(dataclasses.replace(one, cost=one.cost.with_metric(self.metric, self.of(layer, one))))
            dearer = found[-1].cost[self.metric] > self.of_layer(layer)
            if dearer and one.precision == SAME and RECONSTRUCTED in DECOMPOSITIONS[one.method].forms:
                cost = DECOMPOSITIONS[one.method].cost(layer, one.rank, RECONSTRUCTED)
                cost = dataclasses.replace(cost, **{m: layer.cost[m] for m in MEASURED})
                cost = cost.with_metric(self.metric, self.of_layer(layer))
                found.append(dataclasses.replace(one, form=RECONSTRUCTED, cost=cost))
        return found

    def about(self) -> dict[str, Any]:
        """Return how these costs were found, for result.json."""
        numbers = {"slope": self.slope, "residual": self.residual, "plans": self.plans, "interpolation": self.gap}
        return {"conditions": str(self.conditions), "machine": self.machine, "foreign": self.foreign, **numbers}


def key(candidate: Candidate) -> str:
    """Name a candidate in a table: "dense", "svd_out 8", "tucker2 4x6 int8".

    Args:
        candidate: The candidate; its form is not part of the name.
    """
    if candidate.unchanged:
        return DENSE
    words = [candidate.method, "x".join(map(str, candidate.rank)), candidate.precision * (candidate.precision != SAME)]
    return " ".join(word for word in words if word)


# --- measuring -----------------------------------------------------------------------------------


def measure_costs(
    model_layers: ModelLayers,
    space: SearchSpace,
    conditions: Conditions,
    cache: Cache,
    progress: Any,
    out: Path | None = None,
    instrument: Instrument = LATENCY,
) -> MeasuredCosts:
    """Measure the layers and candidates that a table lacks, and add them to it.

    Args:
        model_layers: The model and its factorisable layers.
        space: Search space with the candidates to time.
        conditions: Device, runtime and batch size; may name a table.
        cache: Holds the table if neither `conditions` nor `out` names one.
        progress: Progress callback.
        out: The table to write. Default: the one that `conditions` names, else one in the cache for this machine
            and these conditions.
        instrument: What is measured.

    Returns:
        Costs of all candidates of the space.

    Raises:
        RankoptError: The table cannot be read, or is of another machine and lacks a time; or nothing can be measured
            here.
    """
    model, layers, example_input = model_layers.unfolded, model_layers.layers, model_layers.example_input
    here = machine(conditions)
    path = out or (find_table(conditions.table) if conditions.table else _default_path(cache, conditions, here))
    table = (
        read_table(path, conditions) if path.is_file() else LatencyTable(conditions=conditions.measured, machine=here)
    )
    foreign, known = table.machine != here, table.of(instrument.metric)
    if not foreign:
        instrument.open(conditions.on)  # known before anything is measured, fitted and searched
    inputs = layer_inputs(model, layers, expanded(example_input, conditions.batch))
    signatures = {x.name: signature(model.get_submodule(x.name), inputs[x.name]) for x in layers}
    offers = {x.name: timed_candidates(x, space, instrument.points[conditions.runtime]) for x in layers}

    todo = {signatures[x.name]: x for x in layers if _missing(known, signatures[x.name], offers[x.name])}
    name = digest(repr(model_layers.model), sorted(signatures.values()), space.all_families, *map(repr, space.layers))
    if foreign and (todo or name not in known.models):
        what, flag = ("times", "") if instrument.metric == "latency" else ("energies", " --energy")
        raise RankoptError(
            f"{path} holds no {what} of this model's layers on {table.machine}: there, run "
            f"rankopt hardware TASK --on {_without_table(conditions)}{flag} --out {path.name}"
        )
    verb = "timing" if instrument.metric == "latency" else "measuring the energy of"
    for text, layer in progress(todo.items(), f"{verb} layers", len(todo)):
        missing = _missing(known, text, offers[layer.name])
        found = time_layer(model.get_submodule(layer.name), layer, inputs[layer.name], missing, conditions, instrument)
        times = known.layers.setdefault(text, {DENSE: found[DENSE]})
        # Times of earlier runs and of this one are made comparable by the dense layer, which both hold.
        ratio = times[DENSE][0] / found[DENSE][0]
        times |= {k: Timing(max(1, round(ns * ratio)), spread) for k, (ns, spread) in found.items() if k != DENSE}
        table.save(path)

    entries = {x.name: {k: int(ns) for k, (ns, _) in known.layers[signatures[x.name]].items()} for x in layers}
    if name not in known.models:
        plans = [_plan_near(share, layers, offers, entries) for share in SHARES]
        plans = progress(plans, f"{verb} whole models", len(plans))
        known.models[name] = _time_plans(model_layers, plans, entries, conditions, instrument)
        table.save(path)
    slope, residual = fit_line(known.models[name], sum(e[DENSE] for e in entries.values()))
    curves, gap = _curves(layers, offers, entries, space)
    return MeasuredCosts(
        instrument=instrument,
        conditions=conditions,
        machine=table.machine,
        foreign=foreign,
        dense=known.models[name]["dense"],
        slope=slope,
        residual=residual,
        plans=len(known.models[name]["plans"]),
        gap=gap,
        entries=entries,
        curves=curves,
    )


def _default_path(cache: Cache, conditions: Conditions, here: str) -> Path:
    return cache.path(f"hardware-{digest(conditions.measured, here)}", "json")


def _without_table(conditions: Conditions) -> str:
    return str(dataclasses.replace(conditions, table=""))


def layer_inputs(model: nn.Module, layers: Sequence[Layer], x: Any) -> dict[str, list[Tensor]]:
    """Record the inputs of layers in a forward pass.

    Args:
        model: A model whose submodules are the layers.
        layers: The layers.
        x: Input of the model.

    Returns:
        By layer name, copies of the layer's inputs, one per call.
    """
    found: dict[str, list[Tensor]] = {x.name: [] for x in layers}

    def keep(name: str, args: tuple[Any, ...]) -> None:
        found[name].append(args[0].clone())

    with inference(model), hooked(model, found, on_input=keep):
        run(model, to_device(x, model))
    return found


def signature(module: nn.Module, inputs: Sequence[Tensor]) -> str:
    """Describe what a layer's time depends on; layers with the same description are timed once.

    Args:
        module: The layer.
        inputs: Its inputs, one per call.
    """
    return f"{module!r} on {', '.join('x'.join(map(str, x.shape)) for x in inputs)}"


def timed_candidates(layer: Layer, space: SearchSpace, points: int) -> list[Candidate]:
    """Choose the candidates of a layer to time.

    Args:
        layer: The layer.
        space: The search space.
        points: Ranks per family, at most.

    Returns:
        Candidates of each family at ranks evenly spread in the order of their MACs, without factors, in every
        precision of the space.
    """
    found = in_each_precision(layer, dense_candidate(layer), space.precisions)
    for family in space.families_of(layer):
        decomposition = DECOMPOSITIONS[family]
        if decomposition.forms[0] == RECONSTRUCTED:  # runs like the dense layer
            continue
        ranks = space.ranks(family, layer)
        every = [Candidate(family, r, decomposition.cost(layer, r), error=0.0) for r in ranks]
        every.sort(key=lambda c: c.cost.macs)
        chosen = np.linspace(0, len(every) - 1, min(points, len(every))).round().astype(int)
        some = [every[i] for i in dict.fromkeys(chosen.tolist())]
        found += some + [c for one in some for c in in_each_precision(layer, one, space.precisions)]
    return found


def _missing(known: Measurements, text: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    times = known.layers.get(text, {})
    return [c for c in candidates if key(c) not in times]


class EachCall(nn.Module):
    """Calls a layer once for each of several inputs.

    Args:
        module: The layer.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [self.module(x) for x in inputs]


def time_layer(
    module: nn.Module,
    layer: Layer,
    inputs: Sequence[Tensor],
    candidates: Sequence[Candidate],
    conditions: Conditions,
    instrument: Instrument = LATENCY,
) -> dict[str, Timing]:
    """Measure a dense layer, and candidates with random factors.

    A few candidates at a time run in turns with the dense layer. What counts is the ratio to the dense layer in the
    same turn, which cancels drifts of the machine's speed.

    Args:
        module: The dense layer.
        layer: Its description.
        inputs: Its inputs, one per call.
        candidates: Candidates to time.
        conditions: Device, runtime and batch size.
        instrument: What is measured.

    Returns:
        Times by candidate (see `key`), the dense layer's under "dense".
    """
    of_dense: list[int] = []
    shares: dict[str, tuple[float, float]] = {}
    for some in _chunks(layer, candidates):
        modules = [module, *(random_replacement(module, layer, c) for c in some)]
        dense, *others = sample_modules(modules, inputs, conditions, instrument)
        of_dense += dense
        for c, samples in zip(some, others, strict=True):
            shares[key(c)] = ratio(samples, dense), Timing.of(samples).spread
    whole = Timing.of(of_dense)
    return {DENSE: whole} | {
        k: Timing(max(1, round(whole.ns * share)), spread) for k, (share, spread) in shares.items()
    }


def sample_modules(
    modules: Sequence[nn.Module], inputs: Sequence[Tensor], conditions: Conditions, instrument: Instrument = LATENCY
) -> list[list[int]]:
    """Measure modules in turns on the same inputs.

    Args:
        modules: The modules.
        inputs: Inputs of a layer, one per call; a pass runs a module on all of them.
        conditions: Device, runtime and batch size.
        instrument: What is measured.

    Returns:
        What each pass takes, by module.
    """
    if len(inputs) > 1:
        modules = [EachCall(m) for m in modules]
    count = conditions.layer_calls
    calls = passes(modules, tuple(inputs), conditions, count)
    return interleaved(calls, conditions, instrument=instrument, count=count)


def ratio(samples: Sequence[int], others: Sequence[int]) -> float:
    """Return the median ratio of samples that were measured in turns.

    Args:
        samples: Numerators.
        others: Denominators, of the same turns.
    """
    return median(a / b for a, b in zip(samples, others, strict=True))


def _chunks(layer: Layer, candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Split candidates so that a chunk holds few weights; one empty chunk if there is no candidate."""
    size = max(1, min(CHUNK, CHUNK_WEIGHTS // max(layer.weights, 1)))
    return [list(candidates[i : i + size]) for i in range(0, max(len(candidates), 1), size)]


def random_replacement(module: nn.Module, layer: Layer, candidate: Candidate) -> nn.Module:
    """Build a candidate's replacement of a layer, with random factors.

    Args:
        module: The dense layer.
        layer: Its description.
        candidate: The candidate.
    """
    new = copy.deepcopy(module)
    if candidate.method != DENSE:
        new = random_factors(DECOMPOSITIONS[candidate.method].build(module, layer, candidate.rank))
    return quantize_(new, candidate.precision)


def random_factors(module: nn.Module) -> nn.Module:
    """Fill a replacement in place with random factors.

    Their scale preserves that of signals: denormal numbers would be slow.

    Args:
        module: The replacement.

    Returns:
        The module, in eval mode.
    """
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.normal_(0, p[0].numel() ** -0.5)
    return module.eval()


# --- whole models --------------------------------------------------------------------------------


def _time_plans(
    model_layers: ModelLayers,
    plans: Iterable[Sequence[Candidate]],
    entries: dict[str, dict[str, int]],
    conditions: Conditions,
    instrument: Instrument,
) -> ModelTimes:
    whole, layers = model_layers.model, model_layers.layers
    x = expanded(model_layers.example_input, conditions.batch)
    sums, ratios, times = [], [], []
    for plan in plans:
        small = assemble(whole, layers, plan, lambda new, _: random_factors(new))
        both = passes([whole, small], x, conditions)
        dense, one = interleaved(both, conditions, instrument.repeats, instrument)
        sums.append(sum(_time(entries[layer.name], c) for layer, c in zip(layers, plan, strict=True)))
        ratios.append(ratio(one, dense))
        times.append(median(dense))
    dense_ns = round(median(times))
    return {"dense": dense_ns, "plans": [(s, round(r * dense_ns)) for s, r in zip(sums, ratios, strict=True)]}


def _plan_near(
    share: float, layers: Sequence[Layer], offers: dict[str, list[Candidate]], entries: dict[str, dict[str, int]]
) -> list[Candidate]:
    """For each layer one of the NEAREST candidates to a share of its dense time, in turn, to mix families."""
    plan = []
    for number, layer in enumerate(layers):
        times, goal = entries[layer.name], share * entries[layer.name][DENSE]
        own = [c for c in offers[layer.name] if c.precision == SAME] or [dense_candidate(layer)]
        nearest = sorted(own, key=lambda c: abs(_time(times, c) - goal))[:NEAREST]
        plan.append(nearest[number % len(nearest)])
    return plan


def _time(times: dict[str, int], candidate: Candidate) -> int:
    return times[key(candidate)]


def fit_line(model: ModelTimes, dense_sum: int) -> tuple[float, float]:
    """Fit the line from sums of layer times to whole models' times, through the dense model.

    Args:
        model: Times of a model, as in a latency table.
        dense_sum: Sum of the dense layers' times.

    Returns:
        β, and the largest residual relative to the dense model's time.
    """
    saved = np.array([[dense_sum - s, model["dense"] - ns] for s, ns in model["plans"]], float)
    t, whole = saved[:, 0], saved[:, 1]
    if not t.any():
        return 1.0, 0.0
    slope = min(max(float(t @ whole / (t @ t)), LEAST), 1 / LEAST)
    return slope, float(np.abs(whole - slope * t).max() / model["dense"])


def _curves(
    layers: Sequence[Layer], offers: dict[str, list[Candidate]], entries: dict[str, dict[str, int]], space: SearchSpace
) -> tuple[Curves, float | None]:
    """Times over MACs, and the error of interpolating between them; None if every rank was timed."""
    curves: Curves = {}
    errors, sparse = [], False
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
