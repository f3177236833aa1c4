"""The registry of decompositions: add a family by a file and a line here (or an entry point of another package)."""

from __future__ import annotations

from rankopt.core import DENSE as DENSE  # the method of a layer that stays one weight: allowed, so not in the registry
from rankopt.decompositions.augmented_ttn import AugmentedTreeNetwork
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.btt import BlockTerm
from rankopt.decompositions.cp import Cp
from rankopt.decompositions.cp_merged import CpMerged
from rankopt.decompositions.ht import HierarchicalTucker
from rankopt.decompositions.mera import Mera
from rankopt.decompositions.svd_grouped import SvdGrouped
from rankopt.decompositions.svd_in import SvdIn
from rankopt.decompositions.svd_out import SvdOut
from rankopt.decompositions.svd_spatial import SvdSpatial
from rankopt.decompositions.tr import TensorRing
from rankopt.decompositions.tt import TensorTrain
from rankopt.decompositions.tt_conv import TensorTrainConvolution
from rankopt.decompositions.tt_matrix import TensorTrainMatrix
from rankopt.decompositions.ttn import TreeNetwork
from rankopt.decompositions.tucker import Tucker
from rankopt.decompositions.tucker2 import Tucker2
from rankopt.registry import Registry

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
)
