"""Lasso while training: gates on the components of every factorised layer, driven to exact zeros under the budget.

Every free layer starts as a candidate of one family: `cp_merged` for k x k convolutions and `svd_out` for others (the
simplest with a gate per component), otherwise the first that the search space has. Its rank is that of the exact
allocation at START times the budget. (From each layer's largest candidate, a hundred steps strip whole layers to rank
one: ResNet-20 at 30 % of the MACs, KL 1.1 to 4.1 instead of 0.14.) A gate is the scale of one component of a bond
between two stages: CP and SVD have one vector of gates, Tucker-2 one per mode, a tensor train one per bond. After every
optimiser step

- `absorb` moves changes in the scale of the stages' weights into the gates, so that the penalty is not evaded by
  shrinking a gate and growing its weights;
- the gates g take the proximal step of λ Σ_r cost_r |g_r| in Adam's own metric (Yun et al. 2021, ProxGen),
  g ← sign(g) max(|g| − lr λ cost_r / √v, 0): a gate stays at zero exactly if it lowers the loss by less than λ cost_r;
- λ rises or falls with the excess over a target (exponentiated dual ascent). The target falls from the start's cost to
  the budget in the first half of the steps.

cost_r is the component's cost in the budget's metrics, as shares of their limits. The final ranks are tightened onto
the budget by the gates' averages over the last steps. Penalties:

l1       Σ |g_r|
group    half on the components, half on the norm of all gates of a layer (sparse group lasso, Simon 2013)
hoyer    (Σ|g|)² / Σg² of a bond (Yang 2020, DeepHoyer), linearised at each step: large gates are not penalised
nuclear  for `svd_out` layers: every ten steps the components are rotated to singular vectors, so that the gates are
         singular values
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from rankopt.candidates.pareto import frontier
from rankopt.core.errors import RankoptError
from rankopt.core.records import SAME, Candidate, Cost, Layer, Proposal, Rank
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.variable_projection import balanced
from rankopt.model.layer_kinds import as_matrix, describe, in_own_shape
from rankopt.strategies.allocation import allocate, fill, project
from rankopt.strategies.base import Strategy
from rankopt.strategies.baselines import largest, within
from rankopt.training.loop import search_batches, train

FAMILIES = ("cp_merged", "cp", "svd_out", "svd_spatial", "svd_in", "tucker2", "tt")


PENALTIES = ("l1", "group", "hoyer", "nuclear")


START = 1.5  # cost of the starting ranks, in budgets


RATE = 1e-5  # Adam's learning rate of the weights; slow, since the plan does not keep them


GATE_RATE = 2e-2  # Adam's learning rate of the gates


ASCENT = 0.5  # step of log λ per relative excess of cost


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


class Scaled(nn.Module):
    """Parametrisation of a stage's weight: its output channels, along an axis, are scaled by gates (R,)."""

    def __init__(self, gates: nn.Parameter, axis: int) -> None:
        super().__init__()
        self.gates, self.axis = gates, axis

    def forward(self, weight: Tensor) -> Tensor:
        return weight * along(self.gates, weight, self.axis)


class GatedBond:
    """The gates of one bond of a factorised layer, with the weights whose slices are its components."""

    def __init__(self, slices: Sequence[tuple[nn.Parameter, int]], gates: nn.Parameter) -> None:
        """Scale the slices to equal norms, and the gates accordingly.

        Args:
            slices: (weight, axis along which its components lie); 0 for (groups * R, ...).
            gates: One gate per component, (R,).
        """
        self.slices = slices
        self.gates = gates
        self.unit = self.scale().mean() ** (1 / len(slices))
        self.absorb()

    def _norms(self, weight: Tensor, axis: int) -> Tensor:
        if axis == 0:
            return weight.unflatten(0, (-1, len(self.gates))).transpose(0, 1).flatten(1).norm(dim=1)
        return weight.transpose(0, 1).flatten(1).norm(dim=1)

    def scale(self) -> Tensor:
        """The product of the norms of each component's slices, (R,)."""
        return torch.stack([self._norms(w.detach(), axis) for w, axis in self.slices]).prod(0)

    @torch.no_grad()
    def absorb(self) -> None:
        """Rescale the slices to their common norm and multiply the gates by their scale; the layer is unchanged."""
        for weight, axis in self.slices:
            factor = self._norms(weight, axis).clamp_min(1e-12) / self.unit
            weight.div_(along(factor, weight, axis))
            self.gates.mul_(factor)


