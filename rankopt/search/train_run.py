"""Training what a search found: a run folder in, a folder of the same kind with the trained model out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.core.errors import StudyError, TaskError
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Plan, Task
from rankopt.core.run_folder import RESULT, open_folder, read_result, report_damage
from rankopt.decompositions.plan import load, read_plan
from rankopt.model.objective import call
from rankopt.search.result import Result, with_intervals
from rankopt.training import checkpoint
from rankopt.training.finetune import Trained, finetune
from rankopt.training.initialization import from_scratch as untrained
from rankopt.training.losses import has_labels
from rankopt.training.recipe import Recipe

FROM_SCRATCH = Recipe(rate=0.1, distill=0.0, weight_decay=5e-4)
"""What is usual where nothing is known yet."""


def train_run(
    run: Path,
    task: Task,
    recipe: Recipe,
    out: Path,
    *,
    teacher: Task | None = None,
    from_scratch: bool = False,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
) -> Result:
    """Train the model of a run folder, read its test score once, and write plan, weights and result into `out`.

    from_scratch: the plan's network, its factors drawn anew. teacher: a task whose model's predictions are learnt
    instead of the dense model's. Raises StudyError if `out` holds something and is not resumed, or if another
    process trains there.
    """
    from rankopt.core.run_folder import folder_lock

    plan, _ = read_plan(run)
    with report_damage(run):
        info = {**read_result(run)}
        _ = info["score"]["dense"], info["score"]["compressed"]["test"]  # read below, after the training
    model: nn.Module = untrained_network(task, plan, recipe.seed) if from_scratch else load(task.model, run)
    if (out / RESULT).is_file():
        raise StudyError(f"{out} holds a training that is finished: choose another --out")
    open_folder(out, resume, checkpoint.FILE)
    learnt_from = None if teacher is None else teacher.model
    about = {"run": str(run), "from_scratch": from_scratch, "teacher": None if teacher is None else teacher.name}
    with folder_lock(out):
        trained = finetune(
            model, task, recipe, teacher=learnt_from, folder=out, resume=resume, stop=stop, progress=progress, note=note
        )
        result = with_training(Result(model, plan, (), info), trained, task, about)
        result.save(out)
        (out / checkpoint.FILE).unlink(missing_ok=True)
    return result


def untrained_network(task: Task, plan: Plan, seed: int) -> nn.Module:
    """The plan's network, untrained. Raises TaskError where there is nothing to learn from."""
    if not has_labels(task):
        raise TaskError("the task has no train and loss: give both, since nothing can be learnt from scratch without")
    return untrained(task.model, plan, seed)


def with_training(before: Result, trained: Trained, task: Task, about: Mapping[str, Any]) -> Result:
    """The result with its model trained and scored anew, test data once. about: run, from_scratch and teacher."""
    info, model = before.info, trained.model
    test_before = None if about["from_scratch"] else info["score"]["compressed"]["test"]
    score = {"validation": call("the score", task.score, model), "test": call("the test score", task.test, model)}
    info |= with_intervals(task, {"dense": info["score"]["dense"], "compressed": score})
    # What the search said of the chosen plan beside others was of untrained models.
    info |= {"training": {**trained.info, **about, "test_before": test_before}, "tie": None}
    return dataclasses.replace(before, model=model, info=info)
