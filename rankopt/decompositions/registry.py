"""The registry of decompositions.

To add a family, write a module with a `Decomposition` and add a line here. Other packages register theirs with an entry
point of the group `rankopt.decompositions`, programs with `rankopt.register`.
"""

from __future__ import annotations

from typing import Any

from rankopt.core.errors import RankoptError
from rankopt.core.registry import Registry
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.block_term import BlockTerm
from rankopt.decompositions.cp import Cp, CpMerged
from rankopt.decompositions.generators import AugmentedTreeNetwork, Mera, TreeNetwork
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
        "ttn": TreeNetwork(),
        "augmented_ttn": AugmentedTreeNetwork(),
        "mera": Mera(),
    },
    _fault,
)


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
    own = type(DECOMPOSITIONS.built_in.get(name)) is type(found)  # such as a second SvdOut()
    return name if own else DECOMPOSITIONS.add(name, found)
