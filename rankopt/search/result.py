"""The result of a search: the chosen plan's model rebuilt, counted, refined and scored."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from rankopt.candidates.memory import measured
from rankopt.candidates.pareto import dense_candidate
from rankopt.candidates.prepare import Prepared
from rankopt.candidates.sensitivity import Curve
from rankopt.core.budget import Limit
from rankopt.core.environment import environment
from rankopt.core.errors import BudgetError, RankoptError
from rankopt.core.problem import Problem
from rankopt.core.progress import Progress, silent
from rankopt.core.records import (
    MEASURED,
    RECONSTRUCTED,
    SAME,
    Candidate,
    Choice,
    Cost,
    Layer,
    Plan,
    Proposal,
    Task,
    Trial,
)
from rankopt.core.result_record import (
    PARTS,
    AsFastEntry,
    BudgetEntry,
    ChangeRecord,
    CostEntry,
    ExamplesEntry,
    FrontierPoint,
    FrontiersFile,
    IntervalEntry,
    IntervalsEntry,
    LayerRow,
    Metric,
    MillisecondsEntry,
    ResultInfo,
    ScoreEntry,
    ScoreRecord,
    ScoresEntry,
    SearchMetadata,
    TrialsEntry,
)
from rankopt.core.run_folder import AS_FAST, write_frontiers, write_result
from rankopt.core.statistics import misread_score, proxy, tie, wilson
from rankopt.decompositions.plan import apply, replaced_layers, save
from rankopt.model.counting import count, inputs_of
from rankopt.model.energy import of_models
from rankopt.model.forward import device_of, to_device
from rankopt.model.inputs import one_example
from rankopt.model.objective import call
from rankopt.model.speed import forward_times
from rankopt.search.evaluator import Evaluator
from rankopt.search.fidelity import fidelity_rows
from rankopt.search.front import Front, searched_metrics
from rankopt.search.latency_check import Checks, measured_entries, measured_limits, with_target
from rankopt.search.settings import SearchSettings
from rankopt.search.trained_plans import TrainedPlans
from rankopt.strategies.allocation import allocate, relative_gap
from rankopt.training.batch_norm import recalibrate
from rankopt.training.loop import train_briefly
from rankopt.training.refine import refine as refine_layers

MOST_POINTS = 20_000
"""Candidates in frontiers.json, of all layers together."""


LEARNT, TRAINED_DENSE = "rank learnt in training", "dense, trained with the others"
"""The reasons of a plan's choices where a strategy trained the network."""


@dataclass
class Result:
    """What a compression returns.

    Attributes:
        model: The compressed model, an ordinary `nn.Module`.
        plan: The decision for every layer.
        limits: The budget in absolute numbers.
        info: The content of result.json; `rankopt.core.result_record` documents every key.
        trials: The trials within the limits, in the order in which they ended.
        problem: The layers' frontiers that the search chose from; None where that is not known, as in a run folder.
        sensitivities: Layer name -> measured (relative error, rise of the objective), one layer at a time.
        dense: The model that was compressed; None where it is not known, as in a run folder.
        inputs: The calibration batches, as the model takes them; None where they are not known.
        as_fast: The result within the same budget whose model is not slower than dense; None if that was not asked for,
            or if there is none (`info["as_fast"]` says why).
    """

    model: nn.Module
    plan: Plan
    limits: tuple[Limit, ...]
    info: ResultInfo
    trials: Sequence[Trial] = field(default=(), repr=False)
    problem: Problem | None = field(default=None, repr=False)
    sensitivities: Mapping[str, Curve] = field(default_factory=dict, repr=False)
    dense: nn.Module | None = field(default=None, repr=False)
    inputs: Sequence[Any] | None = field(default=None, repr=False)
    as_fast: Result | None = field(default=None, repr=False)

    @property
    def interrupted(self) -> bool:
        """Whether the search was stopped before all its trials were done."""
        return self.info["trials"].get("interrupted", False)

    def summary(self) -> str:
        """The result as text, at most 80 columns wide."""
        from rankopt.search.summary import summary

        return summary(self.info)

    def save(self, folder: str | Path) -> None:
        """Write plan.json, model.safetensors and result.json.

        For models with a save_pretrained of their own (Hugging Face), the weights are in rankopt.safetensors: the
        folder may be one that save_pretrained writes to, too.

        Args:
            folder: Where to write them; made if it is missing.

        Raises:
            RankoptError: If a file cannot be written.
        """
        save(folder, self.model, self.plan)
        write_result(folder, self.info)
        if self.problem is not None:
            write_frontiers(folder, frontiers(self.problem, self.plan))
        if self.as_fast is not None:
            self.as_fast.save(Path(folder) / AS_FAST)


