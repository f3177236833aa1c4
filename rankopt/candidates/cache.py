"""The cache on disk: statistics, fitted factors and sensitivities, named by content hash."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankopt.core.errors import RankoptError
from rankopt.core.files import digest, write_beside
from rankopt.decompositions.types import Factors

VERSION = 3  # of statistics and fits: raise it when they change, and old cache entries are left behind


def crc(tensor: Tensor) -> int:
    """A checksum against silent damage, far cheaper than a digest."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _sound(file: Any, name: str, tensor: Tensor) -> bool:
    """Whether a tensor is what was written; entries of earlier versions do not say."""
    return (file.metadata() or {}).get(f"crc.{name}") in (None, str(crc(tensor)))


class Cache:
    """A folder of safetensors and JSON files named by content hash. Damaged entries are made anew.

    Default: RANKOPT_CACHE, else ~/.cache/rankopt. Files are written beside and renamed.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        default = os.environ.get("RANKOPT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "rankopt"
        self.folder = Path(folder or default).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RankoptError(f"the cache {self.folder} cannot be made ({error}): set RANKOPT_CACHE") from error

    def path(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}.{suffix}"

    def read_json(self, key: str) -> Any:
        """The value under a key, or None."""
        try:
            kept = json.loads(self.path(key, "json").read_text())
            return kept["value"] if kept["checksum"] == digest(kept["value"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_json(self, key: str, value: Any) -> None:
        text = json.dumps({"value": value, "checksum": digest(value)})
        write_beside(self.path(key, "json"), lambda p: p.write_text(text))

    def read_tensors(self, key: str) -> dict[str, Tensor] | None:
        """All tensors under a key, or None."""
        try:
            with safe_open(self.path(key, "safetensors"), "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return found if all(_sound(file, name, t) for name, t in found.items()) else None
        except (OSError, SafetensorError):
            return None

    def write_tensors(self, key: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        metadata = {**(metadata or {}), **{f"crc.{name}": str(crc(t)) for name, t in tensors.items()}}
        write_beside(self.path(key, "safetensors"), lambda p: save_file(tensors, p, metadata))


class FactorStore:
    """Where candidates' factors are. A key is 'file/index'; `keep` holds some in memory, for other machines."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.kept: dict[str, Factors] = {}

    def __getitem__(self, key: str) -> Factors:
        if key in self.kept:
            return self.kept[key]
        file_key, index = key.rsplit("/", 1)
        try:
            with safe_open(self.cache.path(file_key, "safetensors"), "pt") as file:
                count = sum(n.startswith(f"{index}.") for n in file.keys())  # noqa: SIM118
                found = {name: file.get_tensor(name) for name in (f"{index}.{i}" for i in range(count))}
                damaged = [name for name, tensor in found.items() if not _sound(file, name, tensor)]
        except (OSError, SafetensorError) as error:
            raise RankoptError(f"the candidate cache lost an entry ({error}): run the search again") from error
        if damaged:
            path = self.cache.path(file_key, "safetensors")
            path.unlink(missing_ok=True)
            raise RankoptError(f"{path} is damaged, and removed now: run the search again, which makes it anew")
        return tuple(found.values())

    def keep(self, keys: Iterable[str]) -> None:
        self.kept.update({key: self[key] for key in keys})
