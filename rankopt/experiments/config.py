"""A study's TOML file: one search, a list of cases, or hyperparameters in ranges. See `read_study` for its keys."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from rankopt.candidates.search_space import load_space
from rankopt.core.budget import check_metrics
from rankopt.core.errors import RankoptError
from rankopt.core.options import parse_pairs
from rankopt.core.records import METRICS
from rankopt.experiments.experiment import NO_TRAINING, Experiment
from rankopt.search.evaluator import FULL_FIDELITY, FidelitySchedule
from rankopt.strategies.registry import read_options
from rankopt.training.recipe import Recipe

OBJECTIVES = {"score": "maximize", "objective": "minimize"} | dict.fromkeys((*METRICS, "milliseconds"), "minimize")


RANGE = {"low", "high", "log", "step"}


TYPES: dict[str, Any] = {  # of the file's keys
    "task": str,
    "budget": (str, list, dict),
    "strategy": str,
    "options": dict,
    "space": (str, dict),
    "trials": int,
    "seed": int,
    "refine": bool,
    "fidelities": str,
    "workers": int,
    "training": dict,
    "from_scratch": bool,
    "teacher": str,
    "out": str,
    "searches": int,
    "objectives": (str, list),
    "hyperparameters": dict,
    "cases": list,
}


OF_ALL = ("cases", "hyperparameters", "searches", "objectives", "out", "workers")  # what a case has no own of


NAME = r"[\w.,%+-]*[\w%]"  # of a case, which names a folder


@dataclass(frozen=True)
class Hyperparameter:
    """What one may be. A choice stands in the study as text, since Optuna's stores keep no lists."""

    name: str
    distribution: BaseDistribution
    choices: Mapping[str, Any] = field(default_factory=dict)  # text -> value; empty for ranges

    def value(self, drawn: Any) -> Any:
        return self.choices[drawn] if self.choices else drawn

    def ends(self) -> list[Any]:
        """The values to check: every choice, or both ends of the range."""
        d = self.distribution
        return list(self.choices.values()) if self.choices else [d.low, d.high]  # type: ignore[attr-defined]

    def drawn(self, value: Any) -> Any:
        """What stands for a value; None if it lies outside."""
        if self.choices:
            return choice_text(value) if choice_text(value) in self.choices else None
        inside = isinstance(value, (int, float)) and self.distribution._contains(value)
        return value if inside else None


class Case(NamedTuple):
    """One of a study's searches."""

    name: str
    task: str
    request: Experiment


@dataclass(frozen=True)
class StudyFile:
    """What a study's TOML says. searches: how many, where there are hyperparameters; workers: of each search."""

    path: Path
    task: str
    request: Experiment
    out: Path
    workers: int = 0
    searches: int = 40
    objectives: tuple[str, ...] = ()
    hyperparameters: tuple[Hyperparameter, ...] = ()
    cases: tuple[Case, ...] = ()


def choice_text(value: Any) -> str:
    """ "svd_out cp" for a list, the plain value as text else."""
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


# --- reading ---------------------------------------------------------------------------------------------


def read_study(path: Path) -> StudyFile:
    """A study from its file. Raises RankoptError for unknown keys, and for values that cannot be.

    task, budget, strategy, options, space, trials, seed, refine, fidelities, workers: as `rankopt search` has them
    (budget also as a table, options always; space also as a table of settings, with the name of the space that they
    change as `base`); training: a table of `Recipe`; from_scratch: of the plan on an untrained network; teacher: a task
    whose model's predictions are learnt instead of the dense model's; out: the folder for results. With
    hyperparameters: how many searches, and the objectives. cases: a list of tables with a name and what is other than
    above. Paths are relative to the file's folder.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RankoptError(f"study {path} cannot be read: {error}") from error
    try:
        return _study(path, content)
    except RankoptError as error:
        raise RankoptError(f"study {path}: {error}") from error


def _study(path: Path, content: Mapping[str, Any]) -> StudyFile:
    _check_keys(content, TYPES)
    folder = path.parent / content["out"] if "out" in content else Path("runs") / path.stem
    if "hyperparameters" not in content and ("searches" in content or "objectives" in content):
        raise RankoptError("searches and objectives go with a table [hyperparameters]")
    if content.get("searches", 1) < 1 or content.get("workers", 0) < 0:
        raise RankoptError("searches are 1 or more, workers 0 or more")
    given = {k: content[k] for k in ("workers", "searches") if k in content}
    if cases := tuple(_cases(path, content)):
        if "hyperparameters" in content:
            raise RankoptError("cases and [hyperparameters] do not go together: make two studies of it")
        if len({case.name for case in cases}) < len(cases):
            raise RankoptError("two cases have one name")
        return StudyFile(path, cases[0].task, cases[0].request, folder, cases=cases, **given)
    task, request = _from(path, _needed(content, "task")), _request(path, content)
    hyperparameters = tuple(_hyperparameters(request, content.get("hyperparameters", {})))
    return StudyFile(
        path, task, request, folder, objectives=_objectives(content), hyperparameters=hyperparameters, **given
    )


def _request(path: Path, content: Mapping[str, Any]) -> Experiment:
    strategy, budget = content.get("strategy", "knapsack"), _needed(content, "budget")
    if not isinstance(budget, dict):
        budget = {k: _number(v) for k, v in parse_pairs(budget if isinstance(budget, list) else [budget]).items()}
    check_metrics(budget)
    plain = {k: content[k] for k in ("trials", "seed", "refine", "from_scratch") if k in content}
    plain |= {"teacher": _from(path, content["teacher"])} if "teacher" in content else {}
    ladder = FidelitySchedule.parse(content["fidelities"]) if "fidelities" in content else FULL_FIDELITY
    space = content.get("space", "default")
    own = {k: v for k, v in space.items() if k != "base"} if isinstance(space, dict) else {}
    base = load_space(_from(path, space.get("base", "default") if isinstance(space, dict) else space))
    options = read_options(strategy, content.get("options", {}))
    trains = "training" in content or "training" in content.get("hyperparameters", {})
    training = Recipe() if trains else NO_TRAINING
    request = Experiment(budget, strategy, options, base, ladder=ladder, training=training, **plain)
    settings = {f"space.{k}": v for k, v in own.items()}
    settings |= {f"training.{k}": v for k, v in content.get("training", {}).items()}
    _check_known("setting", settings, request)
    request = request.changed(settings)
    if request.teacher and not request.training.distill and "hyperparameters" not in content:
        raise RankoptError("the teacher is not listened to with distill = 0: give training.distill = 0.5, say")
    if request.space.rounds > 1:
        raise RankoptError(f"search space {base.name!r} asks for {request.space.rounds} rounds: use rankopt search")
    return request


def _number(text: str) -> Any:
    """A number, of those that hyperparameters may take, or the text as it is, as "30%"."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check_known(what: str, names: Iterable[str], request: Experiment) -> None:
    known = request.known()
    for name in names:
        if name not in known:
            table = [k for k in known if k.partition(".")[0] == name.partition(".")[0]]
            raise RankoptError(f"unknown {what} {name!r}; known are {', '.join(table or known)}")


