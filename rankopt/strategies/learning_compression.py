"""Learning–compression alternation with learnt ranks (Idelbayev and Carreira-Perpiñán 2020, CVPR).

The dense weights W of the network and low-rank weights Θ are coupled by a quadratic penalty,

    minimise L(W) + μ Σ_l w_l ‖W_l − Θ_l‖²   subject to   cost(ranks of Θ) ≤ budget,

which is minimised in turns while μ rises:

L step   some steps of training of W, with Θ fixed: a dense network, drawn to the low-rank one.
C step   Θ and its ranks, with W fixed. Of a layer, the best Θ of a rank is a truncated SVD, and its distance the sum of
         the squared singular values that are left out. So one exact allocation over all ranks of all layers solves it
         within the budget. (In the paper ranks have a price λ instead, and there is one unfolding of each convolution.
         Here a layer may become a matrix product over any unfolding that the search space offers: `svd_out`, `svd_in`,
         `svd_spatial`.)

The norm is the layer's output metric with a Kronecker product in place of the input moment, S ≈ S_C ⊗ S_h ⊗ S_w
(partial traces), relative to the dense weight: in it every one of these unfoldings has its best Θ in closed form, by an
SVD of the whitened weight. (In the paper it is the plain one, in which layers, and directions that are never excited,
count as much as others.) A C step predicts what an error raises the objective by from the layer's measured curve, and
w_l is this rise over the error of the Θ chosen: so for μ = 1 the penalty is the predicted loss of replacing W by Θ.
After the share ALTERNATING of the steps W is replaced by Θ, as factors, which are trained for the rest of the steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.candidates.pareto import frontier
from rankopt.candidates.prepare import Prepared
from rankopt.candidates.sensitivity import with_losses
from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.progress import Progress
from rankopt.core.records import Candidate, Layer
from rankopt.decompositions.base import Decomposition
from rankopt.decompositions.linear_algebra import roots
from rankopt.decompositions.plan import apply
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import mean_squares
from rankopt.model.composites import expand_composites, take_ordinary_path
from rankopt.model.layer_kinds import as_matrix, in_own_shape
from rankopt.strategies.allocation import allocate
from rankopt.strategies.trained import RECIPE, Trainer, TrainingStrategy

FAMILIES = ("svd_out", "svd_in", "svd_spatial")
"""Families of a single bond: their best fits are truncated SVDs of an unfolding."""


ALTERNATING = 0.75  # share of the steps that are made with dense weights


FIRST, LAST = 0.5, 50.0  # μ in the first and in the last L step


RANKS = 256  # ranks of a layer and family that an allocation considers


class Whitening:
    """Coordinates of a weight in which the norm is the plain one.

    Args:
        layer: The layer.
        weight: Its dense weight, float64 in `layer.shape`.
        moment: Input moment, in one of the forms of `Target.moment`; None: identity.
        metric: Output metric; None: identity.
    """

    def __init__(self, layer: Layer, weight: Tensor, moment: Tensor | None, metric: Tensor | None) -> None:
        g, sizes = layer.groups, (layer.in_channels, *(layer.kernel if len(layer.shape) == 4 else ()))
        self.shape, self.grouped = layer.shape, (g, layer.out_channels, *sizes)
        metrics = [metric] if metric is not None else [torch.eye(layer.out_channels).expand(g, -1, -1)]
        metrics += _partial_traces(moment, g, sizes)
        pairs = [roots(m.to(weight)) for m in metrics]
        self.to, self.back = [p[0] for p in pairs], [p[1] for p in pairs]
        self.scale = 1.0
        self.scale = max(float(self(weight).square().sum()), 1e-30) ** -0.5

    def __call__(self, weight: Tensor) -> Tensor:
        """Whiten a weight; the squared norm of a difference is the relative squared error.

        Args:
            weight: The weight in `layer.shape`.
        """
        return self._along(weight, self.to) * self.scale

    def undone(self, white: Tensor) -> Tensor:
        """The weight of a whitened one, in `layer.shape`.

        Args:
            white: The whitened weight.
        """
        return self._along(white, self.back) / self.scale

    def _along(self, weight: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        tensor = weight.reshape(self.grouped)
        for axis, matrix in enumerate(matrices, 1):
            product = tensor.movedim(axis, -1).flatten(1, -2) @ matrix.to(tensor).mT
            rest = [n for i, n in enumerate(tensor.shape) if i != axis]
            tensor = product.reshape(*rest, -1).movedim(-1, axis)
        return tensor.reshape(self.shape)


def _partial_traces(moment: Tensor | None, groups: int, sizes: Sequence[int]) -> list[Tensor]:
    """For each input mode the moment with the others traced out, (groups, size, size); up to a factor."""
    if moment is None:
        return [torch.eye(n).expand(groups, -1, -1) for n in sizes]
    n = len(sizes)
    if moment.ndim == 3 and moment.shape[-2] == moment.shape[-1]:
        whole = moment.reshape(groups, *sizes, *sizes)
        return [
            torch.einsum(
                whole, [0, *range(1, n + 1), *[n + 1 if j == i else j + 1 for j in range(n)]], [0, i + 1, n + 1]
            )
            for i in range(n)
        ]
    squares = mean_squares(moment).reshape(groups, *sizes)
    return [squares.movedim(i + 1, -1).reshape(groups, -1, sizes[i]).sum(1).diag_embed() for i in range(n)]


class Unfolding(NamedTuple):
    """How a family sees a weight as a matrix.

    Attributes:
        family: The family.
        layer: The layer.
        order: Axes of the family's tensor (groups, *modes), those of the matrix's columns last.
        rows: Number of axes of the rows.
    """

    family: Decomposition
    layer: Layer
    order: tuple[int, ...]
    rows: int

    @classmethod
    def of(cls, family: Decomposition, layer: Layer, weight: Tensor) -> Unfolding:
        """Read the unfolding off a family's only bond.

        Args:
            family: One of FAMILIES.
            layer: The layer.
            weight: Its weight in `layer.shape`.
        """
        modes, _ = family.tensor(layer, weight)
        (bond,) = family.bonds(layer, (1,))
        outside = [i for i, mode in enumerate(modes, 1) if mode not in bond.inside]
        inside = [i for i, mode in enumerate(modes, 1) if mode in bond.inside]
        return cls(family, layer, (0, *outside, *inside), len(outside))

    def matrix(self, weight: Tensor) -> Tensor:
        """Unfold a weight, (groups, rows, columns).

        Args:
            weight: The weight in `layer.shape`.
        """
        tensor = self.family.tensor(self.layer, weight)[1].permute(self.order)
        return tensor.flatten(1, self.rows).flatten(2)

    def truncated(self, weight: Tensor, rank: int) -> Tensor:
        """The nearest weight of a rank, in `layer.shape`.

        Args:
            weight: The weight in `layer.shape`.
            rank: The rank.
        """
        u, s, vh = torch.linalg.svd(self.matrix(weight), full_matrices=False)
        low = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
        shape = [self.family.tensor(self.layer, weight)[1].shape[i] for i in self.order]
        back = [self.order.index(i) for i in range(len(self.order))]
        return low.reshape(shape).permute(back).reshape(self.layer.shape)

    def distances(self, weight: Tensor) -> Tensor:
        """The squared distance to the nearest weight of rank 0, 1, ..., (full rank + 1,).

        Args:
            weight: The weight in `layer.shape`.
        """
        squares = torch.linalg.svdvals(self.matrix(weight)).square().sum(0)
        return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


class Compression:
    """The C step: low-rank weights within the budget that are nearest to given ones.

    Attributes:
        chosen: The candidates of the last step.
        low: The low-rank weight of each layer that is replaced, by name, in the module's own shape.
    """

    def __init__(self, prepared: Prepared, problem: Problem, dense: nn.Module) -> None:
        """Set up the unfoldings and the sensitivities.

        Args:
            prepared: The task with its candidates.
            problem: The budget.
            dense: The model whose weights are compressed.

        Raises:
            RankoptError: No layer has a candidate of FAMILIES.
        """
        self.problem, self.dense = problem, dense
        self.metrics = [x.metric for x in problem.limits]
        own = dict(prepared.task.model.named_modules())
        self.unfoldings: dict[str, dict[str, Unfolding]] = {}
        self.white: dict[str, Whitening] = {}
        self.curves = prepared.curves
        self.weights: dict[str, float] = {}
        self.may_stay: dict[str, bool] = {}
        for layer in problem.layers:
            weight = self.weight(layer)
            offered = {c.method for c in prepared.offers.get(layer.name, prepared.candidates[layer.name])}
            found = [DECOMPOSITIONS[f] for f in FAMILIES if f in offered]
            self.unfoldings[layer.name] = {f.name: Unfolding.of(f, layer, weight) for f in found}
            self.white[layer.name] = Whitening(layer, weight, *prepared.statistics[layer.name])
            # The parts of a composite module are all replaced: a plan expands it only for parts that change.
            self.may_stay[layer.name] = layer.name in own or not found
        if not any(self.unfoldings.values()):
            raise RankoptError(
                "strategy 'lc' compresses by truncated SVDs, and the search space offers none: add one of "
                f"{', '.join(FAMILIES)}"
            )
        self.chosen: tuple[Candidate, ...] = ()
        self.low: Mapping[str, Tensor] = {}

    def weight(self, layer: Layer) -> Tensor:
        """A layer's weight now, float64 in `layer.shape`.

        Args:
            layer: The layer.
        """
        own: Tensor = self.dense.get_submodule(layer.name).weight  # type: ignore[assignment]
        return as_matrix(layer, own.detach().double()).reshape(layer.shape)

    @torch.no_grad()
    def step(self) -> None:
        """Choose ranks, and project the weights as they are now."""
        menus = [self._menu(layer) for layer in self.problem.layers]
        problem = replace(self.problem, frontiers=tuple(menus))
        self.chosen = problem.candidates(allocate(problem).proposal)
        replaced = [(x, c) for x, c in zip(self.problem.layers, self.chosen, strict=True) if not c.unchanged]
        self.low = {layer.name: self._projected(layer, c) for layer, c in replaced}
        self.weights = {layer.name: c.loss / max(c.error, 1e-12) for layer, c in replaced}

    def _menu(self, layer: Layer) -> tuple[Candidate, ...]:
        weight, found = self.white[layer.name](self.weight(layer)), []
        for name, unfolding in self.unfoldings[layer.name].items():
            distances = unfolding.distances(weight)
            full = len(distances) - 1
            for rank in np.unique(np.geomspace(1, full, min(full, RANKS)).round().astype(int)).tolist():
                cost = unfolding.family.cost(layer, (rank,))
                found.append(Candidate(name, (rank,), cost, float(distances[rank]), key=layer.name))
        kept = frontier(layer, with_losses(found, self.curves.get(layer.name, ())), self.metrics)
        return kept if self.may_stay[layer.name] else tuple(c for c in kept if not c.unchanged)

    def _projected(self, layer: Layer, candidate: Candidate) -> Tensor:
        own: Tensor = self.dense.get_submodule(layer.name).weight  # type: ignore[assignment]
        white = self.white[layer.name]
        low = self.unfoldings[layer.name][candidate.method].truncated(white(self.weight(layer)), candidate.rank[0])
        return in_own_shape(layer, white.undone(low)).to(own)

    def distance(self) -> Tensor:
        """Σ_l w_l ‖W_l − Θ_l‖², which is differentiable by W."""
        parts = []
        for layer in self.problem.layers:
            if layer.name in self.low:
                own: Tensor = self.dense.get_submodule(layer.name).weight  # type: ignore[assignment]
                apart = as_matrix(layer, own - self.low[layer.name]).reshape(layer.shape)
                white = self.white[layer.name](apart)
                parts.append(self.weights[layer.name] * white.square().sum())
        return torch.stack(parts).sum() if parts else torch.zeros(())

    def network(self) -> nn.Module:
        """The network of the last step's factors."""
        factors = {}
        for layer, candidate in zip(self.problem.layers, self.chosen, strict=True):
            if (low := self.low.get(layer.name)) is not None:
                (fit,) = DECOMPOSITIONS[candidate.method].fit(layer, low, [candidate.rank], steps=1)
                factors[layer.name] = fit.factors
        return apply(self.dense, self.problem.layers, self.chosen, factors)


