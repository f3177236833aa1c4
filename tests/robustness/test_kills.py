"""kill -9 at random moments, again and again: no recorded trial is lost, repeated or changed.

`pytest -m slow tests/robustness/test_kills.py -s` prints, for every kind of kill, what was lost and how long recovery
took.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from rankopt.core.errors import StudyError
from rankopt.search.storage.local import read_trials
from tests.helpers.search_to_kill import run

TRIALS = {"driver": 25, "ray driver": 10, "ray worker": 25, "both": 10}  # of one search; there are as many as it takes
KILLS = {"driver": 26, "ray driver": 8, "ray worker": 10, "both": 8}  # more than 50 in all


def told(out: Path):
    """What the study holds: nothing before it is made."""
    try:
        return [(t["cost"], t["objective"], t["state"]) for t in read_trials(out)]
    except StudyError:
        return []


def count(out: Path) -> int:
    """The number of recorded trials, read without opening the study."""
    try:
        with closing(sqlite3.connect(f"file:{out / 'study.db'}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT count(*) FROM trials").fetchone()[0]
    except sqlite3.Error:
        return 0


def workers(log: Path) -> set[int]:
    """The processes that evaluate."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return {pid for pid in (int(line.split()[1]) for line in lines[-3:]) if Path(f"/proc/{pid}").exists()}


class Torture:
    """One study, killed until it is done."""

    def __init__(self, folder: Path, seed: int, ray: int, what: str, rng: random.Random):
        self.out, self.log, self.seed, self.ray, self.what, self.rng = (
            folder / "run",
            folder / "log",
            seed,
            ray,
            what,
            rng,
        )
        self.kills, self.recoveries = 0, []

    def start(self):
        arguments = [self.out, self.seed, TRIALS[self.what], self.ray, self.log]
        command = [sys.executable, "-m", "tests.helpers.search_to_kill", *map(str, arguments)]
        with self.log.with_suffix(".err").open("a") as err:
            return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": "."}, stderr=err)

    def wait(self, process, trials):
        """Wait for a number of recorded trials, or for the end of the process."""
        while process.poll() is None and count(self.out) < trials:
            time.sleep(0.05)

    def round(self, most: int) -> bool:
        """Run until a kill; whether the search is at its end."""
        before, start, logged = told(self.out), time.monotonic(), len(self.plans())
        process = self.start()
        if self.what == "ray worker":
            self.kill_workers(process, most)
        elif self.rng.random() < 0.75:  # else at any moment of its start
            self.wait(process, len(before) + 1)
            self.recoveries.append(time.monotonic() - start)
            time.sleep(self.rng.uniform(0, 1.2))
        else:
            time.sleep(self.rng.uniform(0, 6))
        if process.poll() is None and self.what != "ray worker":
            for pid in workers(self.log) - {process.pid} if self.what == "both" else ():
                os.kill(pid, signal.SIGKILL)
            process.kill()
            self.kills += 1
        code = process.wait(300)
        assert code in (0, -signal.SIGKILL), self.log.with_suffix(".err").read_text()[-2000:]
        assert told(self.out)[: len(before)] == before
        done = list(dict.fromkeys(self.plans()))[
            : len(before)
        ]  # one worker: plans are told in the order of their starts
        assert not set(self.plans()[logged:]) & set(done), "a told plan was evaluated again"
        return code == 0

    def plans(self) -> list[str]:
        """Of all evaluations that started, in order."""
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        return [line.split(maxsplit=2)[2] for line in lines if line.startswith("start")]

    def kill_workers(self, process, most: int) -> None:
        """The driver lives on, and its search ends."""
        self.wait(process, 1)
        while self.kills < most:
            time.sleep(self.rng.uniform(0, 2))
            if process.poll() is not None or not (pids := workers(self.log)):
                break
            at = time.monotonic()
            os.kill(self.rng.choice(sorted(pids)), signal.SIGKILL)
            self.kills += 1
            self.wait(process, count(self.out) + 2)
            self.recoveries.append(time.monotonic() - at)

    def check(self):
        """Every plan is recorded once, evaluated to its end once, and as in an undisturbed search."""
        calm = self.out.parent / "calm"
        run(calm, self.seed, TRIALS[self.what], 0, self.log.with_name("calm.log"))
        assert [t[0] for t in told(self.out)] == [t[0] for t in told(calm)]
        assert [t[1] for t in told(self.out)] == pytest.approx([t[1] for t in told(calm)], rel=1e-4)
        starts = Counter(self.plans())
        assert len(starts) == TRIALS[self.what]
        return sum(starts.values()) - len(starts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", KILLS)
def test_random_kills(what, tmp_path):
    if what != "driver":
        pytest.importorskip("ray")
    rng = random.Random(7)
    kills, again, recoveries, seed = 0, 0, [], 0
    while kills < KILLS[what]:
        folder = tmp_path / str(seed)
        folder.mkdir()
        torture = Torture(folder, seed, int(what != "driver"), what, rng)
        while not torture.round(KILLS[what] - kills):
            assert told(torture.out) or torture.kills
        kills, seed = kills + torture.kills, seed + 1
        again += torture.check()
        recoveries += torture.recoveries
        assert again <= kills, "more than what ran was evaluated again"
    recoveries.sort()
    median = recoveries[len(recoveries) // 2]
    print(
        f"\n{what}: {kills} kills in {seed} searches of {TRIALS[what]} trials; told ones lost: 0, repeated: 0; "
        f"running ones evaluated again: {again}; "
        f"seconds to the next trial told: median {median:.1f}, most {recoveries[-1]:.1f}"
    )
