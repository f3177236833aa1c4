"""An experiment: one search and the training of the plan that it finds.

Cases of a study are experiments that differ in some settings; hyperparameters are settings that a study searches for.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankopt.candidates.cache import Cache
from rankopt.candidates.prepare import Prepared, prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import digest, without_folder, write_beside
from rankopt.core.progress import Display, StopCondition, graceful_interrupt
from rankopt.core.records import METRICS, Task
from rankopt.core.result_record import TrainingSource
from rankopt.core.run_folder import RESULT, check_no_links, claim
from rankopt.core.schema import checked, read_json
from rankopt.core.text import reason
from rankopt.experiments.tasks import load_task
from rankopt.model.objective import call
from rankopt.search.compress import open_run_folder, run_search
from rankopt.search.loop import WAIT, Runner
from rankopt.search.result import Result
from rankopt.search.runners import trainer_of, workers_of
from rankopt.search.settings import SearchSettings
from rankopt.search.train_run import train_run, untrained_network, with_training
from rankopt.strategies.registry import read_options, strategy_options
from rankopt.training.recipe import Recipe

NO_TRAINING = Recipe(epochs=0)


TUNABLE_TABLES = ("budget", "options", "space", "training")  # tables whose settings may be hyperparameters


NOT_TUNABLE = (  # settings of a search space
    *("name", "description", "layers", "rounds", "round_steps", "effort", "minutes"),
)


TRAINED = "trained"  # the folder of the trained model, in a run folder


EXPERIMENT_FILE = "request.json"  # the experiment's settings, beside it


@dataclass(frozen=True)
class Experiment:
    """A search and the training of its plan: everything except the task.

    Attributes:
        budget: Metric -> limit, as `parse_budget` reads them.
        search: How to search. Its seed is also the training's.
        space: The search space, with its strategy's effort if it says none.
        training: How to train the plan's model; without epochs it is not trained.
        from_scratch: Whether to train the plan on an untrained network.
        teacher: Name of a task whose model is distilled from; empty for the dense model itself.
    """

    budget: Mapping[str, Any]
    search: SearchSettings = field(default_factory=SearchSettings)
    space: SearchSpace = field(default_factory=SearchSpace)
    training: Recipe = NO_TRAINING
    from_scratch: bool = False
    teacher: str = ""

    def __post_init__(self) -> None:
        if (self.from_scratch or self.teacher) and not self.training.epochs:
            raise RankoptError("from_scratch and teacher need a training: give epochs")
        object.__setattr__(self, "space", self.space.with_effort(self.search.effort))

    def tunable(self) -> dict[str, Any]:
        """List the settings that may be hyperparameters.

        Returns:
            Name as "training.rate" -> its present value.
        """
        space = {f.name: getattr(self.space, f.name) for f in dataclasses.fields(SearchSpace)}
        tables: dict[str, dict[str, Any]] = {
            "budget": {m: self.budget.get(m, 1.0) for m in METRICS},
            "options": {**strategy_options(self.search.strategy), **self.search.options},
            "space": {k: v for k, v in space.items() if k not in NOT_TUNABLE},
            "training": {k: v for k, v in dataclasses.asdict(self.training).items() if k != "seed"},
        }
        return {f"{table}.{k}": v for table, values in tables.items() for k, v in values.items()}

    def with_values(self, values: Mapping[str, Any]) -> Experiment:
        """Return the experiment with other values of some settings.

        Args:
            values: Names, as `tunable` has them -> values.

        Raises:
            RankoptError: For a value that the setting cannot have.
        """
        parts: dict[str, dict[str, Any]] = {table: {} for table in TUNABLE_TABLES}
        for name, value in values.items():
            table, _, key = name.partition(".")
            parts[table][key] = tuple(value) if isinstance(value, list) else value
        try:
            options = read_options(self.search.strategy, {**self.search.options, **parts["options"]})
            return dataclasses.replace(
                self,
                budget={**self.budget, **parts["budget"]},
                search=dataclasses.replace(self.search, options=options),
                space=checked({**dataclasses.asdict(self.space), **parts["space"]}, SearchSpace),
                training=dataclasses.replace(self.training, **parts["training"]),
            )
        except RankoptError:
            raise
        except (TypeError, ValueError) as error:
            raise RankoptError(f"{', '.join(f'{k}={v}' for k, v in values.items())}: {error}") from error

    def as_json(self, task: str | None) -> dict[str, Any]:
        """Describe the experiment as JSON content, by which stored results are recognised.

        Args:
            task: Name of the task. Of tasks in files only the file's name counts, not its folder.
        """
        content = {
            "task": task and without_folder(task),
            "budget": dict(self.budget),
            "strategy": self.search.strategy,
            "options": dict(self.search.options),
            "space": self.space.settings(),
            "trials": self.search.trials,
            "seed": self.search.seed,
            "refine": self.search.refine,
            "ladder": dataclasses.asdict(self.search.fidelities),
            "training": dataclasses.asdict(self.training),
            "from_scratch": self.from_scratch,
            "teacher": without_folder(self.teacher),
        }
        return json.loads(json.dumps(content, default=str))

    @property
    def recipe(self) -> Recipe:
        """The training with the search's seed."""
        return dataclasses.replace(self.training, seed=self.search.seed)