class Gated:
    """A layer's replacement with gates on its bonds; entry i of the rank counts the gates of bond i."""

    def __init__(self, layer: Layer, candidate: Candidate, module: nn.Module) -> None:
        """Register gates on a factorised module.

        Args:
            layer: The layer.
            candidate: Its candidate.
            module: The module of the candidate.
        """
        self.layer, self.family, self.rank = layer, DECOMPOSITIONS[candidate.method], candidate.rank
        names = [name for name, _ in module.named_parameters() if not name.endswith("bias")]
        weights = [module.get_parameter(name) for name in names]
        # CP has one rank for all its bonds: the stages between the first and the last are depthwise.
        one_rank = len(weights) - 1 > len(candidate.rank)
        depthwise = [one_rank and 0 < i < len(weights) - 1 for i in range(len(weights))]
        self.weights, self.bonds = weights, []
        self.stages = [module.get_submodule(name.rpartition(".")[0]) for name in names]
        turned = [isinstance(s, (nn.Embedding, _ConvNd)) and describe(s).input_first for s in self.stages]
        for i in range(len(weights) - 1):
            if depthwise[i + 1]:  # the next stage passes the components of this bond on
                continue
            like, axis = weights[i], int(turned[i] and not depthwise[i])
            gates = nn.Parameter(like.new_ones(like.shape[axis] // (1 if axis else layer.groups)))
            first = i
            while depthwise[first]:
                first -= 1
            outputs = [(weights[j], int(turned[j] and not depthwise[j])) for j in range(first, i + 1)]
            self.bonds.append(GatedBond([*outputs, (weights[i + 1], int(not turned[i + 1]))], gates))
            leaf = names[i].rpartition(".")[2]
            parametrize.register_parametrization(self.stages[i], leaf, Scaled(gates, axis), unsafe=True)

    def left(self, keep: Callable[[GatedBond], Tensor]) -> Rank:
        """The rank of the kept components, at least one per bond.

        Args:
            keep: Bond -> which components are kept, bools (R,).
        """
        return self.family.valid(self.layer, tuple(max(1, int(keep(b).sum())) for b in self.bonds))

    def cost(self, rank: Rank) -> Cost:
        """The layer's cost at a rank.

        Args:
            rank: The rank.
        """
        return self.family.cost(self.layer, rank)

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
        (first, _), (last, _) = bond.slices
        inner, outer = (describe(s) for s in self.stages)
        left, right = balanced(as_matrix(outer, last) * bond.gates, as_matrix(inner, first))
        last.copy_(in_own_shape(outer, left))
        first.copy_(in_own_shape(inner, right))
        bond.gates.fill_(1.0)
        bond.absorb()


def soft_threshold(gates: Tensor, threshold: Tensor) -> Tensor:
    """Apply the proximal operator of a weighted L1 norm, sign(g) max(|g| − threshold, 0).

    Args:
        gates: g, (R,).
        threshold: The threshold of each gate, (R,).
    """
    return gates.sign() * (gates.abs() - threshold).clamp_min(0)


def hoyer_weights(gates: Tensor) -> Tensor:
    """Compute the derivative of (Σ|g|)² / Σg² by |g_r|, up to a common factor; 0 where it is negative.

    Args:
        gates: g, (R,).
    """
    return (1 - gates.abs() * gates.abs().sum() / gates.square().sum().clamp_min(1e-30)).clamp_min(0)


class LassoTrain(Strategy):
    """Trains gates on the components of every layer, and gives each layer the cost of those that remain."""

    name = "lasso-train"
    one_shot = True
    needs_model = True

    def __init__(self, problem: Any, seed: int = 0, *, penalty: str = "l1", steps: int = 100) -> None:
        """Check the options.

        Args:
            problem: The candidates of every layer, and the limits.
            seed: Seed of the training.
            penalty: "l1", "group", "hoyer" or "nuclear".
            steps: Training steps, 1 or more.

        Raises:
            RankoptError: For an option out of range.
        """
        super().__init__(problem, seed)
        if penalty not in PENALTIES:
            raise RankoptError(
                f"strategy 'lasso-train': unknown penalty {penalty!r}; choose from {', '.join(PENALTIES)}"
            )
        if steps < 1:
            raise RankoptError(f"strategy 'lasso-train': steps is {steps}, give 1 or more")
        self.penalty, self.steps = penalty, steps
        self.kept: tuple[Rank, ...] | None = None  # each layer's rank after the training
        self.costs: tuple[Cost, ...] = ()

    def propose(self, number: int) -> Proposal | None:
        if number > 0:
            return None
        if self.kept is None:
            raise RankoptError("strategy 'lasso-train' trains first: call measure(prepared, progress), then ask()")
        shares = [{x.metric: c[x.metric] for x in self.problem.limits} for c in self.costs]
        proposal = largest(
            self.problem, lambda kept: within(self.problem, [{m: 2 * kept * v for m, v in s.items()} for s in shares])
        )
        return fill(self.problem, project(self.problem, proposal))

    # --- training ---

    def measure(self, prepared: Any, progress: Any) -> None:
        model, layers = self._start(prepared)
        run = Run(self, layers)
        weights = [w for layer in layers for w in layer.weights]
        gates = [b.gates for layer in layers for b in layer.bonds]
        optimizer = torch.optim.Adam([{"params": weights, "lr": RATE}, {"params": gates, "lr": GATE_RATE}])
        run.optimizer = optimizer
        batches, loss = search_batches(prepared.task, prepared.statistics.batches)
        train(
            model,
            batches,
            loss,
            optimizer,
            steps=self.steps,
            seed=self.seed,
            clip=None,  # clipping would weaken the gradient, but not the penalty against it
            training=False,
            after_step=run.after_step,
            progress=progress,
        )
        self.kept = run.tighten()
        self.costs = tuple(x.cost(rank) for x, rank in zip(layers, self.kept, strict=True))

    def _start(self, prepared: Any) -> tuple[nn.Module, list[Gated]]:
        from rankopt.decompositions.plan import apply

        layers = self.problem.layers
        menus = tuple(self._menu(layer, prepared.candidates[layer.name]) for layer in layers)
        least = dataclasses.replace(self.problem, frontiers=menus).cost((0,) * len(menus))
        limits = [(x, max(int(START * x.target), least[x.metric])) for x in self.problem.limits]
        wider = tuple(dataclasses.replace(limit, target=target) for limit, target in limits)
        start = dataclasses.replace(self.problem, frontiers=menus, limits=wider)
        chosen = start.candidates(allocate(start).proposal)
        model = apply(prepared.task.model, layers, chosen, prepared.factors)
        pairs = zip(layers, chosen, strict=True)
        return model, [Gated(layer, c, model.get_submodule(layer.name)) for layer, c in pairs]

    def _menu(self, layer: Layer, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """The frontier of the first family of which the layer has candidates, without dense."""
        families = ("svd_out",) if self.penalty == "nuclear" else FAMILIES
        family = next((f for f in families if any(c.method == f for c in candidates)), None)
        if family is None:
            raise RankoptError(
                f"strategy 'lasso-train', penalty {self.penalty!r}: layer {layer.name!r} has no candidate of "
                f"{', '.join(families)}: add one to the search space, or keep the layer dense"
            )
        own = [c for c in candidates if c.method == family and c.precision == SAME]
        return tuple(c for c in frontier(layer, own, [x.metric for x in self.problem.limits]) if c.method == family)


class Run:
    """The penalty in one training run.

    Attributes:
        optimizer: The optimiser of weights and gates, Adam.
        price: λ.
        averages: id of a bond -> sum of its absolute gates over the last quarter of the steps, (R,).
        ranks: Current ranks, by layer.
        start: Excess of the starting ranks.
    """

    def __init__(self, strategy: LassoTrain, layers: Sequence[Gated]) -> None:
        self.problem, self.penalty, self.steps = strategy.problem, strategy.penalty, strategy.steps
        self.layers = layers
        self.optimizer: Any = None
        self.price = 0.0
        self.averages = {id(b): torch.zeros_like(b.gates) for x in layers for b in x.bonds}
        self.ranks = [x.rank for x in layers]
        self.start = self.excess(self.ranks)

    def excess(self, ranks: Sequence[Rank]) -> float:
        """Logarithm of cost / limit, of the metric where that is largest.

        Args:
            ranks: A rank for every layer.
        """
        cost = sum((x.cost(r) for x, r in zip(self.layers, ranks, strict=True)), self.problem.fixed)
        return max(math.log(cost[x.metric] / x.target) for x in self.problem.limits)

    def share(self, cost: Cost) -> float:
        """A cost in shares of the limits, summed over metrics.

        Args:
            cost: The cost.
        """
        return sum(cost[x.metric] / x.target for x in self.problem.limits)

    @torch.no_grad()
    def after_step(self, step: int, losses: object) -> None:
        """Absorb, take the proximal step, and update λ.

        Args:
            step: Number of the step, from 0.
            losses: Not used.
        """
        for layer in self.layers:
            if self.penalty == "nuclear" and step % 10 == 0:
                layer.rotate()
            for bond in layer.bonds:
                bond.absorb()
        if step == 0:
            self.price = self._first_price()
        for layer, rank in zip(self.layers, self.ranks, strict=True):
            self._shrink(layer, rank)
        self.ranks = [x.left(lambda bond: bond.gates != 0) for x in self.layers]
        wanted = max(0.0, 1 - step / (self.steps / 2)) * max(self.start, 0.0)
        self.price *= math.exp(ASCENT * max(-1.0, min(1.0, self.excess(self.ranks) - wanted)))
        if step >= 3 * self.steps // 4:
            for layer in self.layers:
                for bond in layer.bonds:
                    self.averages[id(bond)] += bond.gates.abs()

    def _first_price(self) -> float:
        """λ at which a tenth of all gates gains less than it costs."""
        gains = [
            b.gates.grad.abs() / max(self.share(x.component_cost(i, r)), 1e-12)  # type: ignore[union-attr]
            for x, r in zip(self.layers, self.ranks, strict=True)
            for i, b in enumerate(x.bonds)
        ]
        return max(float(torch.cat(gains).quantile(0.1)), 1e-12)

    def _shrink(self, layer: Gated, rank: Rank) -> None:
        rates = [
            GATE_RATE * self.price * self.share(layer.component_cost(i, rank)) / self._spread(bond)
            for i, bond in enumerate(layer.bonds)
        ]
        if self.penalty == "group":
            norm = torch.cat([b.gates for b in layer.bonds]).norm().clamp_min(1e-12)
            rates = [r / 2 * (1 + b.gates.abs() / norm) for r, b in zip(rates, layer.bonds, strict=True)]
        for bond, threshold in zip(layer.bonds, rates, strict=True):
            weights = hoyer_weights(bond.gates) if self.penalty == "hoyer" else 1.0
            strongest = int(bond.gates.abs().argmax())  # is kept: a bond without gates would block all gradients
            value = bond.gates[strongest].clone()
            bond.gates.copy_(soft_threshold(bond.gates, threshold * weights))
            bond.gates[strongest] = value

    def _spread(self, bond: GatedBond) -> Tensor:
        """Adam's √v of a bond's gates: the metric of its steps."""
        state = self.optimizer.state[bond.gates]
        return (state["exp_avg_sq"] / (1 - 0.999 ** state["step"].item())).sqrt() + 1e-12

    def tighten(self) -> tuple[Rank, ...]:
        """Choose the final ranks: take components by the λ at which a proximal step would zero them, while they fit.

        Gates alone cannot be compared between layers: their scales are those of the layers' weights.
        """
        entries = [
            (float(value), n, i)
            for n, x in enumerate(self.layers)
            for i, bond in enumerate(x.bonds)
            for value in self.averages[id(bond)]
            * self._spread(bond)
            / max(self.share(x.component_cost(i, self.ranks[n])), 1e-12)
        ]
        ranks = [[1] * len(x.bonds) for x in self.layers]
        seen = {(n, i): 0 for n, x in enumerate(self.layers) for i in range(len(x.bonds))}
        for _, n, i in sorted(entries, key=lambda e: -e[0]):
            seen[n, i] += 1
            if seen[n, i] <= ranks[n][i]:
                continue
            ranks[n][i] += 1
            if self.excess([tuple(r) for r in ranks]) > 0:
                ranks[n][i] -= 1
        return tuple(tuple(r) for r in ranks)
