"""The cache on disk for statistics, fitted factors and sensitivities, in files named by content hash."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from rankopt.core.errors import RankoptError
from rankopt.core.files import digest, open_tensors, write_beside
from rankopt.core.schema import checked, parse_json, read_json
from rankopt.core.text import reason
from rankopt.decompositions.linear_algebra import cut
from rankopt.decompositions.types import Factors, Nested

VERSION = 14  # part of every hash: raise it when statistics or fits change, so that old entries are ignored


MOST = 20 * 10**9
"""Bytes that a cache holds by default; see `Cache.prune`."""


CUT_BYTES = 2**28
"""Bytes of cut factors that a process remembers."""


NESTED = ("left", "right", "like")
"""Names of the tensors of an entry of `types.Nested`; the last one has the factors' precision, and no elements."""


SPARED = 86400
"""Seconds for which an entry stays after its last use."""


_OWN = re.compile(r"\.?([\w-]+-)?[0-9a-f]{32}(-\d+)?\.(json|safetensors)(\.\w+\.part)?")
"""Names of entries, and of what a process leaves that is killed while it writes one."""


def crc(tensor: Tensor) -> int:
    """Compute a CRC-32 checksum of a tensor's bytes: far cheaper than a digest, enough against silent damage.

    Args:
        tensor: A tensor on the CPU.
    """
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _sound(file: Any, name: str, tensor: Tensor) -> bool:
    """Whether a tensor matches its checksum."""
    return (file.metadata() or {}).get(f"crc.{name}") == str(crc(tensor))


class _Entry(TypedDict):
    """A JSON entry."""

    value: Any
    checksum: str


