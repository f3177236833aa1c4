"""How work goes, on standard error: bars, one live line of a search, and Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from rankopt.core.budget import amount
from rankopt.core.progress import graceful_interrupt
from rankopt.core.records import Trial

if TYPE_CHECKING:
    from rankopt.search.loop import Evaluate, Study

LOG = "search.log"


console = Console(stderr=True)


def show_progress(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """A progress bar on standard error; gone when done, one line where there is no terminal."""
    yield from ProgressBar()(items, what, total)


class ProgressBar:
    """The same, with a text that can be changed while it goes."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        if total == 0:
            yield from items
            return
        self.text = what
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TimeRemainingColumn()]
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            for item in items:
                yield item
                progress.update(task, advance=1, description=self.text)
            elapsed = progress.tasks[0].elapsed or 0
        console.print(f"{self.text}: {total} in {elapsed:.1f} s", markup=False, highlight=False)

    def note(self, text: str) -> None:
        """Change the text beside the bar."""
        self.text = text

    def say(self, text: str) -> None:
        """Print a line."""
        console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveRunner:
    """A runner that shows another's search and keeps a log of its trials; Ctrl-C ends it in good order.

    On a terminal one line is kept up to date; elsewhere there is a line for every trial.
    """

    def __init__(self, runner: Callable[[Study, Evaluate], list[Trial]], folder: Path, screen: Console = console):
        self.runner, self.log, self.screen = runner, folder / LOG, screen
        self.best = float("inf")

    def __call__(self, study: Study, evaluate: Evaluate) -> list[Trial]:
        from rankopt.candidates.fit import release_workers

        release_workers()
        self.study, self.start, self.before = study, time.monotonic(), len(study.trials)
        self.best = min((t.objective for t in study.trials if t.objective is not None), default=float("inf"))
        study.report = self.told
        self._note(f"search starts: {self.before} of {study.limit} trials are done")
        with graceful_interrupt(study, self._say):
            if not self.screen.is_terminal:
                return self.runner(study, evaluate)
            with Live(get_renderable=self._shown, refresh_per_second=2, transient=True, console=self.screen):
                return self.runner(study, evaluate)

    def told(self, trial: Trial) -> None:
        text = trial_line(trial)
        better = trial.objective is not None and trial.objective < self.best
        if trial.objective is not None and better:
            self.best = trial.objective
        self._note(text)
        if better or trial.state == "failed" or not self.screen.is_terminal:
            style = "red" if trial.state == "failed" else ""
            self.screen.print(text + " *" * better, style=style, markup=False, highlight=False)

    def line(self) -> str:
        """done / running / failed, the best so far, the budget and the time left."""
        study = self.study
        states = [t.state for t in study.trials]
        running = f"{len(study.pending)} running, " * bool(study.pending)
        other = "".join(f"{n} {what}, " for what in ("failed", "stopped") if (n := states.count(what)))
        found = "nothing yet" if self.best == float("inf") else f"{self.best:.5g}"
        limits = ", ".join(f"{x.metric} ≤ {amount(x.metric, x.target)}" for x in study.problem.limits)
        return f"{len(states)} of {study.limit} trials, {running}{other}best {found}, {limits}{self._left()}"

    def _shown(self) -> Text:
        return Text(self.line(), no_wrap=True, overflow="ellipsis")

    def _left(self) -> str:
        done = len(self.study.trials) - self.before
        if self.study.stopping:
            return ", ending"
        if not done:
            return ""
        seconds = (time.monotonic() - self.start) / done * (self.study.limit - len(self.study.trials))
        return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"

    def _say(self, text: str) -> None:
        self._note(text)
        self.screen.print(text, markup=False, highlight=False)

    def _note(self, text: str) -> None:
        with suppress(OSError), self.log.open("a") as file:  # a full disk is for the study to report
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def trial_line(trial: Trial) -> str:
    """A trial in words."""
    if trial.state == "failed":
        return f"trial {trial.number}: failed, {trial.error}"
    if trial.objective is None:
        return f"trial {trial.number}: stopped at {trial.rungs[-1]:.5g} on fidelity {len(trial.rungs)}"
    score = "" if trial.score is None else f", score {trial.score:.2%}"
    return (
        f"trial {trial.number}: objective {trial.objective:.5g}{score}, {trial.cost.params:,} parameters, "
        f"{trial.seconds:.1f} s"
    )
