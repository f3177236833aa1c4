"""Search spaces: which families, ranks, precisions and layers a search may use, read from TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from rankopt.core.errors import RankoptError
from rankopt.core.records import PRECISIONS, SAME, Layer, Rank
from rankopt.decompositions.conformance import named
from rankopt.decompositions.registry import DECOMPOSITIONS

DEFAULT = ("svd_out", "svd_in", "svd_spatial", "svd_grouped", "tucker2", "cp", "cp_merged", "tt", "tt_matrix")


@dataclass(frozen=True)
class SearchSpace:
    """Which candidates a search may use.

    Attributes:
        name: Name of the space: the TOML file's, without its suffix.
        description: One line for listings.
        families: Decompositions that may be used. Keeping a layer dense is always allowed.
        fractions: Fractions of a layer's weights at which ranks are tried, in (0, 1]; replaces `points`, `smallest`
            and `largest`.
        points: How many fractions are tried, spaced geometrically from `smallest` to `largest`.
        smallest: Smallest fraction of a layer's weights.
        largest: Largest fraction of a layer's weights.
        nearest: Choose the rank nearest to a fraction instead of the largest below it; for families of one rank.
        multiple: Ranks are rounded down to a multiple of this, such as 8, 16 or 32 for vector units.
        precisions: What weights may be stored in: "same" (as in the model), "int8", "bfloat16", "float16". Matters
            under budgets that count bytes.
        steps: Steps of L-BFGS per fit; some families take a share of it.
        keep_dense: Layers to leave dense: names with wildcards * and ?, "@first-convolution" or "@classifier" (a
            last Linear).
        split_qkv: Whether a joint projection of queries, keys and values is split into three layers.
        rounds: Number of searches in multi-stage compression; 1 is a single search.
        round_steps: Training steps after each of several rounds.
    """

    name: str = "default"
    description: str = ""
    families: tuple[str, ...] = DEFAULT
    fractions: tuple[float, ...] = ()
    points: int = 20
    smallest: float = 0.05
    largest: float = 0.9
    nearest: bool = False
    multiple: int = 1
    precisions: tuple[str, ...] = (SAME,)
    steps: int = 500
    keep_dense: tuple[str, ...] = ()
    split_qkv: bool = True
    rounds: int = 1
    round_steps: int = 100

    def __post_init__(self) -> None:
        for family in self.families:
            DECOMPOSITIONS[family]
        if not self.families:
            raise RankoptError(f"search space {self.name!r} names no family: choose from {', '.join(DECOMPOSITIONS)}")
        if not all(0 < f <= 1 for f in (*self.fractions, self.smallest, self.largest)):
            raise RankoptError(f"search space {self.name!r}: fractions lie in (0, 1]")
        if self.points < 1 or self.multiple < 1:
            raise RankoptError(f"search space {self.name!r}: points and multiple are 1 or more")
        for precision in self.precisions:
            if precision not in PRECISIONS:
                known = ", ".join(PRECISIONS)
                raise RankoptError(f"search space {self.name!r}: unknown precision {precision!r}; choose from {known}")
        if self.steps < 0 or self.round_steps < 0 or self.rounds < 1:
            raise RankoptError(f"search space {self.name!r}: steps and round_steps are 0 or more, rounds is 1 or more")

    def grid(self, density: float = 1) -> tuple[float, ...]:
        """List the fractions of a layer's weights at which ranks are tried.

        Args:
            density: Factor on the number of points.
        """
        if self.fractions:
            return self.fractions
        return tuple(float(f) for f in np.geomspace(self.smallest, self.largest, max(1, round(density * self.points))))

    def ranks(self, family: str, layer: Layer) -> list[Rank]:
        """List the ranks of a family to try on a layer.

        Args:
            family: Name of the decomposition.
            layer: The layer.

        Returns:
            Ranks without duplicates; empty if the family does not apply to the layer or would not make it smaller.
        """
        decomposition = DECOMPOSITIONS[family]
        density = 1.0 if layer.kind == "Embedding" else decomposition.density  # an Embedding's factors fill the disk
        with named(family, layer, "ranks"):
            ranks = decomposition.ranks(layer, self.grid(density), self.nearest)
            multiples = {decomposition.valid(layer, tuple(self._to_multiple(r) for r in rank)) for rank in ranks}
            return sorted(multiples, key=lambda r: decomposition.weights(layer, r)) if self.multiple > 1 else ranks

    def _to_multiple(self, r: int) -> int:
        """Round down to a multiple of `multiple`; smaller ranks stay."""
        return r if r < self.multiple else r - r % self.multiple

    def dense_reason(self, layer: Layer, free: Sequence[Layer]) -> str | None:
        """Say why this space keeps a layer dense.

        Args:
            layer: The layer.
            free: All factorisable layers, in the model's order.

        Returns:
            The reason, or None if the layer may be factorised.
        """
        convolutions = [x for x in free if x.kind.startswith("Conv")]
        for pattern in self.keep_dense:
            hit = {
                "@first-convolution": bool(convolutions) and layer is convolutions[0],
                "@classifier": layer.kind == "Linear" and layer is free[-1],
            }.get(pattern, fnmatchcase(layer.name, pattern))
            if hit:
                return f"search space {self.name!r} keeps {pattern} dense"
        return None


def search_spaces_folder() -> Path:
    """Find the folder of rankopt's own search spaces: in the installed package, or at the top of a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "search_spaces"
    return inside if inside.is_dir() else package.parent / "search_spaces"


def space_names() -> list[str]:
    """List rankopt's own search spaces."""
    return sorted(p.stem for p in search_spaces_folder().glob("*.toml"))


def load_space(name: str | Path) -> SearchSpace:
    """Read a search space.

    Args:
        name: Name of one of rankopt's own search spaces, or path of a TOML file.

    Raises:
        RankoptError: The space does not exist, cannot be read, or has an unknown setting, value or family.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = search_spaces_folder() / f"{name}.toml"
        if not path.is_file():
            raise RankoptError(
                f"unknown search space {str(name)!r}: choose from {', '.join(space_names())}, or a .toml file"
            )
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RankoptError(f"search space {path} cannot be read: {error}") from error
    known = {f.name: f.type for f in fields(SearchSpace)}
    unknown = sorted(set(content) - set(known) | ({"name"} & set(content)))
    if unknown:
        settings = ", ".join(k for k in known if k != "name")
        raise RankoptError(f"search space {path}: unknown setting {unknown[0]!r}; the settings are {settings}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    try:
        return SearchSpace(name=path.stem, **values)
    except TypeError as error:
        raise RankoptError(f"search space {path}: {error}") from error
