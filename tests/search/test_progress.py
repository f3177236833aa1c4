"""Progress where there is no terminal: lines at regular intervals, which end when the work ends. No test sleeps."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time

import pytest
from rich.console import Console

from rankopt.core.progress import Work
from rankopt.search.compress import run_search
from rankopt.search.loop import search
from rankopt.search.progress import (
    INTERVAL,
    Heartbeat,
    LiveRunner,
    ProgressBar,
    _StandardError,
    duration,
    time_left,
)
from rankopt.search.settings import SearchSettings

SOON = 0.001  # seconds between lines, so that nothing waits for 30


class Output(io.StringIO):
    """A file in which a line can be waited for."""

    def __init__(self):
        super().__init__()
        self.changed = threading.Condition()

    def write(self, text):
        with self.changed:
            self.changed.notify_all()
            return super().write(text)

    def lines(self):
        return self.getvalue().splitlines()

    def wait_for(self, line):
        with self.changed:
            assert self.changed.wait_for(lambda: line in self.lines(), timeout=20), self.lines()[-3:]


class FakeClock:
    """Seconds that pass only when a test says so."""

    now = 1000.0

    def __call__(self):
        return self.now


def beating():
    """Whether a heartbeat's thread runs."""
    return any(t.name == "rankopt-progress" for t in threading.enumerate())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (45, "45 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (3900, "1 h 5 min"),
        (90000, "25 h"),
    ],
)
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_is_rounded():
    assert time_left(0, 145, 30) == time_left(1.4, 145, 30) == time_left(0, 0, 30) == ""
    assert time_left(14, 145, 130) == "about 20 min left"
    assert time_left(1, 3, 101) == "about 3 min 20 s left"
    assert time_left(9, 10, 90) == "about 10 s left"


def test_a_file_gets_a_line_while_one_item_takes_long():
    out, clock = Output(), FakeClock()
    bar = ProgressBar(Console(file=out, width=40), SOON, clock)
    for i in bar(range(145), "fitting layers", 145):
        if i == 0:
            clock.now += 31
            out.wait_for("fitting layers: 0 of 145, 31 s elapsed")
        if i == 14:
            clock.now += 99
            out.wait_for("fitting layers: 14 of 145, 2 min 10 s elapsed, about 20 min left")
            bar.note("fitting layers, loss 0.5")
            out.wait_for("fitting layers, loss 0.5: 14 of 145, 2 min 10 s elapsed, about 20 min left")
    assert not beating()
    assert out.lines()[-1] == "fitting layers, loss 0.5: 145 in 2 min 10 s"


def test_the_time_left_follows_the_work_of_items_not_their_number():
    """The first of three fits is nine tenths of the work: 90 s for it leave 10 s, not 180."""
    out, clock = Output(), FakeClock()
    fits = Work(["wide", "small", "tiny"], {"wide": 90.0, "small": 6.0, "tiny": 4.0}.__getitem__, 100.0)
    for name in ProgressBar(Console(file=out, width=40), SOON, clock)(fits, "fitting layers", 3):
        if name == "wide":
            clock.now += 90
        elif name == "small":
            out.wait_for("fitting layers: 1 of 3, 1 min 30 s elapsed, about 10 s left")
    assert out.lines()[-1] == "fitting layers: 3 in 1 min 30 s"
    bar = ProgressBar(Console(file=Output(), force_terminal=True))(fits, "fitting layers", 3)
    assert list(bar) == ["wide", "small", "tiny"], "a bar takes them, too"


def test_short_work_says_only_that_it_is_done():
    out, clock = Output(), FakeClock()
    bar = ProgressBar(Console(file=out), clock=clock)
    assert bar.interval == INTERVAL == 30
    for _ in bar(range(3), "fitting layers", 3):
        clock.now += 0.5
    assert out.lines() == ["fitting layers: 3 in 1.5 s"]
    assert list(bar([], "fitting layers", 0)) == [] and len(out.lines()) == 1


def test_lines_end_when_the_work_fails():
    out = Output()
    bar = ProgressBar(Console(file=out), SOON, FakeClock())
    with pytest.raises(ValueError, match="on purpose"):
        for _ in bar(range(3), "fitting layers", 3):
            out.wait_for("fitting layers: 0 of 3, 0 s elapsed")
            raise ValueError("on purpose")
    assert not beating() and not any(" in " in line for line in out.lines())


def test_a_line_that_cannot_be_printed_does_not_end_the_work():
    tried = threading.Event()

    def broken(_):
        tried.set()
        raise OSError("the disk is full")

    with Heartbeat(lambda: "", broken, SOON):
        assert tried.wait(20) and beating()
    assert not beating()


def test_on_a_terminal_there_is_a_bar_and_no_thread_of_lines():
    out = Output()
    for _ in ProgressBar(Console(file=out, force_terminal=True), SOON)(range(2), "fitting layers", 2):
        assert not beating()
    assert "elapsed" not in out.getvalue() and "fitting layers: 2 in 0.0 s" in out.getvalue()


def test_a_search_without_a_terminal_says_how_it_goes_during_a_trial(digits, tmp_path):
    out, clock = Output(), FakeClock()

    def slowly(study, evaluate):
        def evaluated(proposal):
            if not study.trials:
                clock.now += 100
                out.wait_for("0 of 3 trials, 1 running, best nothing yet, params ≤ 11,465, 1 min 40 s elapsed")
            elif len(study.trials) == 1:
                best = f"{study.trials[0].objective:.5g}"
                line = f"1 of 3 trials, 1 running, best {best}, params ≤ 11,465, 1 min 40 s elapsed"
                out.wait_for(f"{line}, about 3 min 20 s left")
            return evaluate(proposal)

        return search(study, evaluated)

    problem = digits.problem({"params": 0.3})
    runner = LiveRunner(slowly, tmp_path, Console(file=out, width=40), SOON, clock)
    run_search(digits, problem, SearchSettings("random", trials=3), tmp_path, runner)
    assert not beating()
    assert sum(line.startswith("trial ") for line in out.lines()) == 3, "a line for every trial, as before"


def test_what_a_signals_handler_says_while_a_line_is_written_follows_the_line():
    """The line is written into a full pipe, so that the signal comes in the middle of it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    full = 0
    while True:
        try:
            full += os.write(writer, b"." * 4096)
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    read, said, main = bytearray(), threading.Event(), threading.main_thread().ident

    def writes():
        return sys._current_frames()[main].f_code.co_name == "_write_buffer"

    def interrupt():
        while not (writes() and not time.sleep(0.05) and writes()):  # twice: it waits for the pipe
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGALRM)
        said.wait(20)
        while found := os.read(reader, 65536):
            read.extend(found)

    def handle(*_):
        try:
            screen.print("finishing what runs")
        finally:
            said.set()

    other = threading.Thread(target=interrupt, daemon=True)
    before = signal.signal(signal.SIGALRM, handle)
    try:
        with os.fdopen(writer, "w", buffering=1) as file:
            screen = _StandardError(file=file)
            other.start()
            screen.print("trial 1: a line")
            screen.print("trial 2: another line")
    finally:
        signal.signal(signal.SIGALRM, before)
    other.join(20)
    os.close(reader)
    assert read[full:].decode().splitlines() == ["trial 1: a line", "finishing what runs", "trial 2: another line"]
