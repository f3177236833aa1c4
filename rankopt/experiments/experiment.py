"""One search with everything that it takes, training included: what hyperparameters and cases change."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import write_beside
from rankopt.core.progress import Display, StopCondition, graceful_interrupt
from rankopt.core.records import METRICS, Task
from rankopt.core.run_folder import RESULT, open_folder
from rankopt.experiments.tasks import load_task
from rankopt.model.objective import call
from rankopt.search.compress import run_search
from rankopt.search.evaluator import FULL_FIDELITY, FidelitySchedule, Settings
from rankopt.search.loop import Runner
from rankopt.search.result import Result
from rankopt.search.train_run import train_run, untrained_network, with_training
from rankopt.strategies.registry import read_options, strategy_options
from rankopt.training.finetune import finetune
from rankopt.training.recipe import Recipe

NO_TRAINING = Recipe(epochs=0)


TABLES = ("budget", "options", "space", "training")  # of settings that hyperparameters may change


TRAINED = "trained"  # the folder of the trained model, in a run folder


EXPERIMENT_FILE = "request.json"  # what was asked, beside it


@dataclass(frozen=True)
class Experiment:
    """One search, with everything that it takes but the task. Fields as in `Settings` and the command line.

    from_scratch: the plan is trained on an untrained network. teacher: the name of a task whose model is learnt from.
    """

    budget: Mapping[str, Any]
    strategy: str = "knapsack"
    options: Mapping[str, Any] = field(default_factory=dict)
    space: SearchSpace = field(default_factory=SearchSpace)
    trials: int | None = None
    seed: int = 0
    refine: bool = False
    ladder: FidelitySchedule = FULL_FIDELITY
    training: Recipe = NO_TRAINING
    from_scratch: bool = False
    teacher: str = ""

    def __post_init__(self) -> None:
        if (self.from_scratch or self.teacher) and not self.training.epochs:
            raise RankoptError("from_scratch and teacher need a training: give epochs")

    def known(self) -> dict[str, Any]:
        """The names that hyperparameters may have, with what they are without one."""
        space = {f.name: getattr(self.space, f.name) for f in dataclasses.fields(SearchSpace)}
        tables = {
            "budget": {m: self.budget.get(m, 1.0) for m in METRICS},
            "options": {**strategy_options(self.strategy), **self.options},
            "space": {k: v for k, v in space.items() if k not in ("name", "description", "rounds", "round_steps")},
            "training": {k: v for k, v in dataclasses.asdict(self.training).items() if k != "seed"},
        }
        return {f"{table}.{k}": v for table, values in tables.items() for k, v in values.items()}

    def changed(self, values: Mapping[str, Any]) -> Experiment:
        """With hyperparameters set. Raises RankoptError for a value that cannot be."""
        parts: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
        for name, value in values.items():
            table, _, key = name.partition(".")
            parts[table][key] = tuple(value) if isinstance(value, list) else value
        try:
            return dataclasses.replace(
                self,
                budget={**self.budget, **parts["budget"]},
                options=read_options(self.strategy, {**self.options, **parts["options"]}),
                space=dataclasses.replace(self.space, **parts["space"]),
                training=dataclasses.replace(self.training, **parts["training"]),
            )
        except TypeError as error:
            raise RankoptError(f"{', '.join(f'{k}={v}' for k, v in values.items())}: {error}") from error

    def described(self, task: str | None) -> dict[str, Any]:
        """What it asks for of a task, as JSON gives it back; of tasks the file's name, wherever it lies."""
        asked = {"task": task and _without_folder(task), **dataclasses.asdict(self)}
        return json.loads(json.dumps({**asked, "teacher": _without_folder(self.teacher)}, default=str))

    @property
    def settings(self) -> Settings:
        """Those of its search."""
        return Settings(self.strategy, self.trials, self.seed, False, self.refine, self.options, self.ladder)

    @property
    def recipe(self) -> Recipe:
        """That of its training."""
        return dataclasses.replace(self.training, seed=self.seed)


def _without_folder(task: str) -> str:
    file, colon, function = task.rpartition(":")
    return Path(file).name + colon + function


def run_experiment(request: Experiment, prepared: Prepared, runner: Runner) -> Result:
    """Search, then train what was found; nothing is kept on disk."""
    result = run_search(prepared, prepared.problem(request.budget), request.settings, runner=runner)
    if not request.training.trains or result.info["trials"]["interrupted"]:
        return result
    model = untrained_network(prepared.task, result.plan, request.seed) if request.from_scratch else result.model
    teacher = _teacher(request.teacher)
    about = {"run": "the search", "from_scratch": request.from_scratch, "teacher": request.teacher or None}
    trained = finetune(model, prepared.task, request.recipe, teacher=None if teacher is None else teacher.model)
    result = with_training(result, trained, prepared.task, about)
    result.info["objective"] |= {"best": call("the objective", prepared.objective, result.model)}
    return result


@functools.cache
def _teacher(name: str) -> Task | None:
    """Loaded once: each search of a study learns from the same."""
    return load_task(name) if name else None


def run_in_folder(
    request: Experiment,
    task: Task,
    out: Path,
    runner: Runner,
    cache: Path | None,
    patience: StopCondition,
    display: Display,
) -> Path | None:
    """Search in a run folder, or go on with it, then train what was found in the folder `trained` in it.

    Returns the folder that holds the result; None if it was stopped before there was one: the same call goes on, and
    repeats nothing that is finished. The runner is what stops a search.
    """
    trained, settings_file = out / TRAINED, out / EXPERIMENT_FILE
    about = json.dumps(request.described(task.name), indent=1)
    if not trained.is_dir():
        resume = out.is_dir() and any(out.rglob("study.db"))
        open_folder(out, resume)
        prepared = prepare(task, request.space, cache, display, budget=request.budget)
        settings = dataclasses.replace(request.settings, resume=resume)
        result = run_search(prepared, prepared.problem(request.budget), settings, out, runner, display)
        if result.info["trials"]["interrupted"]:
            return None
        if not request.training.trains:
            return out
        write_beside(settings_file, lambda p: p.write_text(about))
    elif not settings_file.is_file() or settings_file.read_text() != about:
        raise StudyError(f"{out} holds a training with other settings: remove it, or give another --out")
    if (trained / RESULT).is_file():
        return trained
    try:
        with graceful_interrupt(patience, display.say):
            train_run(
                out,
                task,
                request.recipe,
                trained,
                teacher=_teacher(request.teacher),
                from_scratch=request.from_scratch,
                resume=True,
                stop=patience,
                progress=display,
                note=display.note,
            )
    except KeyboardInterrupt:
        return None
    return trained
