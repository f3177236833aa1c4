"""Tree tensor network: every level splits each bond in two (Shi 2006; as a generator, arXiv 2606.00130)."""

from __future__ import annotations

from rankopt.decompositions.networks import Level, Network, tree


class TreeNetwork(Network):
    name = "ttn"

    def levels(self, indices: int) -> tuple[Level, ...]:
        return tree(indices)
