"""Reading a study's TOML file: one search, a list of cases, or hyperparameters in ranges.

```toml
task = "mytasks.py:resnet"
budget = { params = 0.3 }
training = { epochs = 5 }
searches = 40
objectives = ["score", "params"]

[hyperparameters]
budget.params = { low = 0.2, high = 0.5, log = true }
space.families = [["svd_out", "cp_merged"], ["svd_out"]]
training.rate = { low = 0.0001, high = 0.01, log = true }
```

`read_study` lists the keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from typing_extensions import TypedDict

from rankopt.candidates.search_space import load_space
from rankopt.core.budget import check_metrics
from rankopt.core.errors import RankoptError
from rankopt.core.options import parse_pairs
from rankopt.core.records import METRICS
from rankopt.core.schema import checked, read_toml
from rankopt.core.text import reason
from rankopt.experiments.experiment import NO_TRAINING, Experiment
from rankopt.search.runners import RunnerSettings
from rankopt.search.settings import SearchSettings
from rankopt.search.storage.private import in_range
from rankopt.training.recipe import Recipe

OBJECTIVES = {"score": "maximize", "objective": "minimize"} | dict.fromkeys((*METRICS, "milliseconds"), "minimize")


RANGE_KEYS = {"low", "high", "log", "step"}


Setting = str | int | float | bool


class CaseContent(TypedDict, total=False):
    """The keys of one search, which a case may have of its own; see `read_study`."""

    task: str
    budget: str | list[str] | dict[str, str | int | float]
    strategy: str
    options: dict[str, Setting]
    space: str | dict[str, Setting | list[Setting]]
    trials: int
    seed: int
    refine: bool
    fidelities: str
    training: dict[str, Setting]
    from_scratch: bool
    teacher: str
    minutes: float


class RayContent(TypedDict, total=False):
    """The keys of the table [ray]."""

    workers: int
    address: str
    gpus_per_trial: float
    cpus_per_trial: float
    trial_timeout: float
    trial_memory: float


class StudyContent(CaseContent, total=False):
    """The keys of a study's file."""

    workers: int
    ray: RayContent
    out: str
    searches: int
    objectives: str | list[Any]
    hyperparameters: dict[str, Any]
    cases: list[dict[str, Any]]
    lists: dict[str, list[dict[str, Setting | list[Setting]]]]


IN_PROCESS = RunnerSettings()


CASE_NAME = r"[\w.,%+-]*[\w%]"  # of a case: also the name of its folder


@dataclass(frozen=True)
class Hyperparameter:
    """A setting that is searched for, with the values that it may have.

    Attributes:
        name: Name of the setting, as "training.rate".
        distribution: Optuna's description of the values. Choices are texts in it, since Optuna stores no lists.
        choices: Text -> value; empty for a range.
    """

    name: str
    distribution: BaseDistribution
    choices: Mapping[str, Any] = field(default_factory=dict)  # text -> value; empty for ranges

    def from_optuna(self, stored: Any) -> Any:
        """Return the setting's value for a value of the distribution.

        Args:
            stored: What Optuna drew or has stored.
        """
        return self.choices[stored] if self.choices else stored

    def values_to_check(self) -> list[Any]:
        """List every choice, or both ends of the range: if these are valid, all values are."""
        d = self.distribution
        return list(self.choices.values()) if self.choices else [d.low, d.high]  # type: ignore[attr-defined]

    def to_optuna(self, value: Any) -> Any:
        """Return the distribution's value for a value of the setting; None if the setting may not have it.

        Args:
            value: The setting's value.
        """
        if self.choices:
            return choice_text(value) if choice_text(value) in self.choices else None
        inside = isinstance(value, (int, float)) and in_range(self.distribution, value)
        return value if inside else None


