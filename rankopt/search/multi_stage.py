"""Multi-stage compression (MUSCO, Gusak et al. 2019): compress part of the way, train briefly, and repeat.

Each round searches a plan for a budget on the way from dense to the goal (in geometric steps), trains the plan's model
briefly and multiplies its factors out. So the next round calibrates, fits and measures on weights that have adapted.
The objective remains the divergence from the original model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.candidates.calibration import WithinMemory
from rankopt.candidates.memory import measured
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.budget import Limit, limited_metrics, parse_budget
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Cost, Task
from rankopt.core.result_record import RoundEntry, ScoreEntry, ScoresEntry
from rankopt.core.run_folder import RESULT, read_result
from rankopt.decompositions.plan import load, multiplied_out
from rankopt.model.counting import count
from rankopt.model.inputs import CALIBRATION_EXAMPLES, collect_batches
from rankopt.model.objective import Divergence, call
from rankopt.search.compress import run_search
from rankopt.search.loop import Runner, search
from rankopt.search.result import Result, set_scores
from rankopt.search.runners import pool_of
from rankopt.search.settings import SearchSettings
from rankopt.training.loop import search_batches, train_briefly


def run_multi_stage(  # noqa: PLR0913  # a search's arguments and its preparation's
    task: Task,
    space: SearchSpace,
    budget: Mapping[str, Any] | Sequence[str],
    settings: SearchSettings,
    out: Path | None = None,
    cache: str | Path | None = None,
    runner: Runner = search,
    progress: Progress = silent,
    workers: int | None = None,
) -> Result:
    """Compress in `space.rounds` rounds, each a search and `space.round_steps` steps of training.

    Training uses the task's `train` and `loss` if it has both, otherwise distillation from the dense model on the
    calibration batches.

    Args:
        task: The task.
        space: The search space, with the number of rounds.
        budget: The goal, as `parse_budget` takes it.
        settings: How to search. With `resume`, finished rounds are not repeated.
        out: Run folder; earlier rounds are kept in its folders round-1, ...
        cache: Folder for fitted candidates; None for the default one.
        runner: Evaluates plans.
        progress: Shows long work.
        workers: Processes that fit candidates; None for the default.

    Returns:
        The result of the last round; its `info["rounds"]` lists the rounds.

    Raises:
        BudgetError: If the budget cannot be met.
        KeyboardInterrupt: If a search was stopped.
    """
    dense = count(task.model, task.example_input)
    if {"memory", "disk"} & limited_metrics(budget):
        dense = dataclasses.replace(dense, **measured(task.model, task.example_input))
    limits = parse_budget(budget, dense)
    batches = collect_batches(task.model, WithinMemory(task.calibration), CALIBRATION_EXAMPLES)
    objective = task.objective or Divergence(task.model, batches)
    model = task.model
    history: list[RoundEntry] = []
    for number in range(1, space.rounds + 1):
        last = number == space.rounds
        folder = None if out is None else out if last else out / f"round-{number}"
        if folder and not last and settings.resume and _trained_already(folder):
            model = multiplied_out(task.model, load(task.model, folder))
            continue
        goal = budget if last else {x.metric: _on_the_way(x, dense, number / space.rounds) for x in limits}
        stage = dataclasses.replace(
            task, model=model, calibration=batches, objective=objective, score=task.score if last else None, test=None
        )
        prepared = prepare(stage, space, cache, progress, workers or pool_of(runner), budget=goal)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        round_settings = dataclasses.replace(settings, resume=bool(folder and (folder / "study.db").is_file()))
        result = run_search(prepared, prepared.problem(goal), round_settings, folder, runner, progress)
        if result.info["trials"]["interrupted"]:
            raise KeyboardInterrupt
        before = result.info["objective"]["best"]
        result.model, after = _trained(
            task, result.model, batches, objective, space.round_steps, settings.seed, progress
        )
        history.append(
            {
                "round": number,
                "budget": {x.metric: x.target for x in result.limits},
                "objective": before,
                "objective_after_training": after,
            }
        )
        result.info["rounds"] = history
        if last:
            set_scores(result.info, task, _scores(task, result.model))
        if folder:
            result.save(folder)
        model = multiplied_out(task.model, result.model)
    result.dense = task.model
    return result


def _trained_already(folder: Path) -> bool:
    """Whether a round's folder holds the result of its training, and not only that of its search."""
    return (folder / RESULT).is_file() and "rounds" in read_result(folder)


def _on_the_way(limit: Limit, dense: Cost, share: float) -> int:
    """The budget at a share of the logarithmic way from dense to the goal."""
    whole = dense[limit.metric]
    return max(limit.target, math.floor(whole * (limit.target / whole) ** share))


def _trained(
    task: Task,
    small: nn.Module,
    batches: Sequence[Any],
    objective: Callable[[nn.Module], float],
    steps: int,
    seed: int,
    progress: Progress,
) -> tuple[nn.Module, float | None]:
    """Train a copy briefly. Returns it with its objective, or the model as it was if training does not help."""
    before = call("the objective", objective, small)
    if steps == 0:
        return small, before
    data, loss = search_batches(task, batches)
    changed = train_briefly(small, data, loss, steps, seed, progress)
    after = call("the objective", objective, changed)
    better = after is not None and before is not None and after < before
    return (changed, after) if better else (small, before)


def _scores(task: Task, small: nn.Module) -> ScoresEntry:
    """Validation and test scores of the dense and the compressed model."""

    def of(model: nn.Module) -> ScoreEntry:
        return {
            "validation": call("the score", task.score, model),
            "test": call("the test score", task.test, model),
        }

    return {"dense": of(task.model), "compressed": of(small)}