@dataclass(frozen=True)
class SearchOutcome:
    """What a search ended with.

    Attributes:
        problem: The problem that was searched last.
        trials: The trials within its limits.
        chosen: The trial whose plan is the result.
        asked: Proposals that the strategy made.
        limit: Distinct plans that were to be evaluated.
        checks: The checks of budgets on latency and energy. They know the limits that were asked for; the problem's
            own may have been tightened since.
        outside: Trials evaluated before a limit was tightened, whose plans lie outside the new one.
        interrupted: Whether the search was stopped before all its trials were done.
        kept: The weights of the best trials, if trials were trained.
    """

    problem: Problem
    trials: Sequence[Trial]
    chosen: Trial
    asked: int
    limit: int
    checks: Checks = ()
    outside: int = 0
    interrupted: bool = False
    kept: TrainedPlans | None = None

    def with_asked_limits(self) -> SearchOutcome:
        """The same outcome, its problem with the limits that were asked for."""
        limits = self.problem.limits
        for check in self.checks:
            limits = with_target(limits, check.limit)
        return dataclasses.replace(self, problem=dataclasses.replace(self.problem, limits=limits))


# --- the plan ----------------------------------------------------------------------------------------


def make_plan(prepared: Prepared, problem: Problem, proposal: Proposal) -> Plan:
    """Write a proposal out as a plan: every layer's decision with its reason, and the predicted cost.

    Args:
        prepared: The task with its candidates.
        problem: The problem whose frontiers the proposal indexes.
        proposal: One frontier index per free layer.

    Returns:
        A plan with a choice for every layer of the inventory, also for those that must stay dense.
    """
    chosen = {layer.name: (f, i) for layer, f, i in zip(problem.layers, problem.frontiers, proposal, strict=True)}
    choices = []
    for layer in prepared.layers:
        if layer.name in chosen:
            candidates, at = chosen[layer.name]
            candidate = candidates[at]
            if prepared.network is None:
                reason = _reason(layer, candidates, at, problem.limits[0].metric)
            else:
                reason = TRAINED_DENSE if candidate.unchanged else LEARNT
        else:
            candidate, reason = dense_candidate(layer), layer.reason or ""
        choices.append(
            Choice(
                name=layer.name,
                kind=layer.kind,
                shape=layer.own_shape,
                method=candidate.method,
                rank=candidate.rank,
                params=candidate.cost.params,
                macs=candidate.cost.macs,
                error=candidate.error,
                reason=reason,
                form=candidate.form,
                precision=candidate.precision,
            )
        )
    limited = [
        costs for limit in measured_limits(problem) if (costs := prepared.measured.get(cast(Metric, limit.metric)))
    ]
    conditions = str(limited[0].conditions) if limited else ""
    before = replaced_layers(prepared.task.model)
    return Plan(tuple(choices), problem.cost(proposal), prepared.dense, conditions, before)


def _reason(layer: Layer, candidates: Sequence[Candidate], at: int, metric: str) -> str:
    """Why a layer got the candidate at this index: what it saves, its loss, and that of the next cheaper one."""
    chosen = candidates[at]

    # Shares are of the layer's cost: where a candidate is exact, dense is not on the frontier.
    def share(candidate: Candidate) -> float:
        return candidate.cost[metric] / max(layer.cost[metric], 1)

    if at == 0 and chosen.unchanged:
        return "dense: no candidate is cheaper than the layer itself"
    if chosen.unchanged:
        below = candidates[at - 1]
        return (
            f"dense: the mildest candidate ({_label(below)}) would save {1 - share(below):.0%} "
            f"and raise the objective by {below.loss:.2g}"
        )
    families = sorted({_label(c) for c in candidates if not c.unchanged})
    text = (
        f"keeps {share(chosen):.0%} of its {metric} for a predicted rise of {chosen.loss:.2g}; "
        f"best of {len(candidates)} on its frontier ({', '.join(families)})"
    )
    return text if at == 0 else f"{text}; the next cheaper would cost {candidates[at - 1].loss:.2g}"