class Case(NamedTuple):
    """One of a study's cases.

    Attributes:
        name: Name of the case and of its folder.
        task: Name of its task.
        experiment: Its settings.
        minutes: About how long it takes, as its file says; None if it does not.
    """

    name: str
    task: str
    experiment: Experiment
    minutes: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as JSON content, by which stored results are recognised."""
        return self.experiment.as_json(self.task)


@dataclass(frozen=True)
class StudyFile:
    """The content of a study's TOML file.

    Attributes:
        path: The file.
        task: Name of the task; with cases that of the first.
        experiment: The settings; with cases those of the first.
        out: Folder for results.
        runner: Where the trials of each search are evaluated.
        searches: Number of searches, if there are hyperparameters.
        objectives: What these searches optimise, the most important first; empty for the default.
        hyperparameters: The settings that are searched for.
        cases: The cases.
    """

    path: Path
    task: str
    experiment: Experiment
    out: Path
    runner: RunnerSettings = IN_PROCESS
    searches: int = 40
    objectives: tuple[str, ...] = ()
    hyperparameters: tuple[Hyperparameter, ...] = ()
    cases: tuple[Case, ...] = ()


def choice_text(value: Any) -> str:
    """Write a choice as text: "svd_out cp" for a list, "none" for an empty one.

    Args:
        value: The choice.
    """
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


# --- reading ---------------------------------------------------------------------------------------------


def read_study(path: Path) -> StudyFile:
    """Read a study's file.

    The keys are:

    - task, strategy, trials, seed, refine, fidelities, workers: as the options of `rankopt search`.
    - ray: a table of workers, address, gpus_per_trial, cpus_per_trial, trial_timeout and trial_memory.
    - budget: text as for `rankopt search`, a list of such texts, or a table { metric = limit }.
    - options: a table of the strategy's options.
    - space: name of a search space or its file, or a table of settings that differ from those of the space `base`.
    - training: a table of `Recipe`'s fields; without it nothing is trained.
    - from_scratch: true to train the plan on an untrained network.
    - teacher: a task whose model is distilled from instead of the dense one.
    - minutes: about how long a case takes, say on a GPU; for the reader, and for who shares cases out.
    - out: the folder for results.
    - hyperparameters: a table of settings -> list of choices, or a range { low, high, log, step }; with it searches,
      how many to make, and objectives, what they optimise.
    - cases: a list of tables, each with a name and the keys that differ from the above. A table with `each`, the names
      of some of the `lists`, stands for a case per combination of their entries; "{key}" in its values is what an entry
      has under that key.
    - lists: a table of lists of tables, for `each`.

    Args:
        path: The file. Paths in it are relative to its folder.

    Raises:
        RankoptError: If the file cannot be read, a key is unknown or a value invalid.
    """
    try:
        content = read_toml(path)
    except (OSError, ValueError) as error:
        raise RankoptError(f"study {path} cannot be read: {reason(error)}") from error
    try:
        return _study(path, content)
    except RankoptError as error:
        raise RankoptError(f"study {path}: {reason(error)}") from error


def _study(path: Path, content: Mapping[str, Any]) -> StudyFile:
    """Check a file's content as a whole, and read its parts."""
    if isinstance(content.get("ray"), dict):
        _check_keys(content["ray"], RayContent, "ray")
    content = _with_known_keys(content, StudyContent)
    folder = path.parent / content["out"] if "out" in content else Path("runs") / path.stem
    if "hyperparameters" not in content and ("searches" in content or "objectives" in content):
        raise RankoptError("searches and objectives go with a table [hyperparameters]")
    if content.get("searches", 1) < 1:
        raise RankoptError("searches are 1 or more")
    given = {"runner": _runner(content), **{k: content[k] for k in ("searches",) if k in content}}
    if cases := tuple(_cases(path, content)):
        if "hyperparameters" in content:
            raise RankoptError("cases and [hyperparameters] do not go together: make two studies of it")
        if len({case.name for case in cases}) < len(cases):
            raise RankoptError("two cases have one name")
        return StudyFile(path, cases[0].task, cases[0].experiment, folder, cases=cases, **given)
    task, experiment = _beside(path, _required(content, "task")), _experiment(path, content)
    hyperparameters = tuple(_hyperparameters(experiment, content.get("hyperparameters", {})))
    return StudyFile(
        path, task, experiment, folder, objectives=_objectives(content), hyperparameters=hyperparameters, **given
    )


def _runner(content: Mapping[str, Any]) -> RunnerSettings:
    """Read the table [ray]; workers may also stand alone."""
    table = {**({"workers": content["workers"]} if "workers" in content else {}), **content.get("ray", {})}
    names = {"address": "ray_address"}
    settings = RunnerSettings(**{names.get(k, k): v for k, v in table.items()})
    if settings.workers < 0:
        raise RankoptError("workers are 0 or more")
    return settings


