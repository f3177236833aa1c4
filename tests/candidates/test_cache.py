"""The cache: private, pruned, and of no use to whoever else writes to it."""

from __future__ import annotations

import os
import time

import pytest
import torch

from rankopt.candidates.cache import Cache, FactorStore
from rankopt.core.errors import RankoptError
from tests.helpers.command import run

HASH = "-" + 32 * "0"


def test_a_new_cache_is_private(tmp_path):
    old = os.umask(0)
    try:
        folder = Cache(tmp_path / "a" / "cache").folder
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702])
def test_a_cache_that_others_can_write_to_is_refused(tmp_path, mode):
    Cache(tmp_path / "cache").folder.chmod(mode)
    with pytest.raises(RankoptError, match=r"can be written by others, .*chmod go-w .*cache"):
        Cache(tmp_path / "cache")
    (tmp_path / "cache").chmod(0o755)
    Cache(tmp_path / "cache")


def test_a_link_in_the_cache_is_not_written_through(tmp_path):
    cache, private = Cache(tmp_path / "cache"), tmp_path / "private"
    private.write_text("secret")
    cache.path("key", "json").symlink_to(private)
    with pytest.raises(RankoptError, match="symbolic link"):
        cache.write_json("key", [1])
    assert cache.read_json("key", list[int]) is None and private.read_text() == "secret"


def aged(cache, hours):
    for key, age in hours.items():
        cache.write_tensors(key + HASH, {"0.0": torch.zeros(1000)})
        used = time.time() - 3600 * age
        os.utime(cache.path(key + HASH, "safetensors"), (used, used))


def kept(cache):
    return {p.stem.removesuffix(HASH) for p in cache.folder.iterdir()}


def test_what_was_used_the_longest_ago_goes_first(tmp_path):
    cache = Cache(tmp_path)
    aged(cache, {"new": 1, "old": 100, "older": 200, "oldest": 300})
    _ = FactorStore(cache)[f"oldest{HASH}/0"]  # now it is the newest
    assert cache.prune(2 * 4200)[0] == 2
    assert kept(cache) == {"new", "oldest"}
    assert cache.prune(0) == (0, 0), "what was used within a day may belong to a search that runs"
    assert cache.prune(0, spared=0)[0] == 2 and not kept(cache)


def test_the_command_shows_and_prunes(tmp_path):
    cache = Cache(tmp_path / "cache")
    aged(cache, {"a": 1, "b": 2})
    assert "2 entries" in run("cache", "--cache", cache.folder)[0] and len(kept(cache)) == 2
    out, _ = run("cache", "--prune", "--keep", "0.000005", "--cache", cache.folder)
    assert "removed: 1 entries" in out and kept(cache) == {"a"}


def test_files_of_others_in_the_folder_are_never_removed(tmp_path):
    """A folder of models or of a project may have been given as the cache."""
    cache = Cache(tmp_path)
    others = {"package.json", "model.safetensors", ".env.json", "model-00001-of-00002.safetensors", "a.part"}
    for name in others:
        (tmp_path / name).write_bytes(bytes(10_000))
    part = tmp_path / f".statistics{HASH}-0.safetensors.a1b2c3.part"
    part.write_bytes(bytes(10_000))  # left by a process that was killed
    aged(cache, {"fit": 1, "statistics": 2})
    assert cache.size()[0] == cache.prune(0, spared=0)[0] == 3
    assert {p.name for p in tmp_path.iterdir()} == others


def test_entries_of_another_shape_read_as_missing(tmp_path):
    cache = Cache(tmp_path)
    for value in ([], {"a": 1}, [[1]], 3, "x"):
        cache.write_json("curve", value)
        assert cache.read_json("curve", dict[str, tuple[tuple[float, float], ...]]) is None or value == {}
    cache.path("curve", "json").write_text("[" * 100_000)
    assert cache.read_json("curve", list) is None
    for fits in ("[[1, 2]]", "{", "[" * 100_000, '[[["x"], 0.5]]'):
        cache.write_tensors("fit", {"0.0": torch.zeros(1)}, {"fits": fits})
        assert cache.read_metadata("fit", "fits", list[tuple[tuple[int, ...], float]]) is None