class LearningCompression(TrainingStrategy):
    """Alternates training of dense weights and exact choices of ranks that draw them, and delivers the network."""

    name = "lc"

    def __init__(
        self,
        problem: Any,
        seed: int = 0,
        *,
        alternations: int = 10,
        steps: int = 400,
        rate: float = RECIPE.rate,
    ) -> None:
        """Check the options.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: Seed of the training.
            alternations: Number of L steps, each followed by a C step.
            steps: Training steps, of all L steps and after.
            rate: Largest learning rate of the weights.

        Raises:
            RankoptError: For an option out of range.
        """
        super().__init__(problem, seed, steps=steps, rate=rate)
        if alternations < 1:
            raise RankoptError(f"strategy 'lc': alternations is {alternations}, give 1 or more")
        self.alternations = alternations

    def train(self, prepared: Prepared, progress: Progress) -> nn.Module:
        names = [layer.name for layer in self.problem.layers]
        dense = take_ordinary_path(expand_composites(copy.deepcopy(prepared.task.model), names))
        compression = Compression(prepared, self.problem, dense)
        compression.step()
        until = max(1, round(ALTERNATING * self.steps))
        ends = {max(1, round(until * (n + 1) / self.alternations)) for n in range(self.alternations)}
        mu = FIRST

        def after_step(step: int) -> None:
            nonlocal mu
            if step + 1 in ends:
                compression.step()
                mu = FIRST * (LAST / FIRST) ** ((step + 1) / until)

        trainer = Trainer(prepared, self.recipe, self.steps, until, progress)
        trainer(dense, until, penalty=lambda: mu * compression.distance(), after_step=after_step)
        model = compression.network()
        trainer(model, self.steps)
        return model
