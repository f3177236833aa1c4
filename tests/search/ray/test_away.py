"""What a job writes in a worker comes back as it was there, at any time. Without Ray: what the worker does, here."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from rankopt.candidates.pool import pack
from rankopt.core.errors import RankoptError, StudyError, TaskError
from rankopt.search.ray.away import Job, Resources, Workplace, _Running

STEPS: dict[str, threading.Event] = {}


def do(shared, desk, steps):
    """Take the steps, each when it is allowed to."""
    for number, step in enumerate(steps):
        STEPS[f"go {number}"].wait(30)
        step(desk)
        STEPS[f"done {number}"].set()
    return shared


def begun(folder, *steps, files=()):
    STEPS.clear()
    STEPS.update({f"{what} {n}": threading.Event() for n in range(len(steps)) for what in ("go", "done")})
    job = Job("the work", do, None, (steps,), folder, files)
    content = {name: (folder / name).read_bytes() for name in files}
    place = Workplace(pack("what was sent", other_machines=False), job, content, Resources(1, 0, 1))
    return place, _Running(job, None, set(files))


def step(place, running, number):
    """Allow a step, wait until it is done, and take what has changed."""
    STEPS[f"go {number}"].set()
    assert STEPS[f"done {number}"].wait(30)
    update = place.poll(0)
    running.take(update)
    return update


def texts(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def written(**files):
    def write(desk):
        for name, text in files.items():
            path = desk.folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True) if text is None else path.write_text(text)

    return write


def test_files_come_back_as_they_are_written_changed_and_removed(tmp_path):
    (tmp_path / "old").write_text("kept")
    place, running = begun(
        tmp_path,
        written(b="1", a__c="2"),
        written(b="1 and more", x="3"),
        written(a__c=None, old=None),
        files=("old",),
    )
    first = step(place, running, 0)
    assert list(first.files) == ["b", "a/c"] and texts(tmp_path) == {"old": "kept", "b": "1", "a/c": "2"}
    assert running.names == {"old", "b", "a/c"}, "what another worker would begin with"
    assert list(step(place, running, 1).files) == ["b", "x"], "only what has changed"
    step(place, running, 2)
    place.poll(30)
    assert texts(tmp_path) == {"b": "1 and more", "x": "3"} and running.names == {"b", "x"}
    place.close()
    assert not place.root.exists()


def test_what_is_half_written_stays_there(tmp_path):
    place, running = begun(tmp_path, written(**{".a.part": "half", "study.db-journal": "half", "a": "whole"}))
    step(place, running, 0)
    assert texts(tmp_path) == {"a": "whole"}
    place.close()


def test_a_database_comes_back_as_it_is_between_two_transactions(tmp_path):
    """Its file holds half a transaction for a moment; a copy of that could not be read."""
    open_ones = []

    def first(desk):
        with closing(sqlite3.connect(desk.folder / "study.db")) as base, base:
            base.execute("CREATE TABLE t (x BLOB)")
            base.executemany("INSERT INTO t VALUES (?)", [[b"a" * 3000]] * 100)

    def half(desk):
        base = sqlite3.connect(desk.folder / "study.db", isolation_level=None)
        base.execute("PRAGMA cache_size = 1")  # so that pages are written before the transaction ends
        open_ones.append(base)
        base.execute("BEGIN")
        base.execute("UPDATE t SET x = ?", [b"b" * 3000])

    def whole(desk):
        open_ones.pop().execute("COMMIT")

    place, running = begun(tmp_path, first, half, whole)

    def values():
        with closing(sqlite3.connect(tmp_path / "study.db")) as base:
            return {x[:1] for (x,) in base.execute("SELECT x FROM t")}

    step(place, running, 0)
    assert values() == {b"a"}
    assert "study.db" not in step(place, running, 1).files and values() == {b"a"}
    step(place, running, 2)
    running.take(place.poll(1))
    assert values() == {b"b"}
    place.close()


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (StudyError("no room in {folder}/a"), StudyError, "no room in {here}/a"),
        (ValueError("odd"), TaskError, "the work failed: ValueError: odd"),
    ],
)
def test_an_error_is_one_sentence_that_names_the_folder_here(error, kind, said, tmp_path):
    def fail(desk):
        raise type(error)(str(error).format(folder=desk.folder))

    place, _ = begun(tmp_path, fail)
    STEPS["go 0"].set()
    update = place.poll(30)
    assert update.ended and type(update.error) is kind and isinstance(update.error, RankoptError)
    assert str(update.error) == said.format(here=tmp_path)
    place.close()


def test_a_job_that_is_asked_to_stop_says_that_it_did(tmp_path):
    def until_stopped(desk):
        desk.note("at work")
        while not desk.stop():
            pass
        raise KeyboardInterrupt

    place, _ = begun(tmp_path, until_stopped)
    STEPS["go 0"].set()
    while place.poll(0).note != "at work":
        pass
    place.stop()
    update = place.poll(30)
    assert update.ended and update.stopped and update.error is None and update.result is None
    place.close()


def test_a_job_without_a_folder_leaves_nothing(tmp_path):
    place, running = begun(None, written(a="1"))
    assert not step(place, running, 0).files
    assert place.poll(30).result == "what was sent" and not Path("a").exists()
    place.close()
