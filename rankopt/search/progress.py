"""Progress displays: bars and a live line on a terminal or in a notebook, a line at least every 30 s elsewhere.

`ProgressBar` shows going through a known number of items, `LiveRunner` a running search. Both write to a screen: the
console on standard error, a notebook's output, a logger, or nowhere. Where nothing can be overwritten, a `Heartbeat`
says how far the work is, also while a single item takes minutes.
"""

from __future__ import annotations

import html
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from rankopt.core.budget import amount
from rankopt.core.errors import RankoptError
from rankopt.core.files import append_text
from rankopt.core.progress import Progress as ProgressFunction
from rankopt.core.progress import Work, graceful_interrupt
from rankopt.core.records import Trial
from rankopt.core.signals import discard_output
from rankopt.core.text import one_line, printable

if TYPE_CHECKING:
    from rankopt.search.loop import Evaluate, Runner, Study

LOG = "search.log"
INTERVAL = 30.0  # seconds between lines where there is no terminal
NOTEBOOK_INTERVAL = 0.5  # seconds between updates of a notebook's output

log = logging.getLogger("rankopt")


# --- screens -----------------------------------------------------------------------------------------


class _StandardError(Console):
    """Standard error. Where nobody reads any more, as after `2>&1 | head`, the work goes on without a display."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._waiting: list[Callable[[], None]] = []

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard_output(2)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, with control characters in texts written as escapes.

        What the handler of a signal prints while a line is being written, which Python refuses, follows that line.
        """
        texts = [printable(x) if isinstance(x, str) else x for x in objects]
        line = partial(super().print, *texts, **options)
        try:
            line()
        except RuntimeError as error:
            if "reentrant call" not in str(error):
                raise
            self._waiting.append(line)
            return
        while self._waiting:
            self._waiting.pop(0)()


console = _StandardError(stderr=True, force_jupyter=False)


class NotebookScreen:
    """The output of a notebook's cell. A live line is one output that is overwritten; it needs no widgets."""

    is_terminal = False

    def print(self, text: str, **style: Any) -> None:
        """Show a line; the style is for terminals."""
        from IPython.display import display

        display(NotebookLine(text))

    @contextmanager
    def live(self, line: Callable[[], NotebookLine]) -> Iterator[None]:
        """Context: a line that is kept up to date, and cleared at the end.

        Args:
            line: Returns the line; called in a thread.
        """
        from IPython.display import display

        shown = display(line(), display_id=True)
        with Heartbeat(line, shown.update, NOTEBOOK_INTERVAL):
            yield
        shown.update(NotebookLine(""))


class NotebookLine:
    """A line of a notebook's output, with a bar before it if a share is given.

    Args:
        text: The line.
        share: How much is done, from 0 to 1.
    """

    def __init__(self, text: str, share: float | None = None) -> None:
        self.text, self.share = text, share

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        bar = "" if self.share is None else f'<progress value="{self.share:.4f}" max="1"></progress> '
        return f'<div style="font-family: monospace; white-space: pre-wrap">{bar}{html.escape(self.text)}</div>'


class LogScreen:
    """The logger "rankopt", at level INFO."""

    is_terminal = False

    def print(self, text: str, **style: Any) -> None:
        """Log a line; the style is for terminals."""
        log.info("%s", text)


class NoScreen:
    """Shows nothing."""

    is_terminal = False

    def print(self, text: str, **style: Any) -> None:
        """Drop a line."""


Screen = Console | NotebookScreen | LogScreen | NoScreen
"""Where progress is shown."""


def default_screen() -> Screen:
    """The screen where someone looks: a notebook's output or a terminal, else the logger."""
    if in_notebook():
        return NotebookScreen()
    return console if console.is_terminal else LogScreen()


