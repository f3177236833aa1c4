"""The registry of decompositions.

To add a family, write a module with a `Decomposition` and add a line here. Other packages register theirs with an entry
point of the group `rankopt.decompositions`, programs with `rankopt.register`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from rankopt.core.errors import RankoptError
from rankopt.core.registry import Registry
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.block_term import BlockTerm
from rankopt.decompositions.cp import Cp, CpMerged
from rankopt.decompositions.generators import (
    ACTIVATIONS,
    AugmentedTreeNetwork,
    BrickWall,
    Mera,
    TreeNetwork,
    WeightGenerator,
)
from rankopt.decompositions.hierarchical_tucker import HierarchicalTucker
from rankopt.decompositions.svd import SvdGrouped, SvdIn, SvdOut, SvdSpatial
from rankopt.decompositions.tensor_ring import TensorRing
from rankopt.decompositions.tensor_train import TensorTrain
from rankopt.decompositions.tensor_train_matrix import TensorTrainConvolution, TensorTrainMatrix
from rankopt.decompositions.tucker import Tucker, Tucker2


def _fault(name: str, found: Any) -> str | None:
    """What is wrong with what another package registered."""
    if not isinstance(found, Decomposition):
        return f"it is {found!r}, not an instance of a Decomposition"
    if getattr(found, "name", None) != name:
        return f"its class has the name {getattr(found, 'name', None)!r}: give both the same"
    return None


GENERATORS: dict[str, type[WeightGenerator]] = {
    kind.name: kind for kind in (TreeNetwork, AugmentedTreeNetwork, Mera, BrickWall)
}


@cache
def _generator(name: str) -> WeightGenerator | None:
    """A generator with an activation of its own, such as `mera-silu`."""
    kind, _, activation = name.partition("-")
    found = GENERATORS[kind](activation) if kind in GENERATORS and activation in ACTIVATIONS else None
    return found if found is not None and found.name == name else None


DECOMPOSITIONS: Registry[Decomposition] = Registry(
    "decomposition",
    "rankopt.decompositions",
    {
        "svd_out": SvdOut(),
        "svd_in": SvdIn(),
        "svd_spatial": SvdSpatial(),
        "tucker2": Tucker2(),
        "cp": Cp(),
        "cp_merged": CpMerged(),
        "tt": TensorTrain(),
        "svd_grouped": SvdGrouped(),
        "tucker": Tucker(),
        "btt": BlockTerm(),
        "tr": TensorRing(),
        "ht": HierarchicalTucker(),
        "tt_matrix": TensorTrainMatrix(),
        "tt_conv": TensorTrainConvolution(),
        **{name: kind() for name, kind in GENERATORS.items()},
    },
    _fault,
    _generator,
)


def with_activation(family: str, activation: str) -> str:
    """The name of a generator with an activation; of another family, or a generator that names its own, its name.

    Args:
        family: Name of a family.
        activation: A name in ACTIVATIONS.
    """
    return GENERATORS[family](activation).name if family in GENERATORS else family


FamilyLike = str | Decomposition | type[Decomposition]
"""A family as Python takes it: its name, an object, or a class whose objects take no arguments."""


def family_name(family: FamilyLike) -> str:
    """The name of a family, under which it is known from now on.

    Args:
        family: A name, or a decomposition, which is registered.

    Raises:
        RankoptError: There is no such family, its name is taken, or it is no decomposition.
    """
    if isinstance(family, str):
        _ = DECOMPOSITIONS[family]
        return family
    found: Any = family
    if isinstance(family, type) and issubclass(family, Decomposition):
        try:
            found = family()
        except TypeError as error:  # abstract, or with arguments
            raise RankoptError(f"{family!r} makes no object without arguments ({error}): give one") from error
    if not isinstance(found, Decomposition):
        raise RankoptError(f"{found!r} is no decomposition: give a name, an object or a class of rankopt.Decomposition")
    name: Any = getattr(found, "name", None)
    if not isinstance(name, str):
        raise RankoptError(f"the decomposition {type(found).__name__} has no name: give it the class attribute `name`")
    own = DECOMPOSITIONS.is_own(name) and type(DECOMPOSITIONS[name]) is type(found)  # such as a second SvdOut()
    return name if own else DECOMPOSITIONS.add(name, found)