def same_settings(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether stored settings are those of an experiment; settings that did not exist then had their default.

    Args:
        stored: As `Experiment.as_json` wrote them, perhaps by an earlier version.
        asked: As it writes them now.
    """
    training = stored.get("training")
    known = dataclasses.asdict(NO_TRAINING) | training if isinstance(training, dict) else training
    return json.loads(json.dumps({**stored, "training": known})) == asked


def read_settings(out: Path) -> dict[str, Any] | None:
    """Read the settings of the experiment that is trained in a run folder; None before its training.

    Args:
        out: The run folder.

    Raises:
        StudyError: If the file is damaged.
    """
    path = out / EXPERIMENT_FILE
    if not path.is_file():
        return None
    try:
        settings: dict[str, Any] = read_json(path, dict[str, Any])
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is damaged ({reason(error)}): remove the folder") from error
    return settings


def prepare_experiment(
    experiment: Experiment, task: Task, cache: Path | None, display: Display, runner: Runner, stop: StopCondition
) -> Prepared:
    """Prepare a task for an experiment; processes that prepare the same with one cache do it one after the other.

    The first one makes what the others read from the cache.

    Args:
        experiment: The experiment.
        task: Its task.
        cache: Folder of fitted candidates; None for the default.
        display: Shows progress.
        runner: The runner of its search, which says where to prepare.
        stop: Whether to stop, where no signal can reach this thread.

    Raises:
        KeyboardInterrupt: It was asked to stop.
    """
    store = Cache(cache)
    turn = store.folder / f"{digest(without_folder(task.name), experiment.space.settings())}.turn"

    def shown(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        for item in display(items, what, total):
            if stop.stopping:
                raise KeyboardInterrupt
            yield item

    while True:
        with claim(turn) if os.access(store.folder, os.W_OK) else nullcontext(True) as ours:
            if ours:
                return prepare(task, experiment.space, store.folder, shown, workers_of(runner), experiment.budget)
        display.note("waiting for another process that prepares the same")
        if stop.stopping:
            raise KeyboardInterrupt
        time.sleep(WAIT)


def run_experiment(experiment: Experiment, prepared: Prepared, runner: Runner, teacher: Task | None = None) -> Result:
    """Search, then train the model of the plan that was found; nothing is kept on disk.

    Args:
        experiment: What to do.
        prepared: The task, prepared with the experiment's search space.
        runner: Runs the search.
        teacher: The experiment's teacher. Default: it is loaded.

    Returns:
        The result of the training, or of the search if there is no training or the search was interrupted.
    """
    result = run_search(prepared, prepared.problem(experiment.budget), experiment.search, runner=runner)
    if not experiment.training.trains or result.info["trials"]["interrupted"]:
        return result
    model = (
        untrained_network(prepared.task, result.plan, experiment.search.seed)
        if experiment.from_scratch
        else result.model
    )
    teacher = teacher or load_teacher(experiment.teacher)
    origin: TrainingSource = {
        "run": "the search",
        "from_scratch": experiment.from_scratch,
        "teacher": experiment.teacher or None,
    }
    learnt_from = None if teacher is None else teacher.model
    trained = trainer_of(runner)(model, prepared.task, experiment.recipe, teacher=learnt_from)
    result = with_training(result, trained, prepared.task, origin)
    objective = call("the objective", prepared.objective, result.model)
    assert objective is not None
    result.info["objective"]["best"] = objective
    return result


@functools.cache
def load_teacher(name: str) -> Task | None:
    """Load a teacher's task; it is kept, since all searches of a study share it.

    Args:
        name: Its name; empty for none.
    """
    return load_task(name) if name else None


def run_in_folder(
    experiment: Experiment,
    task: Task,
    out: Path,
    runner: Runner,
    cache: Path | None,
    stop: StopCondition,
    display: Display,
    teacher: Task | None = None,
) -> Path | None:
    """Do an experiment in a run folder, or resume it: search there, then train in the folder `trained` within.

    The same call resumes what was stopped or killed, and repeats nothing that is finished.

    Args:
        experiment: What to do.
        task: The task.
        out: The run folder.
        runner: Runs the search, and decides when to stop it.
        cache: Folder of fitted candidates; None for the default.
        stop: Whether to stop the training, asked after every step.
        display: Shows progress.
        teacher: The experiment's teacher. Default: it is loaded.

    Returns:
        The folder that holds the result: `out`, or `trained` in it. None if it was stopped before there was one.

    Raises:
        StudyError: If the folder holds a search or a training with other settings, or a link.
    """
    check_no_links(out)
    trained, settings_file = out / TRAINED, out / EXPERIMENT_FILE
    asked = experiment.as_json(task.name)
    if not trained.is_dir():
        resume = out.is_dir() and any(out.rglob("study.db"))
        settings = dataclasses.replace(experiment.search, resume=resume)
        open_run_folder(out, settings)
        prepared = prepare_experiment(experiment, task, cache, display, runner, stop)
        result = run_search(prepared, prepared.problem(experiment.budget), settings, out, runner, display)
        if result.info["trials"]["interrupted"]:
            return None
        if not experiment.training.trains:
            return out
        write_beside(settings_file, lambda p: p.write_text(json.dumps(asked, indent=1)))
    elif (known := read_settings(out)) is None or not same_settings(known, asked):
        raise StudyError(f"{out} holds a training with other settings: remove it, or give another --out")
    if (trained / RESULT).is_file():
        return trained
    try:
        with graceful_interrupt(stop, display.say):
            train_run(
                out,
                task,
                experiment.recipe,
                trained,
                teacher=teacher or load_teacher(experiment.teacher),
                from_scratch=experiment.from_scratch,
                resume=True,
                stop=stop,
                progress=display,
                note=display.note,
                trainer=trainer_of(runner),
            )
    except KeyboardInterrupt:
        return None
    return trained
