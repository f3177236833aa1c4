"""Search spaces: which families, ranks, precisions and layers a search may use, read from TOML files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import numpy as np
from typing_extensions import TypedDict

from rankopt.candidates.effort import EFFORTS, NORMAL, THOROUGH
from rankopt.core.errors import RankoptError
from rankopt.core.records import PRECISIONS, SAME, Layer, Rank
from rankopt.core.schema import checked, read_toml
from rankopt.core.text import few, reason
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.conformance import named
from rankopt.decompositions.generators import USUAL as USUAL_ACTIVATION
from rankopt.decompositions.generators import check_activation
from rankopt.decompositions.registry import DECOMPOSITIONS, GENERATORS, FamilyLike, family_name, with_activation

DEFAULT = ("svd_out", "svd_in", "svd_spatial", "svd_grouped", "tucker2", "cp", "cp_merged", "tt", "tt_matrix")


class RuleContent(TypedDict, total=False):
    """The keys of a table [layers."PATTERN"] in a file; see `LayerRule`."""

    families: str | list[str]
    ranks: int | list[int | list[int]]


@dataclass(frozen=True)
class LayerRule:
    """What the layers of some names may become, instead of what the whole search space says.

    Attributes:
        pattern: The layers: a name with wildcards * and ?.
        families: Their decompositions; empty for those of the search space.
        ranks: Their ranks; empty for those of the search space. A number stands for a rank of that many in every bond.
            Only ranks that a family can have, and that make the layer smaller, are tried.
    """

    pattern: str
    families: tuple[str, ...] = ()
    ranks: tuple[int | Rank, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "families", tuple(map(family_name, self.families)))
        for rank in self.ranks:
            numbers = rank if isinstance(rank, tuple) else (rank,)
            if not numbers or not all(isinstance(r, int) and not isinstance(r, bool) and r > 0 for r in numbers):
                raise RankoptError(f"ranks of {self.pattern!r}: {rank!r} is no rank: give 8 or (8, 16)")

    @classmethod
    def of(cls, pattern: str, families: Sequence[FamilyLike] = (), ranks: Sequence[Any] = ()) -> LayerRule:
        """Make a rule of what a user wrote.

        Args:
            pattern: As the attribute.
            families: As the attribute, or one name.
            ranks: As the attribute, or one rank; lists count as tuples.

        Raises:
            RankoptError: A family is unknown, or something is no rank.
        """
        ranks = ranks if isinstance(ranks, Sequence) and not isinstance(ranks, str) else (ranks,)
        found: tuple[Any, ...] = tuple(tuple(r) if isinstance(r, list) else r for r in ranks)
        return cls(pattern, _family_names(families, f"families of {pattern!r}"), found)

    def matches(self, layer: Layer) -> bool:
        """Whether the rule is for a layer.

        Args:
            layer: The layer.
        """
        return fnmatchcase(layer.name, self.pattern)


def _names(value: Any, what: str) -> tuple[str, ...]:
    """One name or several as a tuple; raises RankoptError for anything else."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not all(isinstance(name, str) for name in names) or (not names and value not in ((), [])):
        raise RankoptError(f"{what}: {value!r} is not understood, give a list of names")
    return names


