"""Layers whose components have gates: what strategies prune that learn ranks while they train.

A component is an index of a bond between two factors. Its gate scales it, so that a layer without the components whose
gates are zero computes the same: `Gated.pruned` makes it, and the rank is what is left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from rankopt.candidates.pareto import frontier
from rankopt.candidates.prepare import Prepared
from rankopt.core.budget import Limit, share
from rankopt.core.errors import RankoptError
from rankopt.core.problem import Problem
from rankopt.core.records import FACTORISED, SAME, Candidate, Cost, Layer, Rank
from rankopt.decompositions.linear_algebra import balanced
from rankopt.decompositions.plan import apply, replace
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.layer_kinds import as_matrix, describe, in_own_shape
from rankopt.strategies.allocation import allocate

FAMILIES = ("cp_merged", "cp", "svd_out", "svd_spatial", "svd_in", "tucker2", "tt")
"""Families whose components can have gates."""


START = 1.5  # cost of the starting ranks, in budgets


FALLING = 0.75  # share of the steps in which the target falls to the budget


HIGHEST = 1e30  # λ beyond which nothing is left to remove


STARTS = ("allocation", "dense")


def along(components: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Shape one number per component for multiplication with a weight.

    Args:
        components: A number for each component, (R,).
        weight: The weight.
        axis: The axis along which the weight has its components. Axis 0 is groups * R long, group after group.

    Returns:
        The numbers, broadcastable to the weight.
    """
    shape = [1] * weight.ndim
    shape[axis] = -1
    return components.repeat(weight.shape[axis] // len(components)).view(shape)


class Gates(nn.Module):
    """One free gate for each component.

    Args:
        components: Their number R.
        like: A tensor of the dtype and on the device that they get.
    """

    def __init__(self, components: int, like: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(like.new_ones(components))

    def forward(self) -> Tensor:
        """The gates, (R,)."""
        return self.values


class Scaled(nn.Module):
    """Parametrisation of a stage's weight: its output channels, along an axis, are scaled by gates (R,)."""

    def __init__(self, gates: nn.Module, axis: int) -> None:
        super().__init__()
        self.gates, self.axis = gates, axis

    def forward(self, weight: Tensor) -> Tensor:
        return weight * along(self.gates(), weight, self.axis)


Slices = Sequence[tuple[nn.Parameter, int]]
"""The components of a bond: (weight, axis along which they lie); axis 0 is (groups * R, ...)."""


class Bond:
    """A bond of a factorised layer, with the weights whose slices are its components.

    Attributes:
        slices: The weights.
        components: R.
        mask: Module without arguments that gives the gate of each component, (R,).
    """

    def __init__(self, slices: Slices, components: int) -> None:
        """Make the gates.

        Args:
            slices: The weights.
            components: R.
        """
        self.slices, self.components = slices, components
        self.mask: Any = Gates(components, slices[0][0])

    def __len__(self) -> int:
        return self.components

    def _norms(self, weight: Tensor, axis: int) -> Tensor:
        if axis == 0:
            return weight.unflatten(0, (-1, len(self))).transpose(0, 1).flatten(1).norm(dim=1)
        return weight.transpose(0, 1).flatten(1).norm(dim=1)

    def scale(self) -> Tensor:
        """The product of the norms of each component's slices, (R,)."""
        return torch.stack([self._norms(w.detach(), axis) for w, axis in self.slices]).prod(0)

    def shared_out(self) -> list[Tensor]:
        """For each weight of `slices` what its components are to be scaled by so that no gate is needed, (R,)."""
        gates = self.mask().detach()
        equal = gates.abs() ** (1 / len(self.slices))
        return [gates.sign() * equal, *[equal] * (len(self.slices) - 1)]


class GatedBond(Bond):
    """A bond with free gates, to which the slices leave their scale."""

    def __init__(self, slices: Slices, components: int) -> None:
        super().__init__(slices, components)
        self.gates: nn.Parameter = self.mask.values
        self.unit = self.scale().mean() ** (1 / len(slices))
        self.absorb()

    @torch.no_grad()
    def absorb(self) -> None:
        """Rescale the slices to their common norm and multiply the gates by their scale; the layer is unchanged."""
        for weight, axis in self.slices:
            factor = self._norms(weight, axis).clamp_min(1e-12) / self.unit
            weight.div_(along(factor, weight, axis))
            self.gates.mul_(factor)


B = TypeVar("B", bound=Bond)


class Gated(Generic[B]):
    """A layer's replacement with gates on its bonds; entry i of the rank counts the gates of bond i."""

    def __init__(
        self,
        layer: Layer,
        candidate: Candidate,
        module: nn.Module,
        bond: Callable[[Slices, int], B] = GatedBond,  # type: ignore[assignment]
    ) -> None:
        """Register gates on a factorised module.

        Args:
            layer: The layer.
            candidate: Its candidate.
            module: The module of the candidate, in factorised form.
            bond: Makes a bond of its slices and their number.
        """
        self.layer, self.family, self.rank = layer, DECOMPOSITIONS[candidate.method], candidate.rank
        self.module = module
        self._costs: dict[Rank, Cost] = {}
        names = [name for name, _ in module.named_parameters() if not name.endswith("bias")]
        weights = [module.get_parameter(name) for name in names]
        # CP has one rank for all its bonds: the stages between the first and the last are depthwise.
        one_rank = len(weights) - 1 > len(candidate.rank)
        depthwise = [one_rank and 0 < i < len(weights) - 1 for i in range(len(weights))]
        self.weights = weights
        self.bonds: list[B] = []
        self.stages = [module.get_submodule(name.rpartition(".")[0]) for name in names]
        turned = [isinstance(s, (nn.Embedding, _ConvNd)) and describe(s).input_first for s in self.stages]
        for i in range(len(weights) - 1):
            if depthwise[i + 1]:  # the next stage passes the components of this bond on
                continue
            axis = int(turned[i] and not depthwise[i])
            components = weights[i].shape[axis] // (1 if axis else layer.groups)
            first = i
            while depthwise[first]:
                first -= 1
            outputs = [(weights[j], int(turned[j] and not depthwise[j])) for j in range(first, i + 1)]
            self.bonds.append(bond([*outputs, (weights[i + 1], int(not turned[i + 1]))], components))
            leaf = names[i].rpartition(".")[2]
            scaled = Scaled(self.bonds[-1].mask, axis)
            parametrize.register_parametrization(self.stages[i], leaf, scaled, unsafe=True)

    def valid(self, sizes: Sequence[int]) -> Rank:
        """The rank of some components of each bond, at least one.

        Args:
            sizes: How many, by bond.
        """
        return self.family.valid(self.layer, tuple(max(1, n) for n in sizes))

    def cost(self, rank: Rank) -> Cost:
        """The layer's cost at a rank.

        Args:
            rank: The rank.
        """
        if rank not in self._costs:
            self._costs[rank] = self.family.cost(self.layer, rank)
        return self._costs[rank]

    def component_cost(self, bond: int, rank: Rank) -> Cost:
        """The cost of one more component.

        Args:
            bond: Index of its bond.
            rank: The rank without it.
        """
        more = tuple(r + (i == bond) for i, r in enumerate(rank))
        return self.cost(more) - self.cost(rank)

    @torch.no_grad()
    def rotate(self) -> None:
        """Rotate the components of a single bond to singular vectors, with singular values as gates."""
        (bond,) = self.bonds
        assert isinstance(bond, GatedBond)
        (first, _), (last, _) = bond.slices
        inner, outer = (describe(s) for s in self.stages)
        left, right = balanced(as_matrix(outer, last) * bond.gates, as_matrix(inner, first))
        last.copy_(in_own_shape(outer, left))
        first.copy_(in_own_shape(inner, right))
        bond.gates.fill_(1.0)
        bond.absorb()

    @torch.no_grad()
    def pruned(self, dense: nn.Module, scores: Sequence[Tensor], rank: Rank) -> nn.Module:
        """Make the layer without gates and without the components that a rank leaves out.

        Args:
            dense: The original module.
            scores: Of each bond, the value of each component, (R,); those of highest value are kept.
            rank: A valid rank.

        Returns:
            A module as `Decomposition.build` makes it. If the gates of all other components are zero, it computes what
            this one does.
        """
        module = self.family.build(dense, self.layer, rank, FACTORISED)
        values = {id(w): w.detach() for w in self.weights}
        for bond, value, size in zip(self.bonds, scores, rank, strict=True):
            kept = value.topk(size).indices.sort().values
            for (weight, axis), factor in zip(bond.slices, bond.shared_out(), strict=True):
                scaled = values[id(weight)] * along(factor, weight, axis)
                parts = scaled.unflatten(axis, (-1, len(bond))).index_select(axis + 1, kept)
                values[id(weight)] = parts.flatten(axis, axis + 1)
        new = [p for name, p in module.named_parameters() if not name.endswith("bias")]
        for parameter, weight in zip(new, self.weights, strict=True):
            parameter.copy_(values[id(weight)])
        bias: Any = getattr(module, "bias", None)
        if bias is not None:
            bias.copy_(self.module.bias)
        return module


def take_while_they_fit(
    layers: Sequence[Gated[Any]], scores: Sequence[Sequence[Tensor]], fits: Callable[[Sequence[Rank]], bool]
) -> tuple[Rank, ...]:
    """Choose ranks: take components of all layers by falling score, those that fit.

    Args:
        layers: The layers.
        scores: Of each layer's bonds, the value of each component, (R,), comparable between layers.
        fits: Whether ranks, one for each layer, are within the budget.

    Returns:
        A valid rank for each layer, at least one in each bond.
    """
    entries = [
        (value, n, i)
        for n, of_layer in enumerate(scores)
        for i, of_bond in enumerate(of_layer)
        for value in sorted(of_bond.tolist(), reverse=True)[1:]  # each bond keeps its best in any case
    ]
    ranks = [[1] * len(x.bonds) for x in layers]
    for _, n, i in sorted(entries, key=lambda e: -e[0]):
        ranks[n][i] += 1
        if not fits([tuple(r) for r in ranks]):
            ranks[n][i] -= 1
    return tuple(x.valid(r) for x, r in zip(layers, ranks, strict=True))


class Pressure:
    """The cost of ranks, held below a target that falls from that of the start to the budget.

    Attributes:
        price: λ of the last step.
        ranks: Current ranks, by layer.
    """

    def __init__(self, limits: Sequence[Limit], fixed: Cost, layers: Sequence[Gated[Any]], steps: int) -> None:
        """Start from the layers' ranks.

        Args:
            limits: The budget.
            fixed: The cost of everything but the layers.
            layers: The layers.
            steps: Steps of the run; after the share FALLING of them the target is the budget.
        """
        self.limits, self.fixed, self.layers, self.steps = limits, fixed, layers, steps
        self.price = 0.0
        self.ranks: Sequence[Rank] = [x.rank for x in layers]
        self.start = self.excess(self.ranks)

    def excess(self, ranks: Sequence[Rank]) -> float:
        """Logarithm of cost / limit, of the metric where that is largest.

        Args:
            ranks: A rank for every layer.
        """
        costs = [x.cost(r) for x, r in zip(self.layers, ranks, strict=True)]
        totals = [self.fixed[x.metric] + sum(c[x.metric] for c in costs) for x in self.limits]
        return max((math.log(n / x.target) for n, x in zip(totals, self.limits, strict=True)), default=0.0)

    def fits(self, ranks: Sequence[Rank]) -> bool:
        """Whether ranks are within the budget.

        Args:
            ranks: A rank for every layer.
        """
        return self.excess(ranks) <= 0

    def share_of_one(self, layer: int, bond: int) -> float:
        """What one more component costs, in shares of the limits.

        Args:
            layer: Index of its layer.
            bond: Index of its bond.
        """
        return max(share(self.limits, self.layers[layer].component_cost(bond, self.ranks[layer])), 1e-12)

    def step(self, step: int, ranks_at: Callable[[float], Sequence[Rank]]) -> float:
        """Find the least λ at which a proximal step brings the cost down to the target.

        (A λ that follows the excess step by step, as in dual ascent, lags behind it, and then strips whole layers.)

        Args:
            step: Number of the step, from 0.
            ranks_at: λ -> the ranks after the proximal step; they fall with λ.

        Returns:
            λ, 0 if the target is met without; the ranks at it are the current ones.
        """
        wanted = max(0.0, 1 - (step + 1) / (FALLING * self.steps)) * max(self.start, 0.0)

        def meets(price: float) -> bool:
            return self.excess(ranks_at(price)) <= wanted

        low, high = 0.0, 0.0
        if not meets(0.0):
            high = self.price or 1e-12
            while not meets(high) and high < HIGHEST:
                low, high = high, 4 * high
            for _ in range(16):
                middle = (low * high) ** 0.5 if low else high / 16
                low, high = (low, middle) if meets(middle) else (middle, high)
        self.price = high or self.price
        self.ranks = ranks_at(high)
        return high


def adam_spread(state: Mapping[Any, Any], parameter: Tensor) -> Tensor:
    """Adam's √v of a parameter: the metric of its steps.

    Args:
        state: The optimizer's.
        parameter: The parameter.
    """
    of_one = state[parameter]
    return (of_one["exp_avg_sq"] / (1 - 0.999 ** of_one["step"].item())).sqrt() + 1e-12


def start_network(
    prepared: Prepared, problem: Problem, families: Collection[str], start: str
) -> tuple[nn.Module, dict[str, Candidate]]:
    """Build the network that ranks are learnt in.

    Args:
        prepared: The task with its candidates.
        problem: The budget.
        families: Which candidates may be chosen.
        start: "allocation": that of least predicted loss at START times the budget, with those layers dense that are
            dense within the budget; "dense": of every layer its largest candidate.

    Returns:
        The network, and the candidates of its factorised layers by name.

    Raises:
        RankoptError: At an effort below thorough, other families have beaten all of these on a layer.
    """
    for layer in problem.layers:
        offers = {c.method for c in prepared.offers.get(layer.name, ())}
        if offers & set(families) and not any(c.method in families for c in prepared.candidates[layer.name]):
            raise RankoptError(
                f"layer {layer.name!r} has no candidate left whose ranks can be learnt: other families have beaten all "
                "of them. Search with --effort thorough, or offer only some of the families "
                + ", ".join(sorted(families))
            )
    metrics = [x.metric for x in problem.limits]
    menus = tuple(_menu(layer, prepared.candidates[layer.name], metrics, families) for layer in problem.layers)
    chosen = _allocated(problem, menus, 1.0)
    if start == "dense":
        menus = tuple((max(m, key=lambda c: (not c.unchanged, [c.cost[x] for x in metrics])),) for m in menus)
    else:  # a layer that is dense within the budget stays so: at START budgets too many are
        menus = tuple(
            (c,) if c.unchanged else tuple(x for x in m if not x.unchanged) for c, m in zip(chosen, menus, strict=True)
        )
    chosen = _allocated(problem, menus, START)
    model = apply(prepared.task.model, problem.layers, chosen, prepared.factors)
    names = [layer.name for layer in problem.layers]
    return model, {n: c for n, c in zip(names, chosen, strict=True) if not c.unchanged}


def _allocated(problem: Problem, menus: tuple[tuple[Candidate, ...], ...], budgets: float) -> tuple[Candidate, ...]:
    """The exact allocation at a number of budgets, or at the least that the menus allow."""
    wide = dataclasses.replace(problem, frontiers=menus)
    targets = [max(int(budgets * x.target), least) for x, least in zip(problem.limits, wide.least, strict=True)]
    limits = [dataclasses.replace(x, target=t) for x, t in zip(problem.limits, targets, strict=True)]
    wide = dataclasses.replace(wide, limits=tuple(limits))
    return wide.candidates(allocate(wide).proposal)


def _menu(
    layer: Layer, candidates: Sequence[Candidate], metrics: Sequence[str], families: Collection[str]
) -> tuple[Candidate, ...]:
    """The frontier of the candidates whose components can have gates, and dense."""
    own = [c for c in candidates if c.method in families and (c.precision, c.form) == (SAME, FACTORISED)]
    return frontier(layer, own, metrics)


def without_gates(
    prepared: Prepared,
    model: nn.Module,
    layers: Sequence[Gated[Any]],
    scores: Sequence[Sequence[Tensor]],
    ranks: Sequence[Rank],
) -> nn.Module:
    """Replace layers with gates by smaller ones, in place.

    Args:
        prepared: The task.
        model: The network with gates.
        layers: Its layers with gates.
        scores: As of `Gated.pruned`, for each layer.
        ranks: The rank of each.

    Returns:
        The network.
    """
    for x, of_layer, rank in zip(layers, scores, ranks, strict=True):
        model = replace(model, x.layer, x.pruned(prepared.model.get_submodule(x.layer.name), of_layer, rank))
    return model
