"""The agent learns a policy from rewards alone, adapts it to measured objectives, and carries it elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankopt.core.errors import RankoptError
from rankopt.core.records import Trial
from rankopt.search.loop import Study, search
from rankopt.strategies.allocation import allocate
from rankopt.strategies.policy import PPO, advantages, new_policy
from rankopt.strategies.registry import make_strategy
from rankopt.strategies.rl import Agent
from rankopt.strategies.walks import Context, Walks
from tests.helpers.problems import synthetic

LAYERS, TRAINED = 8, 1536


def mean_return(agent, walks=200):
    """Of walks drawn from the policy, under the predicted losses and the problem's budget."""
    walked = agent.environment
    ones = torch.ones(walks, LAYERS, dtype=torch.float64)
    context = Context(ones, walked.room.expand(walks, -1))
    return float(walked.run(agent.policy, context, torch.Generator().manual_seed(9))[1].reward.sum(0).mean())


def permuted(update):
    """PPO's update with every walk's rewards given to another walk."""

    def learn(self, steps, rate=1.0):
        order = torch.randperm(steps.reward.shape[1], generator=self.generator)
        update(self, steps._replace(reward=steps.reward[:, order]), rate)

    return learn


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tmp_path_factory.mktemp("policies") / "policy.safetensors"


@pytest.fixture(scope="module")
def trained(policy):
    """An agent with its returns; the file `policy` then holds what it has learned."""
    problem, _ = synthetic(0.3, LAYERS)
    agent = Agent(problem, walks=TRAINED, save=str(policy))
    return agent, agent.train()


def test_the_learning_curve_rises_to_near_the_exact_allocation(trained):
    agent, returns = trained
    assert np.mean(returns[-6:]) > np.mean(returns[:6]) + 0.15
    problem = agent.problem
    assert problem.loss(agent.ask()) < 1.1 * allocate(problem).loss < problem.loss(Agent(problem, walks=0).ask())


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_on_frontiers_of_a_network_it_comes_near_the_exact_allocation(digits, metric):
    """Their steps are uneven, and a layer may have a great share of the budget."""
    problem = digits.problem({metric: 0.3})
    assert problem.loss(Agent(problem).ask()) < 1.05 * allocate(problem).loss


def test_with_permuted_rewards_nothing_is_learned(trained, monkeypatch):
    """What the policy knows it has from the rewards: untrained, all positions that fit are drawn alike."""
    problem, _ = synthetic(0.3, LAYERS)
    untrained = mean_return(Agent(problem, walks=0))
    gained = mean_return(trained[0]) - untrained
    monkeypatch.setattr(PPO, "update", permuted(PPO.update))
    changes = []
    for seed in range(2):
        agent = Agent(problem, seed, walks=TRAINED)
        agent.train()
        changes.append(mean_return(agent) - untrained)
    assert gained > 0.2 and abs(np.mean(changes)) < 0.3 * gained


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("seed", [0, 1])
def test_it_adapts_to_measured_objectives_and_not_to_permuted_ones(policy, seed):
    problem, truth = synthetic(0.3, LAYERS, seed)
    rng = np.random.default_rng(seed)

    def run(permute):
        agent, told, late = Agent(problem, seed, policy=str(policy)), [], []
        for number in range(30):
            plan = agent.ask()
            told.append(truth(plan)[0])
            objective = told[rng.integers(len(told))] if permute else told[-1]
            agent.tell(Trial(number, plan, "finished", problem.cost(plan), objective))
            late += [told[-1]] if number >= 20 else []
        return told[0], np.mean(late)

    first, late = run(permute=False)
    assert late < 0.97 * first and late < run(permute=True)[1]


@pytest.mark.usefixtures("trained")
def test_it_is_far_above_random(policy):
    problem, truth = synthetic(0.3, LAYERS, 3)
    best = {
        name: min(t.objective for t in search(Study(problem, make_strategy(name, problem, 0, options), 15), truth))
        for name, options in (("rl", {"policy": str(policy)}), ("random", {}))
    }
    assert best["rl"] < 0.9 * best["random"]


def plans(agent, truth, trials=8):
    return [t.proposal for t in search(Study(agent.problem, agent, trials), truth)]


