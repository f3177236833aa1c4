"""Augmented tree tensor network: a tree, then disentanglers on the neighbours that it does not join (Felser 2021)."""

from __future__ import annotations

from rankopt.decompositions.networks import Level, Network, boundaries, tree


class AugmentedTreeNetwork(Network):
    name = "augmented_ttn"

    def levels(self, indices: int) -> tuple[Level, ...]:
        return (*tree(indices), boundaries((1,) * indices))
