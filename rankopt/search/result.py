"""What a search comes to: the chosen plan's model rebuilt, counted, polished and scored."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankopt.candidates.memory import measured
from rankopt.candidates.pareto import dense_candidate
from rankopt.candidates.prepare import Prepared
from rankopt.core.budget import Limit
from rankopt.core.errors import RankoptError
from rankopt.core.files import write_beside
from rankopt.core.problem import Problem
from rankopt.core.progress import Progress, silent
from rankopt.core.records import SAME, Candidate, Choice, Layer, Plan, Proposal, Task, Trial
from rankopt.core.run_folder import RESULT
from rankopt.core.statistics import proxy, tie, wilson
from rankopt.core.timing import in_turn
from rankopt.decompositions.plan import save
from rankopt.model.counting import count
from rankopt.model.energy import of_models
from rankopt.model.forward import inference, one_example, run, to_device
from rankopt.model.objective import call
from rankopt.search.evaluator import Evaluator, Settings, fidelity_rows
from rankopt.search.latency_check import Check, latency_entry, latency_limit, with_target
from rankopt.search.loop import front
from rankopt.strategies.allocation import allocate, relative_gap
from rankopt.training.batch_norm import recalibrate
from rankopt.training.loop import train_briefly
from rankopt.training.refine import refine as refine_layers

log = logging.getLogger(__name__)


@dataclass
class Result:
    """What a compression gives: `model` is an ordinary nn.Module."""

    model: nn.Module
    plan: Plan
    limits: tuple[Limit, ...]
    info: dict[str, Any]  # the content of result.json

    def summary(self) -> str:
        """The result as text, at most 100 columns wide."""
        from rankopt.search.summary import summary

        return summary(self.info)

    def save(self, folder: str | Path) -> None:
        """Write plan.json, model.safetensors and result.json."""
        save(folder, self.model, self.plan)
        write_beside(Path(folder) / RESULT, lambda p: p.write_text(json.dumps(self.info, indent=1)))


def make_plan(prepared: Prepared, problem: Problem, proposal: Proposal) -> Plan:
    """Every layer's decision with its reason."""
    chosen = {layer.name: (f, i) for layer, f, i in zip(problem.layers, problem.frontiers, proposal, strict=True)}
    choices = []
    for layer in prepared.layers:
        if layer.name in chosen:
            candidates, at = chosen[layer.name]
            candidate, reason = candidates[at], _why(candidates, at, problem.limits)
        else:
            candidate, reason = dense_candidate(layer), layer.reason or ""
        choices.append(
            Choice(
                layer.name,
                layer.kind,
                layer.own_shape,
                candidate.method,
                candidate.rank,
                candidate.cost.params,
                candidate.cost.macs,
                candidate.error,
                reason,
                candidate.form,
                candidate.precision,
            )
        )
    limited = prepared.latencies is not None and latency_limit(problem) is not None
    where = str(prepared.latencies.conditions) if prepared.latencies and limited else ""
    return Plan(tuple(choices), problem.cost(proposal), prepared.dense, where)


def _why(candidates: Sequence[Candidate], at: int, limits: Sequence[Limit]) -> str:
    """Why a layer got this candidate: what it gives up for what it saves, and the step beside it."""
    metric = limits[0].metric
    chosen, dense = candidates[at], candidates[-1]

    def share(candidate: Candidate) -> float:
        return candidate.cost[metric] / max(dense.cost[metric], 1)

    if at == 0 and chosen.unchanged:
        return "dense: no candidate is cheaper than the layer itself"
    if chosen.unchanged:
        below = candidates[at - 1]
        return (
            f"dense: the mildest candidate ({_kind(below)}) would save {1 - share(below):.0%} "
            f"and raise the objective by {below.loss:.2g}"
        )
    families = sorted({_kind(c) for c in candidates if not c.unchanged})
    text = (
        f"keeps {share(chosen):.0%} of its {metric} for a predicted rise of {chosen.loss:.2g}; "
        f"best of {len(candidates)} on its frontier ({', '.join(families)})"
    )
    return text if at == 0 else f"{text}; the next cheaper would cost {candidates[at - 1].loss:.2g}"


def _kind(candidate: Candidate) -> str:
    return candidate.method if candidate.precision == SAME else f"{candidate.method} {candidate.precision}"


