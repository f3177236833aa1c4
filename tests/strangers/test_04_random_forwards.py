"""Kind 4: a forward that draws random numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rankopt.model.forward import inference
from rankopt.model.objective import Divergence
from tests.strangers.models import compress, example_batch, net

X = example_batch()


def noisy():
    """Dropout that is left on, in eval mode too."""
    return net(lambda s, x: s.h(F.dropout(s.b(s.a(x)), 0.5, training=True)))


def test_every_evaluation_draws_the_same_numbers():
    model = noisy()
    assert Divergence(model, [X])(model) == 0
    torch.manual_seed(5)
    assert Divergence(model, [X])(model) == 0


def test_the_random_state_of_the_program_is_left_alone():
    model, state = noisy(), torch.get_rng_state()
    with inference(model):
        model(X)
    assert torch.equal(state, torch.get_rng_state())


def test_it_is_noticed_and_said():
    result = compress(noisy(), params=0.5)
    assert any("random numbers" in note for note in result.info["warnings"])
    assert "random numbers" in result.summary()
    quiet = compress(net(lambda s, x: s.h(s.b(s.a(x)))), params=0.5)
    assert not any("random numbers" in note for note in quiet.info["warnings"])