def test_a_saved_policy_gives_the_same_plans(tmp_path):
    """Also after it has adapted to the first trials."""
    problem, truth = synthetic(0.3, 5)
    file, later = str(tmp_path / "policy.safetensors"), str(tmp_path / "later.safetensors")
    agent = Agent(problem, 4, walks=512, save=file)
    agent.train()
    loaded = Agent(problem, 4, policy=file, save=later)
    whole = plans(loaded, truth)
    assert whole == plans(Agent(problem, 4, walks=512), truth) and len(set(whole)) == 8
    before, after = load_file(file), load_file(later)
    assert any(not torch.equal(before[k], after[k]) for k in before), "what it learned from trials is saved, too"
    assert plans(Agent(problem, 5, policy=file), truth) != whole


@pytest.mark.usefixtures("trained")
def test_a_policy_transfers_to_another_budget_and_another_network(policy):
    for share, layers, seed in ((0.15, LAYERS, 0), (0.2, 20, 7)):
        other, _ = synthetic(share, layers, seed)
        carried, walks = Agent(other, policy=str(policy)).ask(), Agent(other, walks=0).environment
        context = Context(torch.ones(50, layers, dtype=torch.float64), walks.room.expand(50, -1))
        drawn, _ = walks.run(new_policy(0), context, torch.Generator().manual_seed(0))
        assert other.loss(carried) < 1.25 * allocate(other).loss
        assert other.loss(carried) < min(other.loss(tuple(row)) for row in drawn.tolist())


def test_files_that_are_no_policy_of_this_version_are_refused(tmp_path):
    problem, _ = synthetic(0.3, 3)
    weights = {k: v.contiguous() for k, v in new_policy(0).state_dict().items()}
    (tmp_path / "text").write_text("no tensors")
    save_file(weights, tmp_path / "other")
    save_file(weights, tmp_path / "old", {"rankopt_policy": "0"})
    save_file({"x": torch.zeros(2)}, tmp_path / "damaged", {"rankopt_policy": "1"})
    for name, message in (
        ("missing", "cannot be read"),
        ("text", "cannot be read"),
        ("other", "is no policy"),
        ("old", "is of version 0, this rankopt reads 1"),
        ("damaged", "is damaged"),
    ):
        with pytest.raises(RankoptError, match=message) as refused:
            make_strategy("rl", problem, 0, {"policy": str(tmp_path / name)})
        assert "--option save=FILE" in str(refused.value)


@pytest.mark.parametrize("option", ["walks", "batch"])
def test_options_are_checked(option):
    with pytest.raises(RankoptError, match=f"option {option} is -1"):
        Agent(synthetic(0.3, 3)[0], **{option: -1})


def test_walks_take_what_the_masks_allow_and_pay_their_loss():
    """Under several budgets at once; a walk's rewards add up to the logarithm of its loss."""
    problem, _ = synthetic(0.3, LAYERS)
    walks = Agent(problem).environment
    assert isinstance(walks, Walks)
    context = walks.training_context(50, torch.Generator().manual_seed(0))
    actions, steps = walks.run(new_policy(0), context, torch.Generator().manual_seed(1))
    returns = steps.reward.sum(0).double()
    lost, start = [], []
    for walk, row in enumerate(actions.tolist()):
        chosen = problem.candidates(tuple(row))
        assert sum(c.cost.params for c in chosen) <= context.room[walk, 0]
        weights = context.weights[walk].numpy()
        lost.append(np.log(sum(w * c.loss for w, c in zip(weights, chosen, strict=True))))
        start.append(float(returns[walk]) + lost[-1])
    again, repeated = walks.run(new_policy(0), context, torch.Generator().manual_seed(2))
    for walk, row in enumerate(again.tolist()):
        chosen = problem.candidates(tuple(row))
        other = np.log(sum(w * c.loss for w, c in zip(context.weights[walk].numpy(), chosen, strict=True)))
        assert float(repeated.reward.sum(0)[walk]) + other == pytest.approx(start[walk], abs=1e-3)


def test_advantages_of_a_right_value_are_zero():
    reward = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.5, -1.0]])
    value = reward.flip(0).cumsum(0).flip(0)
    assert advantages(reward, value).abs().max() == 0
    assert torch.allclose(advantages(reward, torch.zeros(3, 2))[0], reward[0] + 0.95 * reward[1] + 0.95**2 * reward[2])