def _experiment(path: Path, content: Mapping[str, Any]) -> Experiment:
    """Read the settings of one search and its training."""
    budget = _required(content, "budget")
    if not isinstance(budget, dict):
        budget = {k: _number(v) for k, v in parse_pairs(budget if isinstance(budget, list) else [budget]).items()}
    check_metrics(budget)
    keys = ("strategy", "options", "fidelities", "trials", "seed", "refine")
    search = SearchSettings.parse(**{k: content[k] for k in keys if k in content})
    space = content.get("space", "default")
    own = {k: v for k, v in space.items() if k != "base"} if isinstance(space, dict) else {}
    base = load_space(_beside(path, space.get("base", "default") if isinstance(space, dict) else space))
    trains = "training" in content or "training" in content.get("hyperparameters", {})
    training = Recipe() if trains else NO_TRAINING
    teacher = _beside(path, content["teacher"]) if "teacher" in content else ""
    experiment = Experiment(budget, search, base, training, content.get("from_scratch", False), teacher)
    settings = {f"space.{k}": v for k, v in own.items()}
    settings |= {f"training.{k}": v for k, v in content.get("training", {}).items()}
    _check_tunable("setting", settings, experiment)
    experiment = experiment.with_values(settings)
    if experiment.teacher and not experiment.training.distill and "hyperparameters" not in content:
        raise RankoptError("the teacher is not listened to with distill = 0: give training.distill = 0.5, say")
    if experiment.space.rounds > 1:
        raise RankoptError(f"search space {base.name!r} asks for {experiment.space.rounds} rounds: use rankopt search")
    return experiment


def _number(text: str) -> Any:
    """Return the text's number, so that it can be compared with those of ranges, or a text like "30%" as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check_tunable(what: str, names: Iterable[str], experiment: Experiment) -> None:
    known = experiment.tunable()
    for name in names:
        if name not in known:
            table = [k for k in known if k.partition(".")[0] == name.partition(".")[0]]
            raise RankoptError(f"unknown {what} {name!r}; known are {', '.join(table or known)}")


def _beside(path: Path, name: str) -> str:
    """Resolve the name of a task or search space: a file lies relative to the study's folder."""
    file, colon, function = name.partition(":")
    return str(path.parent / file) + colon + function if Path(file).suffix in (".py", ".toml") else name


def _cases(path: Path, content: Mapping[str, Any]) -> Iterator[Case]:
    """Read the cases: each is the file with its own keys; its options and training are merged with the file's."""
    common = {k: v for k, v in content.items() if k in CaseContent.__annotations__}
    tables = [case for table in content.get("cases", []) for case in _combinations(table, content.get("lists", {}))]
    for table in tables:
        name = table.get("name")
        if not isinstance(name, str) or not re.fullmatch(CASE_NAME, name):
            raise RankoptError(f"a case is a table with a name of letters, digits and . , % + - only, not {name!r}")
        try:
            own = _with_known_keys({k: v for k, v in table.items() if k != "name"}, CaseContent)
            merged = {**common, **own}
            for key in ("options", "training"):
                if key in common and key in own:
                    merged[key] = {**common[key], **own[key]}
            yield Case(name, _beside(path, _required(merged, "task")), _experiment(path, merged), merged.get("minutes"))
        except RankoptError as error:
            raise RankoptError(f"case {name}: {error}") from error


def _combinations(table: Mapping[str, Any], lists: Mapping[str, list[dict[str, Any]]]) -> Iterator[Any]:
    """The cases that a table stands for: one, or with `each` one per combination of the lists' entries."""
    each = table.get("each", [])
    if not isinstance(each, list) or not all(isinstance(name, str) for name in each):
        raise RankoptError(f"each is {each!r}: give a list of names of `lists`")
    if unknown := [name for name in each if name not in lists]:
        raise RankoptError(f"each names {unknown[0]!r}; the lists are {', '.join(lists) or 'none'}")
    rest = {key: value for key, value in table.items() if key != "each"}
    for entries in product(*(lists[name] for name in each)):
        values = {key: value for entry in entries for key, value in entry.items()}
        yield _filled(rest, values) if each else rest