def build_result(
    prepared: Prepared,
    problem: Problem,
    trials: Sequence[Trial],
    chosen: Trial,
    about: Mapping[str, Any],
    asked: int,
    settings: Settings,
    kept: Check | None = None,
    progress: Progress = silent,
) -> Result:
    """Rebuild the chosen plan's model, count its cost again, score it (test data once) and put it all together.

    kept: the check of a latency budget; problem's own limit may have been moved since.
    """
    task, clock = prepared.task, prepared.clock
    if kept:
        problem = dataclasses.replace(problem, limits=with_target(problem.limits, kept.limit))
    plan = make_plan(prepared, problem, chosen.proposal)
    model = prepared.apply(problem, chosen.proposal)
    evaluator = Evaluator.of(prepared, problem, settings.ladder)
    if evaluator.training_data:  # again, as in the trial: trials keep no weights
        model = train_briefly(model, *evaluator.training_data, evaluator.steps, progress=progress)
    model, changes = _postprocess(prepared, problem, chosen, model, settings, progress)
    latency = kept.measured.latency if kept else plan.cost.latency
    achieved = dataclasses.replace(count(model, task.example_input), latency=latency)
    if prepared.dense.memory:
        achieved = dataclasses.replace(achieved, **measured(model, task.example_input))
    for limit in problem.limits:
        if achieved[limit.metric] > limit.target:
            raise RankoptError(
                f"the rebuilt model has {limit.metric} {achieved[limit.metric]:,}, above the budget of "
                f"{limit.target:,} (the plan says {plan.cost[limit.metric]:,}): a bug in rankopt, please report it"
            )
    if achieved != plan.cost:  # latency does not count here: it is measured
        log.warning(
            "the rebuilt model costs %s, planned was %s: is a layer held outside the module tree?", achieved, plan.cost
        )
    plan = dataclasses.replace(plan, cost=achieved)
    with clock.stage("scoring"):
        score = {
            "dense": {"validation": call("the score", task.score, task.model), "test": None},
            "compressed": {"validation": chosen.score, "test": None},
        }
        if any(change and change["kept"] for change in changes.values()):
            score["compressed"]["validation"] = call("the score", task.score, model)
    with clock.stage("test"):
        score["dense"]["test"] = call("the test score", task.test, task.model)
        score["compressed"]["test"] = call("the test score", task.test, model)
    bound = allocate(problem).bound
    info = {
        **about,
        "seconds": {k: round(v, 3) for k, v in clock.items()},
        "family_seconds": {k: round(v, 3) for k, v in prepared.family_seconds.items()},
        "trials": {
            "asked": asked,
            "finished": sum(t.state == "finished" for t in trials),
            "failed": sum(t.state == "failed" for t in trials),
            "stopped": sum(t.state == "stopped" for t in trials),
            "distinct": len({t.proposal for t in trials}),
        },
        "budget": {
            x.metric: {
                "requested": x.requested,
                "target": x.target,
                "achieved": achieved[x.metric],
                "dense": prepared.dense[x.metric],
            }
            for x in problem.limits
        },
        "cost": {"dense": dataclasses.asdict(prepared.dense), "compressed": dataclasses.asdict(achieved)},
        "optimality_gap": relative_gap(problem.loss(chosen.proposal), bound),
        "objective": {"best": chosen.objective, "predicted": chosen.predicted, "trial": chosen.number},
        "fidelities": fidelity_rows(settings.ladder, trials),
        **changes,
        **with_intervals(task, score),
        "proxy": proxy(trials),
        "front": front_rows(trials, settings.options.get("also")),
        "tie": tie(trials, chosen, task.examples),
        "milliseconds": time_forward([task.model, model], task.example_input),
        "energy": of_models([task.model, model], task.example_input),
        **latency_entry(prepared, problem, kept),
        "layers": [_layer_row(c, layer) for c, layer in zip(plan.choices, prepared.layers, strict=True)],
    }
    return Result(model, plan, problem.limits, info)


def with_intervals(task: Task, score: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """The entries of result.json about scores, {"dense": {"validation": ..., "test": ...}, "compressed": ...}."""
    examples = {"validation": task.examples, "test": task.test_examples}
    found = {k: {part: wilson(v, examples[part]) for part, v in s.items()} for k, s in score.items()}
    intervals = {k: {part: i and list(i) for part, i in s.items()} for k, s in found.items()}
    return {"score": score, "examples": examples, "intervals": intervals}


def front_rows(trials: Sequence[Trial], metric: str | None) -> list[dict[str, Any]]:
    """The front of a search with a second objective, for result.json."""
    if not metric:
        return []
    return [{"trial": t.number, "objective": t.objective, metric: t.cost[metric]} for t in front(trials, metric)]


def _layer_row(choice: Choice, layer: Layer) -> dict[str, Any]:
    """A layer's entry in result.json: the plan's choice, and what the layer costs dense."""
    row = {**dataclasses.asdict(choice), "rank": list(choice.rank), "shape": list(choice.shape)}
    return {**row, "dense_params": layer.cost.params, "dense_macs": layer.cost.macs}


Change = dict[str, float | bool | None]


def _postprocess(
    prepared: Prepared, problem: Problem, chosen: Trial, model: nn.Module, settings: Settings, progress: Progress
) -> tuple[nn.Module, dict[str, Change | None]]:
    """What depends on the chosen plan: refinement if asked for, then batch norms. Each is kept if it helps."""
    dense, batches = prepared.model, prepared.statistics.batches

    def refined(small: nn.Module) -> bool:
        candidates = problem.candidates(chosen.proposal)
        refine_layers(
            dense, small, problem.layers, candidates, prepared.statistics, batches, prepared.space.steps, progress
        )
        return True

    steps: dict[str, Callable[[nn.Module], bool]] = {
        "refinement": refined,
        "batch_norm": lambda small: recalibrate(dense, small, batches[0]),
    }
    changes: dict[str, Change | None] = dict.fromkeys(steps)
    if not settings.refine:
        return model, changes
    objective = chosen.objective
    for name, step in steps.items():
        with prepared.clock.stage(name):
            changed = copy.deepcopy(model)
            if not step(changed):
                continue
            after = call("the objective", prepared.objective, changed)
            kept = after is not None and objective is not None and after < objective
            changes[name] = {"before": objective, "after": after, "kept": kept}
            if kept:
                model, objective = changed, after
    return model, changes


def time_forward(models: Sequence[nn.Module], example_input: Any, seconds: float = 1.0) -> dict[str, Any]:
    """Median milliseconds of a forward pass of one example, dense and compressed interleaved, on one thread."""
    x = to_device(one_example(example_input), models[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads make small operations slower where others use the cores too
    try:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(inference(model, fused=True))
            times = in_turn([partial(run, model, x) for model in models], 10, seconds)
    finally:
        torch.set_num_threads(threads)
    dense, compressed = (sorted(t)[len(t) // 2] / 1e6 for t in times)
    return {"dense": dense, "compressed": compressed, "repeats": len(times[0]), "threads": 1}