def _from(path: Path, name: str) -> str:
    """A task's or search space's name; a file's is taken from the study's folder on."""
    file, colon, function = name.partition(":")
    return str(path.parent / file) + colon + function if Path(file).suffix in (".py", ".toml") else name


def _cases(path: Path, content: Mapping[str, Any]) -> Iterator[Case]:
    """Each case is the file with its own keys; of options and training only what it names is other."""
    common = {k: v for k, v in content.items() if k not in OF_ALL}
    for table in content.get("cases", []):
        name = table.get("name") if isinstance(table, dict) else None
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise RankoptError(f"a case is a table with a name of letters, digits and . , % + - only, not {name!r}")
        own = {k: v for k, v in table.items() if k != "name"}
        try:
            _check_keys(own, [k for k in TYPES if k not in OF_ALL])
            merged = {**common, **own}
            for key in ("options", "training"):
                if key in common and key in own:
                    merged[key] = {**common[key], **own[key]}
            yield Case(name, _from(path, _needed(merged, "task")), _request(path, merged))
        except RankoptError as error:
            raise RankoptError(f"case {name}: {error}") from error


def _needed(content: Mapping[str, Any], key: str) -> Any:
    if key not in content:
        raise RankoptError(f"{key} is missing")
    return content[key]


def _check_keys(content: Mapping[str, Any], known: Iterable[str]) -> None:
    for key, value in content.items():
        if key not in known:
            raise RankoptError(f"unknown key {key!r}; the keys are {', '.join(known)}")
        if not isinstance(value, TYPES[key]) or (isinstance(value, bool) and TYPES[key] is int):
            raise RankoptError(f"{key} = {value!r} is not what it should be: see the README's section on studies")


def _objectives(content: Mapping[str, Any]) -> tuple[str, ...]:
    given = content.get("objectives", ())
    objectives = (given,) if isinstance(given, str) else tuple(given)
    for name in objectives:
        if not isinstance(name, str) or name not in OBJECTIVES:
            raise RankoptError(f"unknown objective {name!r}: choose from {', '.join(OBJECTIVES)}")
    if len(set(objectives)) < len(objectives):
        raise RankoptError(f"objectives {', '.join(objectives)}: each but once")
    return objectives


def _hyperparameters(request: Experiment, table: Mapping[str, Any]) -> Iterator[Hyperparameter]:
    known = request.known()
    for name, given in _leaves(table):
        _check_known("hyperparameter", [name], request)
        found = _hyperparameter(name, given, known[name])
        for value in found.ends():
            request.changed({name: value})
        yield found


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and not value.keys() & RANGE:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _hyperparameter(name: str, given: Any, usual: Any) -> Hyperparameter:
    """usual: what it is without a range; that says whether it may lie between whole numbers."""
    wrong = (
        f"hyperparameter {name}: give choices as [a, b] or a range as {{low = 1, high = 9}}, with log = true or step"
    )
    if isinstance(given, list) and given:
        choices = {choice_text(value): value for value in given}
        return Hyperparameter(name, CategoricalDistribution(list(choices)), choices)
    if not isinstance(given, dict) or not {"low", "high"} <= given.keys() <= RANGE:
        raise RankoptError(wrong)
    low, high, log, step = given["low"], given["high"], given.get("log", False), given.get("step")
    numbers = [x for x in (low, high, step) if x is not None]
    if any(not isinstance(x, (int, float)) or isinstance(x, bool) for x in numbers) or not isinstance(log, bool):
        raise RankoptError(wrong)
    # A budget may be a share or a number; what else is usually a fraction has no ranges of whole numbers.
    between = any(isinstance(x, float) for x in numbers) or (
        isinstance(usual, float) and not name.startswith("budget.")
    )
    try:
        if between:
            return Hyperparameter(name, FloatDistribution(float(low), float(high), log, step))
        return Hyperparameter(name, IntDistribution(low, high, log, step or 1))
    except ValueError as error:
        raise RankoptError(f"hyperparameter {name}: {error}") from error
