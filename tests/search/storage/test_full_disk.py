"""A full disk is called that, and the advice is to make room."""

from __future__ import annotations

import errno
import os
import sqlite3

import pytest
from safetensors import SafetensorError

from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import write_beside
from rankopt.search.storage import local


class FullConnection(local._LimitedConnection):
    """A database whose disk has no room for another page."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        pages = self.execute("PRAGMA page_count").fetchone()[0]
        self.execute(f"PRAGMA max_page_count = {pages}")


def test_a_study_on_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "study.db"
    local.create_study(path, local.STUDY, {})
    monkeypatch.setattr(local, "_LimitedConnection", FullConnection)
    study = local.load_study(path)
    with pytest.raises(StudyError) as caught, local.storage_errors(path):
        for number in range(100):
            study.set_user_attr(str(number), "x" * 2000)
    said = str(caught.value)
    assert "database or disk is full" in said and "make room there, then go on with --resume" in said
    assert "copy" not in said and "invalid data" not in said and "\n" not in said


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_file_on_a_full_disk(tmp_path, error):
    def write(path):
        raise error

    with pytest.raises(RankoptError, match="make room there, then try again"):
        write_beside(tmp_path / "result.json", write)
    assert not list(tmp_path.iterdir())


def test_another_fault_of_a_database_is_not_called_a_full_disk(tmp_path):
    (tmp_path / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StudyError, match="restore it from a copy"), local.storage_errors(tmp_path / "study.db"):
        local.load_study(tmp_path / "study.db")
    with pytest.raises(StudyError, match="mend that"), local.storage_errors("x"):
        raise sqlite3.OperationalError("attempt to write a readonly database")
