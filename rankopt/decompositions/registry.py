"""The registry of decompositions.

To add a family, write a module with a `Decomposition` and add a line here. Other packages register theirs with an entry
point of the group `rankopt.decompositions`.
"""

from __future__ import annotations

from typing import Any

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
        return f"its entry point is {found!r}, not an instance of a Decomposition"
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
