"""Channels of bonds: what each adds to the weight, of every family."""

from __future__ import annotations

import pytest
import torch

from rankopt.decompositions.channels import channel_count, components, factors_of, output_directions, rotation
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.layer_kinds import as_matrix
from tests.helpers.layers import SAMPLED, build, make

GENERATORS = {"ttn", "augmented_ttn", "mera", "brick_wall"}


def built(family, name):
    case, decomposition = make(name), DECOMPOSITIONS[family]
    rank = (decomposition.ranks(case.layer, [0.5]) or [decomposition.full_rank(case.layer)])[0]
    module, _ = build(family, case, rank, steps=2)
    return case.layer, rank, module


@pytest.mark.parametrize(("family", "name"), SAMPLED)
def test_the_channels_of_a_bond_add_up_to_the_weight_in_any_rotation(family, name):
    layer, rank, module = built(family, name)
    factors = factors_of(module)
    bonds = DECOMPOSITIONS[family].latent_bonds(layer, rank)
    assert bonds
    for bond in bonds:
        n = channel_count(factors, bond)
        turned = rotation(layer, family, rank, n, torch.Generator().manual_seed(0))
        torch.testing.assert_close(turned @ turned.T, torch.eye(n, dtype=torch.float64))
        if family in GENERATORS:  # nonlinear: components need not add up
            continue
        for directions in (torch.eye(n, dtype=torch.float64), turned):
            whole = sum(components(layer, family, factors, bond, directions))
            torch.testing.assert_close(whole, module.weight.detach())


@pytest.mark.parametrize("family", sorted(GENERATORS))
def test_a_generators_channel_is_what_its_weight_loses_without_it(family):
    layer, rank, module = built(family, "conv3x3")
    before = module.weight.detach().clone()
    for bond in DECOMPOSITIONS[family].latent_bonds(layer, rank):
        n = channel_count(factors_of(module), bond)
        assert n == bond.size and bond.inside[0].startswith("i")
        (component,) = components(layer, family, factors_of(module), bond, torch.eye(n, dtype=torch.float64)[:1])
        core = module.cores[bond.factor]
        kept = core.detach().clone()
        with torch.no_grad():
            core.select(bond.axis, 0).zero_()
            torch.testing.assert_close(before - module.weight, component)
            core.copy_(kept)
        assert component.norm() > 1e-3 * before.norm()


def test_a_depthwise_stage_has_the_channels_of_the_stage_before_it():
    layer, rank, _ = built("cp", "conv3x3")
    family = DECOMPOSITIONS["cp"]
    assert len(family.bonds(layer, rank)) == 3
    assert [b.inside for b in family.latent_bonds(layer, rank)] == [("C",)]
    layer, rank, _ = built("tucker", "conv3x3")
    assert next(b.size for b in DECOMPOSITIONS["tucker"].latent_bonds(layer, rank)) == rank[0]


def test_random_output_directions_take_what_they_project_on():
    layer, _, module = built("svd_in", "grouped same reflect")
    weight = module.weight.detach().double()
    for i, part in enumerate(output_directions(layer, weight.reshape(layer.shape), 4, torch.Generator())):
        rows, whole = as_matrix(layer, part), as_matrix(layer, weight)
        group = i % 2
        assert rows[1 - group].abs().max() == 0 and torch.linalg.matrix_rank(rows[group]) == 1
        rest = whole[group] - rows[group]
        assert torch.allclose(rows[group].T @ rest, torch.zeros(1, dtype=torch.float64), atol=1e-9)