def frontiers(problem: Problem, plan: Plan) -> FrontiersFile:
    """The layers' frontiers, for frontiers.json. Of a model of many layers some candidates of each are left out.

    Args:
        problem: The problem that was searched.
        plan: The chosen plan, whose candidates are never left out.
    """
    metric = cast(Metric, problem.limits[0].metric)
    each = max(2, MOST_POINTS // max(len(problem.layers), 1))
    chosen = {c.name: (c.method, c.rank, c.form, c.precision) for c in plan.choices}
    found: dict[str, list[FrontierPoint]] = {}
    for layer, frontier in zip(problem.layers, problem.frontiers, strict=True):
        kept = {round(i * (len(frontier) - 1) / (each - 1)) for i in range(each)}
        found[layer.name] = [
            {
                "method": c.method,
                "rank": list(c.rank),
                "cost": c.cost[metric],
                "loss": c.loss,
                "form": c.form,
                "precision": c.precision,
            }
            for i, c in enumerate(frontier)
            if i in kept or c.label == chosen.get(layer.name)
        ]
    return {"metric": metric, "layers": found}


def _label(candidate: Candidate) -> str:
    return candidate.method if candidate.precision == SAME else f"{candidate.method} {candidate.precision}"


# --- the result --------------------------------------------------------------------------------------


def build_result(
    prepared: Prepared,
    outcome: SearchOutcome,
    *,
    metadata: SearchMetadata,
    settings: SearchSettings,
    progress: Progress = silent,
) -> Result:
    """Rebuild the chosen plan's model, count its cost, score it and assemble the record.

    This is the only place where test data is used in a search, once for each model.

    Args:
        prepared: The task with its candidates.
        outcome: What the search ended with.
        metadata: What was searched, for result.json.
        settings: The settings of the search.
        progress: Shows training and refinement.

    Raises:
        RankoptError: If the rebuilt model misses the budget.
        TaskError: If a score raises an error or is not a finite number.
    """
    outcome = outcome.with_asked_limits()
    plan = make_plan(prepared, outcome.problem, outcome.chosen.proposal)
    model, changes = _rebuild(prepared, outcome, settings, progress)
    achieved = _count(prepared, model, plan.cost, outcome.checks)
    warnings = _check_cost(prepared, outcome, model, planned=plan.cost, achieved=achieved)
    metadata = {**metadata, "warnings": [*metadata["warnings"], *warnings]}
    score = _score(prepared, outcome.chosen, model, changes)
    rebuilt = _Rebuilt(model, dataclasses.replace(plan, cost=achieved), changes, score)
    info = _assemble(prepared, outcome, metadata, settings, rebuilt)
    return Result(
        model,
        rebuilt.plan,
        outcome.problem.limits,
        info,
        tuple(outcome.trials),
        outcome.problem,
        prepared.curves,
        prepared.task.model,
        prepared.statistics.batches,
    )


@dataclass(frozen=True)
class _Rebuilt:
    """The chosen plan's model, and what was measured on it; plan: with the cost that was counted."""

    model: nn.Module
    plan: Plan
    changes: ChangeRecord
    score: ScoresEntry


def _rebuild(
    prepared: Prepared, outcome: SearchOutcome, settings: SearchSettings, progress: Progress
) -> tuple[nn.Module, ChangeRecord]:
    """The chosen plan's model, as it was trained in its trial, and refined if that was asked for."""
    problem, proposal = outcome.problem, outcome.chosen.proposal
    model = prepared.apply(problem, proposal)
    if settings.fidelities.steps:
        trained = None if outcome.kept is None else outcome.kept.restored(problem, proposal, model)
        model = _trained(prepared, problem, model, settings, progress) if trained is None else trained
    if not settings.refine:
        return model, {"refinement": None, "batch_norm": None}
    return _refine(prepared, outcome.problem, outcome.chosen, model, progress)


def _trained(
    prepared: Prepared, problem: Problem, model: nn.Module, settings: SearchSettings, progress: Progress
) -> nn.Module:
    """Train a model as in its trial, whose weights were not kept: it ran on another machine, say."""
    evaluator = Evaluator.of(prepared, problem, settings.fidelities)
    assert evaluator.training_data is not None
    return train_briefly(model, *evaluator.training_data, evaluator.steps, progress=progress)


def _refine(
    prepared: Prepared, problem: Problem, chosen: Trial, model: nn.Module, progress: Progress
) -> tuple[nn.Module, ChangeRecord]:
    """Refit the layers one after the other, then recalibrate batch norms; each is kept if the objective falls."""
    dense, batches = prepared.model, prepared.statistics.batches

    def refit(small: nn.Module) -> bool:
        candidates = problem.candidates(chosen.proposal)
        refine_layers(
            dense, small, problem.layers, candidates, prepared.statistics, batches, prepared.space.steps, progress
        )
        return True

    steps: dict[Literal["refinement", "batch_norm"], Callable[[nn.Module], bool]] = {
        "refinement": refit,
        "batch_norm": lambda small: recalibrate(dense, small, batches[0]),
    }
    changes: ChangeRecord = {"refinement": None, "batch_norm": None}
    objective = _measured(chosen.objective)
    for name, step in steps.items():
        with prepared.clock.stage(name):
            changed = copy.deepcopy(model)
            if not step(changed):
                continue
            after = _measured(call("the objective", prepared.objective, changed))
            kept = after < objective
            changes[name] = {"before": objective, "after": after, "kept": kept}
            if kept:
                model, objective = changed, after
    return model, changes


def _measured(objective: float | None) -> float:
    """An objective that cannot be missing: the chosen trial finished, and every task has an objective."""
    assert objective is not None
    return objective


def _count(prepared: Prepared, model: nn.Module, planned: Cost, checks: Checks) -> Cost:
    """The cost of the rebuilt model, counted independently of the plan; of latency and energy what the checks say."""
    task = prepared.task
    cost = count(model, task.example_input)
    cost = dataclasses.replace(cost, **{m: planned[m] for m in MEASURED})
    cost = dataclasses.replace(cost, **{check.limit.metric: check.measured.value for check in checks})
    if prepared.dense.memory:
        cost = dataclasses.replace(cost, **measured(model, task.example_input))
    return cost


def _check_cost(
    prepared: Prepared, outcome: SearchOutcome, model: nn.Module, planned: Cost, achieved: Cost
) -> list[str]:
    """Raises RankoptError if the rebuilt model misses a limit, or does not cost what the plan says.

    Returns:
        A warning, if it takes another way through its layers than the dense model, and keeps the limits all the same.
    """
    missed = [limit.metric for limit in outcome.problem.limits if achieved[limit.metric] > limit.target]
    if not missed and achieved == planned:  # without what Cost does not compare
        return []
    metrics = dict.fromkeys([*missed, *(m for m in ("params", "macs", "bytes") if achieved[m] != planned[m])])
    if [*metrics] == ["macs"] and _takes_another_way(prepared, outcome, model):
        said = (
            f"data choose the way through this model (its experts, say): the example takes {achieved.macs:,} MACs in "
            f"the compressed model, where {planned.macs:,} were planned for the way that it takes in the dense one"
        )
        if missed:
            raise BudgetError(f"{said}, which is beyond the budget: give a smaller one, or one without macs")
        return [said]
    costs = ", ".join(f"{achieved[m]:,} {m} where the plan says {planned[m]:,}" for m in metrics)
    layer = _differing_layer(prepared, outcome)
    raise RankoptError(
        f"the rebuilt model has {costs}: "
        + (
            f"layer {layer!r} is used in another way than by calling it, keep it dense (keep_dense)"
            if layer
            else "a bug in rankopt, please report it"
        )
    )


def _takes_another_way(prepared: Prepared, outcome: SearchOutcome, model: nn.Module) -> bool:
    """Whether the example reaches other layers in a model than in the dense one, or with other vectors."""
    names = [layer.name for layer in outcome.problem.layers]
    here = inputs_of(model, names, prepared.task.example_input)
    there = inputs_of(prepared.model, names, prepared.task.example_input)
    return any(shapes != there.get(name, shapes) for name, shapes in here.items())


def _differing_layer(prepared: Prepared, outcome: SearchOutcome) -> str | None:
    """The first layer whose replacement, alone in the model, does not cost what its candidate says."""
    problem, task = outcome.problem, prepared.task
    if prepared.network is not None:  # its layers are made of no factors that are kept
        return None
    for layer, candidate in zip(problem.layers, problem.candidates(outcome.chosen.proposal), strict=True):
        alone = apply(task.model, [layer], [candidate], prepared.factors)
        if count(alone, task.example_input) != prepared.dense - layer.cost + candidate.cost:
            return layer.name
    return None


def _score(prepared: Prepared, chosen: Trial, model: nn.Module, changes: ChangeRecord) -> ScoresEntry:
    """Validation and test scores of both models. The chosen trial has the validation score of an unchanged model."""
    task, validation = prepared.task, chosen.score
    with prepared.clock.stage("scoring"):
        dense = prepared.dense_score
        if any(change and change["kept"] for change in (changes["refinement"], changes["batch_norm"])):
            validation = call("the score", task.score, model)
    with prepared.clock.stage("test"):
        return {
            "dense": {"validation": dense, "test": call("the test score", task.test, task.model)},
            "compressed": {"validation": validation, "test": call("the test score", task.test, model)},
        }


def _score_warnings(task: Task, scores: ScoresEntry) -> list[str]:
    """What is odd about the validation scores, if anything is."""
    dense, small = scores["dense"]["validation"], scores["compressed"]["validation"]
    found = None if dense is None or small is None else misread_score(dense, small, task.examples)
    return [] if found is None else [found]


def _assemble(
    prepared: Prepared,
    outcome: SearchOutcome,
    metadata: SearchMetadata,
    settings: SearchSettings,
    rebuilt: _Rebuilt,
) -> ResultInfo:
    """The record of result.json."""
    task, problem, trials, chosen = prepared.task, outcome.problem, outcome.trials, outcome.chosen
    plan, dense, scores = rebuilt.plan, prepared.dense, with_intervals(task, rebuilt.score)
    times = time_forward(task.model, rebuilt.model, task.example_input)
    info: ResultInfo = {
        "task": metadata["task"],
        "strategy": metadata["strategy"],
        "seed": metadata["seed"],
        "options": metadata["options"],
        "notes": metadata["notes"],
        "warnings": [*metadata["warnings"], *_score_warnings(task, rebuilt.score)],
        "seconds": {k: round(v, 3) for k, v in prepared.clock.items()},
        "forward_passes": round(prepared.passes, 2),
        "family_seconds": {k: round(v, 3) for k, v in prepared.family_seconds.items()},
        "environment": environment(device_of(task.model)),
        "space": prepared.space.content(),
        "settings": settings.changed(),
        "effort": prepared.space.effort,
        "trials": _trials_entry(outcome),
        "budget": {cast(Metric, x.metric): _budget_entry(x, plan.cost, dense) for x in problem.limits},
        "cost": {"dense": _cost_entry(dense), "compressed": _cost_entry(plan.cost)},
        "optimality_gap": _gap(prepared, problem, chosen),
        "objective": {
            "best": _measured(chosen.objective),
            "dense": prepared.dense_objective,
            "predicted": chosen.predicted,
            "trial": chosen.number,
        },
        "fidelities": fidelity_rows(settings.fidelities, trials),
        "refinement": rebuilt.changes["refinement"],
        "batch_norm": rebuilt.changes["batch_norm"],
        "score": scores["score"],
        "examples": scores["examples"],
        "intervals": scores["intervals"],
        "proxy": proxy(trials),
        "front": Front.of(trials, metrics).rows if (metrics := searched_metrics(metadata["options"])) else [],
        "tie": tie(trials, chosen, task.examples),
        "milliseconds": times[0],
        "energy": of_models([task.model, rebuilt.model], task.example_input),
        "layers": [_layer_row(c, layer) for c, layer in zip(plan.choices, prepared.layers, strict=True)],
    }
    if len(times) > 1:
        info["batch_milliseconds"] = times[1]
    if problem.fitting:
        info["fitting"] = problem.fitting
    if "question" in metadata:
        info["question"] = metadata["question"]
    return cast(ResultInfo, {**info, **measured_entries(prepared, problem, outcome.checks)})


def _gap(prepared: Prepared, problem: Problem, chosen: Trial) -> float | None:
    """How far the plan's predicted loss is above the bound; what was trained has a problem of its own."""
    if prepared.network is not None:
        return None
    return relative_gap(problem.loss(chosen.proposal), allocate(problem).bound)


def _trials_entry(outcome: SearchOutcome) -> TrialsEntry:
    states = Counter(t.state for t in outcome.trials)
    return {
        "asked": outcome.asked,
        "finished": states["finished"],
        "failed": states["failed"],
        "stopped": states["stopped"],
        "distinct": len({t.proposal for t in outcome.trials}),
        "limit": outcome.limit,
        "outside": outcome.outside,
        "interrupted": outcome.interrupted,
    }


def _budget_entry(limit: Limit, achieved: Cost, dense: Cost) -> BudgetEntry:
    return {
        "requested": limit.requested,
        "target": limit.target,
        "achieved": achieved[limit.metric],
        "dense": dense[limit.metric],
    }


def _cost_entry(cost: Cost) -> CostEntry:
    return {
        "params": cost.params,
        "macs": cost.macs,
        "bytes": cost.bytes,
        "latency": cost.latency,
        "memory": cost.memory,
        "disk": cost.disk,
        "energy": cost.energy,
    }


def _layer_row(choice: Choice, layer: Layer) -> LayerRow:
    return {
        "name": choice.name,
        "kind": choice.kind,
        "shape": list(choice.shape),
        "method": choice.method,
        "rank": list(choice.rank),
        "params": choice.params,
        "macs": choice.macs,
        "error": choice.error,
        "reason": choice.reason,
        "form": choice.form,
        "precision": choice.precision,
        "dense_params": layer.cost.params,
        "dense_macs": layer.cost.macs,
    }


def with_intervals(task: Task, score: ScoresEntry) -> ScoreRecord:
    """The entries of result.json about scores.

    Args:
        task: Says how many examples a score averages over.
        score: Scores of both models.
    """
    examples: ExamplesEntry = {"validation": task.examples, "test": task.test_examples}

    def intervals(of: ScoreEntry) -> IntervalEntry:
        found = {part: wilson(of[part], examples[part]) for part in PARTS}
        validation, test = (None if found[part] is None else list(found[part] or ()) for part in PARTS)
        return {"validation": validation, "test": test}

    both: IntervalsEntry = {"dense": intervals(score["dense"]), "compressed": intervals(score["compressed"])}
    return {"score": score, "examples": examples, "intervals": both}


def as_fast_entry(found: Result) -> AsFastEntry:
    """The entry of result.json about a second result that is not slower than dense.

    Args:
        found: The second result.
    """
    checked, limit = found.info["latency"], found.info["budget"]["latency"]
    low, high = checked["low"] / limit["dense"], checked["high"] / limit["dense"]
    return {
        "conditions": checked["conditions"],
        "run": AS_FAST,
        "cost": found.info["cost"]["compressed"],
        "score": found.info["score"]["compressed"],
        "ratio": limit["achieved"] / limit["dense"],
        "interval": [low, high],
        "reconstructed": sum(row.get("form") == RECONSTRUCTED for row in found.info["layers"]),
    }


def set_scores(info: ResultInfo, task: Task, score: ScoresEntry) -> None:
    """Replace the entries of a record about scores.

    Args:
        info: The record; changed in place.
        task: Says how many examples a score averages over.
        score: Scores of both models.
    """
    record = with_intervals(task, score)
    info["score"], info["examples"], info["intervals"] = record["score"], record["examples"], record["intervals"]


def time_forward(dense: nn.Module, compressed: nn.Module, example_input: Any) -> list[MillisecondsEntry]:
    """Time forward passes of both models, in turns: of one example, and of a batch that fills the device.

    Args:
        dense: The dense model.
        compressed: The compressed model.
        example_input: The input; of a batch only the first example is used.

    Returns:
        Median milliseconds, and the interval of the median of their ratios, as of `forward_times`.
    """
    example = to_device(one_example(dense, example_input), dense)
    return [
        {
            "examples": found.examples,
            "dense": found.milliseconds[0],
            "compressed": found.milliseconds[1],
            "ratio": [*found.ratios[1]],
            "repeats": found.rounds,
            "threads": 1,
        }
        for found in forward_times([dense, compressed], example)
    ]