def _family_names(value: Any, what: str) -> tuple[str, ...]:
    """One family or several as names; decompositions are registered."""
    if isinstance(value, Decomposition | type):
        return (family_name(value),)
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return _names([x if isinstance(x, str) else family_name(x) for x in value] if several else value, what)


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
        activation: What generated weights have between the levels of their network: "tanh", "silu" or "linear". A
            generator that names its own, as `mera-silu`, keeps it.
        precisions: What weights may be stored in: "same" (as in the model), "int8", "bfloat16", "float16". Matters
            under budgets that count bytes.
        steps: Steps of L-BFGS per fit; some families take a share of it.
        effort: How much is fitted: "thorough" for everything, "normal" for what can be part of a good plan within the
            budget, "quick" for less of that, with fewer steps. Models that are fitted in seconds are fitted as a whole.
            Empty: as the strategy needs it, see `Strategy.effort`.
        minutes: Minutes of preparation after which no further fits start; None for no limit. Not with "thorough".
        keep_dense: Layers to leave dense: names with wildcards * and ?, "@first-convolution" or "@classifier" (a
            last Linear).
        layers: What layers of some names may become instead; of several rules for a layer, the first one counts.
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
    activation: str = USUAL_ACTIVATION
    precisions: tuple[str, ...] = (SAME,)
    steps: int = 500
    effort: str = ""
    minutes: float | None = None
    keep_dense: tuple[str, ...] = ()
    layers: tuple[LayerRule, ...] = ()
    split_qkv: bool = True
    rounds: int = 1
    round_steps: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.layers, Mapping):  # as in TOML: pattern -> families and ranks
            rules = tuple(LayerRule.of(pattern, **rule) for pattern, rule in self.layers.items())
            object.__setattr__(self, "layers", rules)
        object.__setattr__(self, "families", tuple(map(family_name, self.families)))
        if not self.families:
            raise RankoptError(f"search space {self.name!r} names no family: choose from {', '.join(DECOMPOSITIONS)}")
        if not all(0 < f <= 1 for f in (*self.fractions, self.smallest, self.largest)):
            raise RankoptError(f"search space {self.name!r}: fractions lie in (0, 1]")
        if self.points < 1 or self.multiple < 1:
            raise RankoptError(f"search space {self.name!r}: points and multiple are 1 or more")
        try:
            check_activation(self.activation)
        except RankoptError as error:
            raise RankoptError(f"search space {self.name!r}: {error}") from None
        for precision in self.precisions:
            if precision not in PRECISIONS:
                known = ", ".join(PRECISIONS)
                raise RankoptError(f"search space {self.name!r}: unknown precision {precision!r}; choose from {known}")
        if self.effort not in ("", *EFFORTS, THOROUGH):
            known = ", ".join((*EFFORTS, THOROUGH))
            raise RankoptError(f"search space {self.name!r}: unknown effort {self.effort!r}; choose from {known}")
        if self.minutes is not None and not (isinstance(self.minutes, int | float) and self.minutes > 0):
            raise RankoptError(f"search space {self.name!r}: minutes is {self.minutes}: give a number above 0")
        if self.minutes is not None and self.effort == THOROUGH:
            raise RankoptError(f"search space {self.name!r}: minutes go with effort {' or '.join(map(repr, EFFORTS))}")
        if self.steps < 0 or self.round_steps < 0 or self.rounds < 1:
            raise RankoptError(f"search space {self.name!r}: steps and round_steps are 0 or more, rounds is 1 or more")

    def adjusted(
        self,
        families: Sequence[FamilyLike] | Mapping[str, Sequence[FamilyLike]] | None = None,
        ranks: Mapping[str, Sequence[Any]] | None = None,
        keep_dense: Sequence[str] | None = None,
        effort: str | None = None,
        minutes: float | None = None,
    ) -> SearchSpace:
        """Return the space with other families or ranks, for all or for some layers, or with another effort.

        Args:
            families: Decompositions instead of the space's, by name or as objects or classes, which are registered; or
                for some layers, name pattern -> decompositions.
            ranks: Name pattern -> ranks to try: 8, [8, 16] or [(8, 16), (16, 16)].
            keep_dense: Layers to leave dense in addition to the space's, as the attribute.
            effort: As the attribute; None for the space's.
            minutes: As the attribute; None for the space's.

        Raises:
            RankoptError: Something is not understood.
        """
        if ranks is not None and not isinstance(ranks, Mapping):
            raise RankoptError(f"ranks={ranks!r}: give a dictionary of name patterns, such as {{'*': [8, 16]}}")
        own = families if isinstance(families, Mapping) else {}
        rules = [LayerRule.of(pattern, families=value) for pattern, value in own.items()]
        rules += [LayerRule.of(pattern, ranks=value) for pattern, value in (ranks or {}).items()]
        everywhere = self.families if families is None or families is own else _family_names(families, "families")
        dense = (*self.keep_dense, *_names(keep_dense or (), "keep_dense"))
        if effort is not None and minutes is not None:
            raise RankoptError("--effort and --minutes exclude each other: give one of them")
        return replace(
            self,
            families=everywhere,
            layers=(*rules, *self.layers),
            keep_dense=dense,
            effort=effort or (self.effort if minutes is None else NORMAL),
            minutes=self.minutes if minutes is None else minutes,
        )

    def with_effort(self, usual: str) -> SearchSpace:
        """The space with its own effort, or the usual one; with NORMAL where it limits the minutes.

        Args:
            usual: The effort of a space that has none.
        """
        return self if self.effort else replace(self, effort=NORMAL if self.minutes else usual)

    def settings(self) -> dict[str, Any]:
        """The settings by which a search or a study is recognised when it goes on.

        A setting that earlier versions lacked is left out at its default, so that what they began goes on.
        """
        found = asdict(self)
        if self.activation == USUAL_ACTIVATION:
            del found["activation"]
        return found

    def content(self) -> dict[str, Any]:
        """The space as JSON content, with the keys of its TOML file and its name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        rules = {
            rule.pattern: {key: value for key in ("families", "ranks") if (value := getattr(rule, key))}
            for rule in reversed(self.layers)  # of several rules for a pattern the first counts
        }
        return cast(dict[str, Any], _as_json({**found, "layers": rules}))

    @property
    def all_families(self) -> tuple[str, ...]:
        """The decompositions for layers without a rule of their own, generators with their activation."""
        return tuple(with_activation(family, self.activation) for family in self.families)

    def families_of(self, layer: Layer) -> tuple[str, ...]:
        """The decompositions that may be used for a layer.

        Args:
            layer: The layer.
        """
        own = next((rule.families for rule in self.layers if rule.families and rule.matches(layer)), None)
        return self.all_families if own is None else tuple(with_activation(f, self.activation) for f in own)

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Check that every rule is for some layer.

        Args:
            layers: All layers of the model.

        Raises:
            RankoptError: A rule is for none.
        """
        for rule in self.layers:
            if not any(map(rule.matches, layers)):
                raise RankoptError(_no_layer(rule.pattern, "families and ranks", layers))

    def warnings(self, layers: Sequence[Layer]) -> list[str]:
        """What in this space has no effect on a model; a space may be made for several.

        Args:
            layers: All layers of the model.
        """
        patterns = [p for p in self.keep_dense if not p.startswith("@")]
        missed = [p for p in patterns if not any(fnmatchcase(x.name, p) for x in layers)]
        families = {family for layer in layers for family in self.families_of(layer)}
        idle = self.activation != USUAL_ACTIVATION and families.isdisjoint(
            with_activation(family, self.activation) for family in GENERATORS
        )
        unused = f"activation = {self.activation!r} has no effect: add a generator, one of {', '.join(GENERATORS)}"
        return [_no_layer(pattern, "keep_dense", layers) for pattern in missed] + [unused] * idle

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
        if (own := next((rule.ranks for rule in self.layers if rule.ranks and rule.matches(layer)), None)) is not None:
            with named(family, layer, "ranks"):
                return _own_ranks(family, layer, own)
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