class Cache:
    """A folder of safetensors and JSON files named by content hash.

    A damaged entry reads as missing, so that it is recomputed. Writes are atomic. What the cache holds becomes part of
    models, so nobody else may write to it; a folder made here is private.

    Args:
        folder: The folder, created if needed. Default: the environment variable RANKOPT_CACHE, else rankopt's
            folder in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        RankoptError: The folder cannot be created, there is no home folder to create it in, or others can write to it.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        default = os.environ.get("RANKOPT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rankopt"
        self.folder = Path(folder or default)
        try:
            self.folder = self.folder.expanduser()
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            found = self.folder.stat()
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
            raise RankoptError(
                f"the cache {self.folder} cannot be made ({error}): set RANKOPT_CACHE, or --cache, to another folder"
            ) from error

        if hasattr(os, "geteuid") and (found.st_mode & 0o022 or found.st_uid not in (0, os.geteuid())):
            raise RankoptError(
                f"the cache {self.folder} can be written by others, who could change the models made from it: take "
                f"that right away (chmod go-w {self.folder}), or set RANKOPT_CACHE, or --cache, to a folder of your own"
            )

    def prune(self, most: int = MOST, spared: float = SPARED) -> tuple[int, int]:
        """Remove the entries that were used the longest ago until the others fit into a size.

        Args:
            most: The size, in bytes.
            spared: Entries used within this many seconds stay, as a search that runs may need them.

        Returns:
            How many entries were removed, and their bytes.

        Raises:
            RankoptError: An entry cannot be removed.
        """
        entries = sorted((s.st_mtime, s.st_size, path) for path, s in self._entries())
        excess, recent = sum(size for _, size, _ in entries) - most, time.time() - spared
        removed = freed = 0
        for used, size, path in entries:
            if freed >= excess or used > recent:
                break
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise self._unwritable(error) from error
            removed, freed = removed + 1, freed + size
        return removed, freed

    def size(self) -> tuple[int, int]:
        """Count the entries and their bytes."""
        sizes = [s.st_size for _, s in self._entries()]
        return len(sizes), sum(sizes)

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The cache's own files, of which another process may remove some meanwhile; others may lie beside them."""
        for path in self.folder.iterdir():
            if _OWN.fullmatch(path.name):
                with suppress(OSError):
                    yield path, path.lstat()

    def used(self, key: str, suffix: str) -> Path:
        """Return the path of an entry that is about to be read, and note the time of its use.

        Args:
            key: The entry's key.
            suffix: As of `path`.
        """
        path = self.path(key, suffix)
        with suppress(OSError, NotImplementedError):
            os.utime(path, follow_symlinks=False)
        return path

    def check_writable(self) -> None:
        """Check that the folder can be written, before the work whose results it is to keep, and `prune` it.

        Raises:
            RankoptError: It cannot.
        """
        self.prune()
        try:
            with TemporaryFile(dir=self.folder) as file:
                file.write(b"rankopt")
        except OSError as error:
            raise self._unwritable(error) from error

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        try:
            write_beside(path, write)
        except RankoptError as error:
            raise self._unwritable(error.__cause__ or error) from error

    def _unwritable(self, reason: BaseException) -> RankoptError:
        return RankoptError(
            f"the cache {self.folder} cannot be written ({reason}): make room there, or set RANKOPT_CACHE, or --cache, "
            "to another folder"
        )

    def path(self, key: str, suffix: str) -> Path:
        """Return the path of an entry, whether it exists or not.

        Args:
            key: The entry's key.
            suffix: File suffix without the dot: "json" or "safetensors".
        """
        return self.folder / f"{key}.{suffix}"

    def read_json(self, key: str, kind: Any) -> Any:
        """Read a JSON entry.

        Args:
            key: The entry's key.
            kind: The type that its value must have.

        Returns:
            The value, or None if the entry is missing or damaged.
        """
        try:
            kept = read_json(self.used(key, "json"), _Entry)
            return checked(kept["value"], kind) if kept["checksum"] == digest(kept["value"]) else None
        except (OSError, ValueError):
            return None

    def write_json(self, key: str, value: Any) -> None:
        """Write a JSON entry.

        Args:
            key: The entry's key.
            value: Anything that json can write.
        """
        text = json.dumps({"value": value, "checksum": digest(value)})
        self._write(self.path(key, "json"), lambda p: p.write_text(text))

    def read_metadata(self, key: str, name: str, kind: Any) -> Any:
        """Read what the header of an entry of tensors holds beside them.

        Args:
            key: The entry's key.
            name: Its name in `metadata`, as `write_tensors` got it, where it is JSON text.
            kind: The type that its value must have.

        Returns:
            The value, or None if the entry is missing or damaged.
        """
        try:
            with open_tensors(self.used(key, "safetensors")) as file:
                found = file.metadata() or {}
            return parse_json(found[name], kind) if found[f"crc.{name}"] == digest(found[name]) else None
        except (OSError, KeyError, ValueError):
            return None

    def read_tensors(self, key: str, names: Collection[str] | None = None) -> dict[str, Tensor] | None:
        """Read an entry of tensors.

        Args:
            key: The entry's key.
            names: Read only these, as far as they are there.

        Returns:
            Tensors by name, or None if the entry is missing or damaged.
        """
        try:
            with open_tensors(self.used(key, "safetensors")) as file:
                wanted = [name for name in file.keys() if names is None or name in names]  # noqa: SIM118
                found = {name: file.get_tensor(name) for name in wanted}
                return found if all(_sound(file, name, t) for name, t in found.items()) else None
        except (OSError, ValueError):
            return None

    def lost(self) -> RankoptError:
        """The error of an entry that was written and cannot be read back."""
        return RankoptError(f"the cache {self.folder} lost what was just written: is its disk sound?")

    def read_shapes(self, key: str, names: Collection[str]) -> dict[str, list[int]]:
        """Read the shapes of some tensors of an entry, as far as they are there.

        Args:
            key: The entry's key.
            names: Their names.
        """
        try:
            with open_tensors(self.used(key, "safetensors")) as file:
                return {name: file.get_slice(name).get_shape() for name in file.keys() if name in names}  # noqa: SIM118
        except (OSError, ValueError):
            return {}

    def write_tensors(self, key: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write an entry of tensors, with a checksum for each, and for each text beside them.

        Args:
            key: The entry's key.
            tensors: Contiguous tensors by name, on the CPU.
            metadata: Further entries for the file's header.
        """
        texts = metadata or {}
        sums = {f"crc.{name}": str(crc(t)) for name, t in tensors.items()}
        sums |= {f"crc.{name}": digest(text) for name, text in texts.items()}
        self._write(self.path(key, "safetensors"), lambda p: save_file(tensors, p, texts | sums))

    def write_nested(
        self, key: str, nested: Nested, shapes: Sequence[Sequence[Sequence[int]]], metadata: dict[str, str]
    ) -> None:
        """Write the factors of all ranks at once, from which `FactorStore` cuts single ones.

        Args:
            key: The entry's key.
            nested: The factors.
            shapes: Of each rank that may be read, the shapes of its two factors.
            metadata: Further entries for the file's header.
        """
        tensors = (nested.left, nested.right, torch.empty(0, dtype=nested.dtype))
        found = {name: t.cpu().contiguous() for name, t in zip(NESTED, tensors, strict=True)}
        self.write_tensors(key, found, metadata | {"shapes": json.dumps(shapes)})


class FactorStore:
    """Reads candidates' factors from a cache by key, "file/index".

    Factors of all ranks at once (`write_nested`) are cut to the rank that is read.

    Factors that are loaded with `keep` are pickled with the store, for workers on other machines.

    Args:
        cache: The cache.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.kept: dict[str, Factors] = {}
        self._cut: dict[str, Factors] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cut": {}}

    def __getitem__(self, key: str) -> Factors:
        for store in (self.kept, self._cut):
            if key in store:
                return store[key]
        file_key, index = key.rsplit("/", 1)
        try:
            with open_tensors(self.cache.used(file_key, "safetensors")) as file:
                names = file.keys()
                nested, count = NESTED[0] in names, sum(n.startswith(f"{index}.") for n in names)
                wanted = NESTED if nested else [f"{index}.{i}" for i in range(count)]
                found = {name: file.get_tensor(name) for name in wanted}
                sound = all(_sound(file, name, tensor) for name, tensor in found.items())
        except (OSError, ValueError) as error:
            raise RankoptError(f"the candidate cache lost an entry ({reason(error)}): run the search again") from error
        factors = self._cut_rank(file_key, int(index), *found.values()) if nested and sound else tuple(found.values())
        if not sound or factors is None:
            path = self.cache.path(file_key, "safetensors")
            path.unlink(missing_ok=True)
            raise RankoptError(f"{path} is damaged, and removed now: run the search again, which recomputes it")
        return self._remembered(key, factors) if nested else factors

    def _cut_rank(self, key: str, index: int, left: Tensor, right: Tensor, like: Tensor) -> Factors | None:
        """The factors of one of the ranks of an entry; None if it is damaged."""
        shapes = self.cache.read_metadata(key, "shapes", list[tuple[tuple[int, ...], tuple[int, ...]]])
        try:
            return None if shapes is None else cut(left, right, shapes[index], like.dtype)
        except (IndexError, RuntimeError):
            return None

    def _remembered(self, key: str, factors: Factors) -> Factors:
        """Keep what was cut for a while: a search builds many models of the same candidates."""
        self._cut[key] = factors
        while sum(t.nbytes for kept in self._cut.values() for t in kept) > CUT_BYTES and len(self._cut) > 1:
            del self._cut[next(iter(self._cut))]
        return factors

    def keep(self, keys: Iterable[str]) -> None:
        """Load factors into memory.

        Args:
            keys: Keys of candidates.
        """
        self.kept.update({key: self[key] for key in keys})