def _filled(content: Any, values: Mapping[str, Any]) -> Any:
    """Content with "{key}" replaced in its texts; a text that is nothing else becomes the value itself."""
    if isinstance(content, dict):
        return {key: _filled(value, values) for key, value in content.items()}
    if isinstance(content, list):
        return [_filled(value, values) for value in content]
    if not isinstance(content, str):
        return content
    if unknown := [key for key in re.findall(r"{(\w+)}", content) if key not in values]:
        raise RankoptError(f"{content!r}: no list of its `each` has {unknown[0]!r}; they have {', '.join(values)}")
    if (whole := re.fullmatch(r"{(\w+)}", content)) is not None:
        return values[whole[1]]
    return re.sub(r"{(\w+)}", lambda found: str(values[found[1]]), content)


def _required(content: Mapping[str, Any], key: str) -> Any:
    if key not in content:
        raise RankoptError(f"{key} is missing")
    return content[key]


def _with_known_keys(content: Mapping[str, Any], kind: Any) -> Mapping[str, Any]:
    """The content, checked against its type."""
    _check_keys(content, kind)
    try:
        return checked(content, kind)
    except ValueError as error:
        raise RankoptError(f"{error}: see docs/reference/study-file.md") from error


def _check_keys(content: Mapping[str, Any], kind: Any, table: str = "") -> None:
    """Raise RankoptError if there is a key that the type does not have."""
    if unknown := [key for key in content if key not in kind.__annotations__]:
        name = f"{table}.{unknown[0]}" if table else repr(unknown[0])
        raise RankoptError(f"unknown key {name}; the keys are {', '.join(kind.__annotations__)}")


def _objectives(content: Mapping[str, Any]) -> tuple[str, ...]:
    given = content.get("objectives", ())
    objectives = (given,) if isinstance(given, str) else tuple(given)
    for name in objectives:
        if not isinstance(name, str) or name not in OBJECTIVES:
            raise RankoptError(f"unknown objective {name!r}: choose from {', '.join(OBJECTIVES)}")
    if len(set(objectives)) < len(objectives):
        raise RankoptError(f"objectives {', '.join(objectives)}: name each only once")
    return objectives


def _hyperparameters(experiment: Experiment, table: Mapping[str, Any]) -> Iterator[Hyperparameter]:
    usual = experiment.tunable()
    for name, given in _leaves(table):
        _check_tunable("hyperparameter", [name], experiment)
        found = _hyperparameter(name, given, usual[name])
        for value in found.values_to_check():
            experiment.with_values({name: value})
        yield found


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested tables into dotted names; ranges are tables that stay as they are."""
    for key, value in table.items():
        if isinstance(value, dict) and not value.keys() & RANGE_KEYS:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _hyperparameter(name: str, given: Any, usual: Any) -> Hyperparameter:
    """Read a hyperparameter. Its usual value, without a range, says whether fractions are allowed."""
    wrong = (
        f"hyperparameter {name}: give choices as [a, b] or a range as {{low = 1, high = 9}}, with log = true or step"
    )
    if isinstance(given, list) and given:
        choices = {choice_text(value): value for value in given}
        return Hyperparameter(name, CategoricalDistribution(list(choices)), choices)
    if not isinstance(given, dict) or not {"low", "high"} <= given.keys() <= RANGE_KEYS:
        raise RankoptError(wrong)
    low, high, log, step = given["low"], given["high"], given.get("log", False), given.get("step")
    numbers = [x for x in (low, high, step) if x is not None]
    if any(not isinstance(x, (int, float)) or isinstance(x, bool) for x in numbers) or not isinstance(log, bool):
        raise RankoptError(wrong)
    # low = 0, high = 1 is a range of fractions where the usual value is one; a budget may be a share or a number.
    fractions = any(isinstance(x, float) for x in numbers) or (
        isinstance(usual, float) and not name.startswith("budget.")
    )
    try:
        if fractions:
            return Hyperparameter(name, FloatDistribution(float(low), float(high), log, step))
        return Hyperparameter(name, IntDistribution(low, high, log, step or 1))
    except ValueError as error:
        raise RankoptError(f"hyperparameter {name}: {error}") from error