def in_notebook() -> bool:
    """Whether this code runs in the kernel of a notebook. IPython is not imported for that."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def displays(
    progress: bool | ProgressFunction | None,
) -> tuple[ProgressFunction, Callable[[Runner, Path | None], Runner]]:
    """The displays of a search's stages and of its trials.

    Args:
        progress: None shows bars on a terminal and in a notebook, and logs lines elsewhere (logger "rankopt", level
            INFO). True prints lines on standard error there. False shows nothing. A function is called as
            progress(items, what, total) and yields the items.

    Returns:
        The progress function, and a function that wraps the runner of a search in a run folder.

    Raises:
        RankoptError: For anything else.
    """
    if callable(progress):
        return progress, lambda runner, folder: CountingRunner(runner, progress)
    if progress not in (None, True, False):
        raise RankoptError(f"progress is {progress!r}: give True, False or a function of (items, what, total)")
    screen = NoScreen() if progress is False else default_screen()
    if progress and isinstance(screen, LogScreen):
        screen = console

    def show(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        return items if progress is False else ProgressBar(screen)(items, what, total)

    return show, lambda runner, folder: LiveRunner(runner, folder, screen)


# --- durations ---------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Write a duration in words: "45 s", "3 min 20 s", "1 h 5 min".

    Args:
        seconds: The duration, rounded to seconds, or to minutes from an hour on.
    """
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


KNOWN = 0.01
"""Share of the work from which on the time left is predicted: the first items to end may be the shortest by far."""


def time_left(done: float, total: float, elapsed: float) -> str:
    """Estimate how long the rest will take, as "about 18 min left"; empty while hardly anything is done.

    Args:
        done: Work done within `elapsed`: a number of items or of operations.
        total: All work to do, in the same unit.
        elapsed: Seconds since the first began.
    """
    if not done or done < KNOWN * total:
        return ""
    seconds = elapsed / done * max(total - done, 0)
    step = 1 if seconds < 60 else 10 if seconds < 600 else 60  # an estimate is no more exact than that
    return f"about {duration(round(seconds / step) * step)} left"


class Heartbeat:
    """Prints a line at regular intervals, from a daemon thread, as long as the `with` block lasts.

    Args:
        line: Returns the line to print; called in the thread.
        say: Prints it.
        interval: Seconds between lines. Nothing is printed within the first interval.
    """

    def __init__(self, line: Callable[[], Any], say: Callable[[Any], None], interval: float = INTERVAL) -> None:
        self._line, self._say, self._interval = line, say, interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="rankopt-progress", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if threading.current_thread() is not self._thread:  # garbage collection may close a generator in any thread
            self._thread.join(timeout=1.0)

    def _beat(self) -> None:
        while not self._over.wait(self._interval):
            with suppress(Exception):  # a display must not end or clutter the work that it shows
                self._say(self._line())