def _as_json(value: Any) -> Any:
    """Tuples within a value as lists."""
    if isinstance(value, dict):
        return {key: _as_json(x) for key, x in value.items()}
    return [_as_json(x) for x in value] if isinstance(value, tuple) else value


def _own_ranks(family: str, layer: Layer, ranks: Sequence[int | Rank]) -> list[Rank]:
    """Those of the ranks that a family can have on a layer, and that make it smaller, by number of weights."""
    decomposition = DECOMPOSITIONS[family]
    full = decomposition.full_rank(layer)
    if full is None:
        return []
    asked = {r if isinstance(r, tuple) else (r,) * len(full) for r in ranks}
    found = [r for r in asked if len(r) == len(full) and decomposition.valid(layer, r) == r]
    smaller = [r for r in found if decomposition.weights(layer, r) < layer.weights]
    return sorted(smaller, key=lambda r: decomposition.weights(layer, r))


def _no_layer(pattern: str, what: str, layers: Sequence[Layer]) -> str:
    return f"{what}: no layer is called {pattern!r}; the layers are {few([repr(x.name) for x in layers], 5)}"


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
        content = read_toml(path)
    except (OSError, ValueError) as error:
        raise RankoptError(f"search space {path} cannot be read: {reason(error)}") from error
    known = {f.name: f.type for f in fields(SearchSpace)}
    unknown = sorted(set(content) - set(known) | ({"name"} & set(content)))
    if unknown:
        settings = ", ".join(k for k in known if k != "name")
        raise RankoptError(f"search space {path}: unknown setting {unknown[0]!r}; the settings are {settings}")
    try:
        rules = checked(content.pop("layers", {}), dict[str, RuleContent])
        layers = tuple(LayerRule.of(pattern, **rule) for pattern, rule in rules.items())
        return replace(checked({"name": path.stem, **content}, SearchSpace), layers=layers)
    except RankoptError:
        raise
    except ValueError as error:
        raise RankoptError(f"search space {path}: {reason(error)}") from error
