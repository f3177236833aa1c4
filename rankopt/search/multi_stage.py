"""Multi-stage compression (Gusak 2019, MUSCO): a part of the way to the budget, a short training, estimate again.

Each round searches a plan for a budget between dense and the goal (geometric steps), trains that plan's model for
a little, and multiplies its factors out again: the next round calibrates, fits and measures on weights that have
already adapted. The objective stays the divergence from the model that was given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.budget import Limit, parse_budget
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Cost, Task
from rankopt.core.run_folder import RESULT, read_result
from rankopt.decompositions.plan import load, multiplied_out
from rankopt.model.counting import count
from rankopt.model.forward import CALIBRATION_EXAMPLES, collect_batches
from rankopt.model.objective import Divergence, call
from rankopt.search.compress import run_search
from rankopt.search.evaluator import Settings
from rankopt.search.loop import Runner, search
from rankopt.search.result import Result, with_intervals
from rankopt.training.loop import search_batches, train_briefly


def run_multi_stage(
    task: Task,
    space: SearchSpace,
    budget: Mapping[str, Any] | Sequence[str],
    settings: Settings,
    out: Path | None = None,
    cache: str | Path | None = None,
    runner: Runner = search,
    progress: Progress = silent,
    workers: int | None = None,
) -> Result:
    """`space.rounds` searches with `space.round_steps` steps of training after each; result.json lists them.

    Earlier rounds are kept in out/round-1, ...; with settings.resume finished ones are not repeated. Training uses
    the task's train and loss where it has both, else distillation from the dense model on the calibration batches.
    Raises BudgetError, before anything is fitted, for a budget that cannot be met.
    """
    dense = count(task.model, task.example_input)
    limits = parse_budget(budget, dense)
    batches = collect_batches(task.calibration, CALIBRATION_EXAMPLES)
    objective = task.objective or Divergence(task.model, batches)
    model, history = task.model, []
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
        prepared = prepare(stage, space, cache, progress, workers, budget=goal)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        again = dataclasses.replace(settings, resume=bool(folder and (folder / "study.db").is_file()))
        result = run_search(prepared, prepared.problem(goal), again, folder, runner, progress)
        if result.info["trials"]["interrupted"]:
            raise KeyboardInterrupt
        before = result.info["objective"]["best"]
        result.model, after = _trained(
            task, result.model, batches, objective, space.round_steps, settings.seed, progress
        )
        history.append({"round": number, "budget": {x.metric: x.target for x in result.limits}})
        history[-1] |= {"objective": before, "objective_after_training": after}
        result.info["rounds"] = history
        if last:
            result.info |= with_intervals(task, _scores(task, result.model))
        if folder:
            result.save(folder)
        model = multiplied_out(task.model, result.model)
    return result


def _trained_already(folder: Path) -> bool:
    """Whether a round's result is the one from after its training: a search ends with a result of its own."""
    return (folder / RESULT).is_file() and "rounds" in read_result(folder)


def _on_the_way(limit: Limit, dense: Cost, share: float) -> int:
    """The budget at this share of the way, in logarithms, from dense to the goal."""
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
    """A copy after a short training, and its objective; the model as it was where training does not help."""
    before = call("the objective", objective, small)
    if steps == 0:
        return small, before
    data, loss = search_batches(task, batches)
    changed = train_briefly(small, data, loss, steps, seed, progress)
    after = call("the objective", objective, changed)
    better = after is not None and before is not None and after < before
    return (changed, after) if better else (small, before)


def _scores(task: Task, small: nn.Module) -> dict[str, Any]:
    functions = {"validation": ("the score", task.score), "test": ("the test score", task.test)}
    models = {"dense": task.model, "compressed": small}
    return {who: {part: call(*f, model) for part, f in functions.items()} for who, model in models.items()}
