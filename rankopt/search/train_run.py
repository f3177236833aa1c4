"""Training the model of a run folder; the result is a folder of the same kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

from rankopt.core.errors import StudyError, TaskError
from rankopt.core.progress import Progress, silent
from rankopt.core.records import Plan, Task
from rankopt.core.result_record import ScoreEntry, TrainingSource
from rankopt.core.run_folder import REPORT, RESULT, folder_lock, open_folder, read_result, report_damage
from rankopt.decompositions.plan import load, read_plan
from rankopt.model.objective import call
from rankopt.search.result import Result, set_scores
from rankopt.training import checkpoint
from rankopt.training.batch_norm import batch_norms
from rankopt.training.finetune import Trained, finetune
from rankopt.training.initialization import from_scratch as untrained
from rankopt.training.losses import has_labels
from rankopt.training.recipe import Recipe

FROM_SCRATCH = Recipe(rate=0.1, distill=0.0, weight_decay=5e-4)
"""Default recipe of a training from scratch."""


def train_run(  # noqa: PLR0913  # all but four are optional and by keyword
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
    trainer: Callable[..., Trained] = finetune,
) -> Result:
    """Train the model of a run folder, evaluate its test score once, and write plan, weights and result.

    Args:
        run: The run folder of a search.
        task: The task of that search.
        recipe: How to train.
        out: Folder for the trained model and for checkpoints.
        teacher: A task whose model is distilled from; None for the dense model.
        from_scratch: Whether to draw the plan's factors at random instead of taking the search's.
        resume: Whether to continue from a checkpoint in `out`, or to read a finished training that has no report yet.
        stop: Asked after every step; training pauses, with a checkpoint, when it returns True.
        progress: Shows epochs.
        note: Called with a text to show beside the progress.
        trainer: Trains: `finetune`, or what `runners.trainer_of` returns.

    Returns:
        The result with the trained model.

    Raises:
        StudyError: If `out` is not empty and not resumed, or another process trains there.
        TaskError: If the task lacks what the training needs.
        KeyboardInterrupt: If the training was stopped.
    """
    plan, _ = read_plan(run)
    with report_damage(run):
        info = read_result(run)
        _ = info["score"]["dense"], info["score"]["compressed"]["test"]  # read below, after the training
    model: nn.Module = untrained_network(task, plan, recipe.seed) if from_scratch else load(task.model, run)
    if (out / RESULT).is_file():
        if resume and not (out / REPORT).is_file():  # stopped after all but the report was written
            (out / checkpoint.FILE).unlink(missing_ok=True)
            return Result(load(task.model, out), read_plan(out)[0], (), read_result(out))
        raise StudyError(f"{out} holds a training that is finished: choose another --out")
    open_folder(out, resume, checkpoint.FILE)
    learnt_from = None if teacher is None else teacher.model
    source: TrainingSource = {
        "run": ".." if out.parent == run else str(run),  # both may be moved
        "from_scratch": from_scratch,
        "teacher": None if teacher is None else teacher.name,
    }
    with folder_lock(out):
        trained = trainer(
            model, task, recipe, teacher=learnt_from, folder=out, resume=resume, stop=stop, progress=progress, note=note
        )
        result = with_training(Result(model, plan, (), info), trained, task, source)
        result.save(out)
        (out / checkpoint.FILE).unlink(missing_ok=True)
    return result


def untrained_network(task: Task, plan: Plan, seed: int) -> nn.Module:
    """Build a plan's network with random factors.

    Args:
        task: The task with the dense model.
        plan: The plan.
        seed: Seed of the factors.

    Raises:
        TaskError: If the task has no train and loss, without which such a network cannot be trained.
    """
    if not has_labels(task):
        raise TaskError("the task has no train and loss: give both, since nothing can be learnt from scratch without")
    return untrained(task.model, plan, seed)


def with_training(before: Result, trained: Trained, task: Task, source: TrainingSource) -> Result:
    """Replace a result's model by the trained one, and its scores; test data is used once.

    Args:
        before: The result of the search.
        trained: The trained model.
        task: The task.
        source: Where the training started.
    """
    info, model = before.info, trained.model
    test_before = None if source["from_scratch"] else info["score"]["compressed"]["test"]
    score: ScoreEntry = {
        "validation": call("the score", task.score, model),
        "test": call("the test score", task.test, model),
    }
    set_scores(info, task, {"dense": info["score"]["dense"], "compressed": score})
    # The search compared the chosen plan with others as untrained models.
    info["training"] = {
        **trained.info,
        **source,
        "test_before": test_before,
        "batch_norms": len(batch_norms(model)),
    }
    info["tie"] = None
    return dataclasses.replace(before, model=model, info=info)