def show_progress(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """Go through items with a `ProgressBar` on standard error.

    Args:
        items: What to go through.
        what: What is being done, as "fitting layers".
        total: Number of items.

    Yields:
        The items.
    """
    yield from ProgressBar()(items, what, total)


class ProgressBar:
    """A progress display with a text that can be changed while it is shown.

    On a terminal and in a notebook it is a bar that goes when all is done. Elsewhere it is a line every `interval`
    seconds, as "fitting layers: 14 of 145, 2 min 10 s elapsed, about 20 min left". In all cases a line is printed at
    the end.

    Args:
        screen: Where to print.
        interval: Seconds between lines where there is no terminal.
        clock: Returns the time in seconds.
    """

    def __init__(
        self, screen: Screen = console, interval: float = INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.screen, self.interval, self.clock = screen, interval, clock
        self.text = ""

    def __call__(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        """Go through items, as `show_progress`."""
        if total == 0:
            yield from items
            return
        self.text, start = what, self.clock()
        work = items if isinstance(items, Work) else Work(items, lambda _: 1.0, total)
        shown = self._bar(self.screen, total, work.total) if _draws(self.screen) else None
        with shown or self.lines(lambda: self.text, total, work=work.total) as advance:
            for item in work:
                yield item
                advance(work.of(item))
        elapsed = self.clock() - start
        self.say(f"{self.text}: {total} in {f'{elapsed:.1f} s' if elapsed < 60 else duration(elapsed)}")

    @contextmanager
    def _bar(self, screen: Console, total: int, work: float) -> Iterator[Callable[[float], None]]:
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
        columns += [TextColumn("{task.fields[items]}/{task.fields[of]}"), TimeElapsedColumn(), TimeRemainingColumn()]
        done = 0

        def advance(by: float) -> None:
            nonlocal done
            done += 1
            progress.update(task, advance=by, items=done, description=one_line(self.text))

        with Progress(*columns, console=screen, transient=True) as progress:
            task = progress.add_task(one_line(self.text), total=work, items=0, of=total)
            yield advance

    @contextmanager
    def lines(
        self, text: Callable[[], str], total: int, before: int = 0, work: float | None = None, alone: bool = False
    ) -> Iterator[Callable[..., None]]:
        """Context: where there is no bar, a line says how many steps are done.

        Args:
            text: Returns what is being done.
            total: Number of steps.
            before: How many of them were done before.
            work: The work of the steps that are left, from which the time left is predicted. Default: their number.
            alone: Whether nothing within draws: then the line is shown on a terminal, too.

        Yields:
            A function to call after every step, with its work unless all steps have the same.
        """
        start, done, spent = self.clock(), 0, 0.0
        left_to_do = total - before if work is None else work

        def advance(by: float = 1.0) -> None:
            nonlocal done, spent
            done, spent = done + 1, spent + by

        def share() -> float:
            return (before + (total - before) * spent / (left_to_do or 1)) / max(total, 1)

        def line() -> str:
            elapsed = self.clock() - start
            left = time_left(spent, left_to_do, elapsed)
            return f"{text()}: {before + done} of {total}, {duration(elapsed)} elapsed" + (left and f", {left}")

        # On a terminal the work within draws for itself: rich has one live display at a time.
        live = nullcontext() if _draws(self.screen) and not alone else _live(self.screen, line, share, self.interval)
        with live:
            yield advance

    def note(self, text: str) -> None:
        """Change the text beside the bar.

        Args:
            text: The new text.
        """
        self.text = text

    def say(self, text: str) -> None:
        """Print a line.

        Args:
            text: The line.
        """
        self.screen.print(one_line(text), markup=False, highlight=False, soft_wrap=True)


def _draws(screen: Screen) -> TypeGuard[Console]:
    """Whether rich draws here."""
    return screen.is_terminal


def _live(
    screen: Screen, line: Callable[[], str], share: Callable[[], float], interval: float
) -> AbstractContextManager[Any]:
    """Context: a line is kept up to date, or printed at intervals where nothing can be overwritten."""
    if _draws(screen):
        shown = partial(Text, no_wrap=True, overflow="ellipsis")
        return Live(get_renderable=lambda: shown(line()), refresh_per_second=2, transient=True, console=screen)
    if isinstance(screen, NotebookScreen):
        return screen.live(lambda: NotebookLine(line(), share()))
    return Heartbeat(line, partial(_print_line, screen), interval)


def _print_line(screen: Screen, text: str, style: str = "") -> None:
    screen.print(one_line(text), style=style, markup=False, highlight=False, soft_wrap=not screen.is_terminal)


class LiveRunner:
    """A runner that shows the search of another runner and logs its trials; Ctrl-C ends it in good order.

    On a terminal and in a notebook one line is kept up to date. Elsewhere there is a line for every trial, and the line
    that a terminal would show every `interval` seconds, so that long trials are not silent either.

    Args:
        runner: Evaluates the trials.
        folder: The run folder; trials are logged to `search.log` in it. None for no such file.
        screen: Where to print.
        interval: Seconds between lines where there is no terminal.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        runner: Runner,
        folder: Path | None = None,
        screen: Screen = console,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner, self.log, self.screen = runner, folder and folder / LOG, screen
        self.interval, self.clock = interval, clock
        self.best = float("inf")

    def __call__(self, study: Study, evaluate: Evaluate) -> list[Trial]:
        """Run a search.

        Args:
            study: The search's trials and settings.
            evaluate: Evaluates a proposal.

        Returns:
            The trials, as the runner returns them.
        """
        from rankopt.candidates.pool import release_workers

        release_workers()
        self.study, self.start, self.before = study, self.clock(), len(study.trials)
        self.best = min((t.objective for t in study.trials if t.objective is not None), default=float("inf"))
        study.report = self.on_trial
        self._note(f"search starts: {self.before} of {study.limit} trials are done")
        line = partial(self.line, with_elapsed=not _draws(self.screen))
        display = _live(self.screen, line, lambda: len(study.trials) / study.limit, self.interval)
        with graceful_interrupt(study, self._say, take_default=False), display:
            return self.runner(study, evaluate)

    def on_trial(self, trial: Trial) -> None:
        """Log a finished trial and print it if it is the best so far or has failed; without a terminal always.

        Args:
            trial: The trial.
        """
        text = trial_line(trial)
        better = trial.objective is not None and trial.objective < self.best
        if trial.objective is not None and better:
            self.best = trial.objective
        self._note(text)
        overwrites = _draws(self.screen) or isinstance(self.screen, NotebookScreen)
        if better or trial.state == "failed" or not overwrites:
            _print_line(self.screen, text + " *" * better, "red" if trial.state == "failed" else "")

    def line(self, with_elapsed: bool = False) -> str:
        """Say in one line how many trials are done, running and failed, the best so far, the budget and the time left.

        Args:
            with_elapsed: Whether to say how long the search has taken, too.
        """
        study = self.study
        states = [t.state for t in study.trials]
        running = f"{len(study.pending)} running, " * bool(study.pending)
        other = "".join(f"{n} {what}, " for what in ("failed", "stopped") if (n := states.count(what)))
        found = "nothing yet" if self.best == float("inf") else f"{self.best:.5g}"
        limits = ", ".join(f"{x.metric} ≤ {amount(x.metric, x.target)}" for x in study.problem.limits)
        elapsed = f", {duration(self.clock() - self.start)} elapsed" * with_elapsed
        return f"{len(states)} of {study.limit} trials, {running}{other}best {found}, {limits}{elapsed}{self._left()}"

    def _left(self) -> str:
        if self.study.stopping:
            return ", ending"
        # Trials of an earlier process took none of this one's time.
        done, total = len(self.study.trials) - self.before, self.study.limit - self.before
        left = time_left(done, total, self.clock() - self.start)
        return left and f", {left}"

    def _say(self, text: str) -> None:
        self._note(text)
        _print_line(self.screen, text)

    def _note(self, text: str) -> None:
        if self.log is None:
            return
        with suppress(OSError):  # a full disk is for the study to report
            append_text(self.log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {one_line(text)}\n")


class CountingRunner:
    """A runner that passes the trials of another runner through a user's own progress display, such as tqdm's.

    Args:
        runner: Evaluates the trials.
        progress: The display.
    """

    def __init__(self, runner: Runner, progress: ProgressFunction) -> None:
        self.runner, self.progress = runner, progress

    def __call__(self, study: Study, evaluate: Evaluate) -> list[Trial]:
        """Run a search, as `LiveRunner`."""
        left = study.limit - len(study.trials)
        # A display goes on when it is asked for the next item.
        items = iter(self.progress(range(left), "evaluating plans", left))
        next(items, None)
        study.report = lambda trial: next(items, None)
        with graceful_interrupt(study, log.warning, take_default=False):
            trials = self.runner(study, evaluate)
        getattr(items, "close", lambda: None)()  # the search may have ended early
        return trials


def trial_line(trial: Trial) -> str:
    """Describe a trial in one line: its objective, score, parameters and seconds, or why it failed.

    Args:
        trial: The trial.
    """
    if trial.state == "failed":
        return f"trial {trial.number}: failed, {trial.error}"
    if trial.objective is None:
        return f"trial {trial.number}: stopped at {trial.rungs[-1]:.5g} on fidelity {len(trial.rungs)}"
    score = "" if trial.score is None else f", score {trial.score:.2%}"
    return (
        f"trial {trial.number}: objective {trial.objective:.5g}{score}, {trial.cost.params:,} parameters, "
        f"{trial.seconds:.1f} s"
    )
