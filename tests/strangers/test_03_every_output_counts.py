"""Kind 3: only the first output counts, and a second head is ruined at an objective of 0."""

from __future__ import annotations

import torch
from torch import nn

from rankopt.model.objective import Divergence
from tests.strangers.models import compress, example_batch, net

X = example_batch()


def test_a_second_head_counts():
    model = net(lambda s, x: (s.h(s.a(x)), s.b(s.a(x))))
    result = compress(model, params=0.8)
    errors = [((p - q).norm() / p.norm()).item() for p, q in zip(model(X), result.model(X), strict=True)]
    assert result.info["objective"]["best"] > 1e-3
    assert max(errors) < 0.4, errors


def test_what_comes_after_a_scalar_loss_counts():
    model = net(lambda s, x: {"loss": s.h(s.a(x)).square().mean(), "logits": s.h(s.b(s.a(x)))})
    small = net(lambda s, x: {"loss": s.h(s.a(x)).square().mean(), "logits": s.h(s.b(s.a(x)))})
    nn.init.zeros_(small.b.weight)
    objective = Divergence(model, [X])
    assert objective(model) == 0
    assert objective(small) > 0.01


def test_each_output_counts_relative_to_its_own_size():
    """Heads of which one is a thousand times larger: both give the same when each loses the same share."""
    model = net(lambda s, x: (torch.stack([s.h(x @ s.a.weight.T)[:, 0]], 1), 1e3 * s.b(s.a(x)), s.b(s.a(x))))
    objective = Divergence(model, [X])
    halves = [objective(net(lambda s, x, i=i: _halved(model(x), i))) for i in (1, 2)]
    assert abs(halves[0] - halves[1]) < 1e-3 * halves[0]


def _halved(outputs: tuple[torch.Tensor, ...], which: int) -> tuple[torch.Tensor, ...]:
    return tuple(z / 2 if i == which else z for i, z in enumerate(outputs))


def test_slices_add_up_to_the_whole():
    model = net(lambda s, x: (s.h(s.a(x)), s.b(s.a(x))))
    other = net(lambda s, x: (s.h(0.9 * s.a(x)), s.b(0.8 * s.a(x))))
    objective = Divergence(model, [X[:100], X[100:]])
    sums = [part.sums(other) for part in objective.slices([0.3, 1.0])]
    total, weight = (sum(column) for column in zip(*sums, strict=True))
    assert abs(total / weight - objective(other)) < 1e-9
