"""Multi-scale entanglement renormalisation ansatz: a tree with disentanglers after every level (Vidal 2007)."""

from __future__ import annotations

from rankopt.decompositions.networks import Level, Network, boundaries, tree


class Mera(Network):
    name = "mera"

    def levels(self, indices: int) -> tuple[Level, ...]:
        levels: list[Level] = []
        for level in tree(indices):
            levels += [level, boundaries([s for core in level for s in core.out])]
        return tuple(levels)
