"""Files are written whole, beside no other, through no link, and read only up to a size."""

from __future__ import annotations

import os
import threading

import pytest

from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import append_text, read_bytes, write_beside
from rankopt.core.run_folder import open_folder
from rankopt.search.progress import LiveRunner
from rankopt.search.storage.local import check_folder, create_study, load_study


@pytest.fixture
def private(tmp_path):
    """A file that only its owner may read, outside the folder of the test."""
    path = tmp_path / "private"
    path.write_text("secret")
    path.chmod(0o600)
    yield path
    assert path.read_text() == "secret" and path.stat().st_mode & 0o777 == 0o600


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.mark.parametrize("name", ["report.html", ".report.html.{pid}.part", ".report.html.part"])
def test_a_link_does_not_lead_to_a_write_outside(folder, private, name):
    link = folder / name.format(pid=os.getpid())
    link.symlink_to(private)
    if name == "report.html":
        with pytest.raises(RankoptError, match=r"report\.html is a symbolic link, .*remove it"):
            write_beside(folder / "report.html", lambda p: p.write_text("page"))
    else:
        write_beside(folder / "report.html", lambda p: p.write_text("page"))
        assert (folder / "report.html").read_text() == "page"
    assert link.is_symlink()


@pytest.mark.parametrize("name", ["search.log", "study.db", "result.json", "trained/result.json", "logs", "extra"])
def test_a_run_folder_with_a_link_is_not_resumed(folder, private, name):
    create_study(folder / "real.db", "rankopt", {})
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(private)
    with pytest.raises(StudyError, match=rf"{name} is a symbolic link"):
        open_folder(folder, resume=True, kept="*")


@pytest.mark.parametrize("name", ["logs", "logs/ray.out", ".a.part"])
def test_what_a_command_leaves_behind_and_begins_again_with_holds_no_link(folder, private, name):
    """`rankopt sweep` goes on in a folder that holds nothing but logs."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(private)
    with pytest.raises(StudyError, match="symbolic link"):
        open_folder(folder, resume=None)


def test_a_study_and_a_log_that_are_links_are_left_alone(folder, private):
    (folder / "search.log").symlink_to(private)
    LiveRunner(lambda study, evaluate: [], folder)._note("a line")
    with pytest.raises(OSError, match="symbolic link"):
        append_text(folder / "search.log", "a line")
    (folder / "study.db").symlink_to(private)
    for use in (load_study, lambda path: check_folder(path.parent)):
        with pytest.raises(StudyError, match="symbolic link"):
            use(folder / "study.db")


def test_a_probe_of_the_storage_has_no_name_that_can_be_foreseen(folder, private):
    (folder / f".study.db.{os.getpid()}.part").symlink_to(private)
    check_folder(folder)


def test_a_file_keeps_its_mode(folder):
    path = folder / "result.json"
    for mode in (0o600, 0o640, 0o644):
        path.write_text("old")
        path.chmod(mode)
        write_beside(path, lambda p: p.write_text("new"))
        assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", mode)


def test_threads_that_write_one_file_do_not_meet(folder):
    path, errors = folder / "entry", []

    def write(text):
        try:
            for _ in range(50):
                write_beside(path, lambda p: p.write_text(text * 1000))
        except RankoptError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(x,)) for x in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(set(path.read_text())) == 1 and list(folder.iterdir()) == [path]


def test_what_may_never_end_is_not_read(folder):
    os.mkfifo(folder / "pipe")
    (folder / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        with pytest.raises(ValueError, match="no regular file"):
            read_bytes(folder / name, 100)
    (folder / "file").write_bytes(bytes(101))
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        read_bytes(folder / "file", 100)
    assert read_bytes(folder / "file", 101) == bytes(101)
