"""compress, save and load: the budget is kept, and damaged files are refused."""

from __future__ import annotations

import copy
import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import rankopt
from rankopt.candidates.search_space import SearchSpace
from rankopt.decompositions.plan import read_plan
from rankopt.experiments.digits import DigitsNet
from rankopt.experiments.digits import digits as digits_task
from rankopt.search.compress import run_search
from rankopt.search.settings import SearchSettings
from tests.helpers.models import Odd
from tests.helpers.spaces import QUICK


@pytest.fixture(scope="module")
def result(digits):
    return run_search(digits, digits.problem({"params": 0.3}), SearchSettings())


def test_the_budget_is_kept_and_the_model_unchanged(digits):
    before = copy.deepcopy(digits.task.model.state_dict())
    for budget in ({"params": 0.5}, {"macs": "40%"}, {"bytes": "60KB"}, {"params": 0.5, "macs": 0.35}):
        made = run_search(digits, digits.problem(budget), SearchSettings())
        cost = rankopt.count(made.model, digits.task.example_input)
        for limit in made.limits:
            assert cost[limit.metric] <= limit.target
            assert made.info["budget"][limit.metric] == {
                "requested": limit.requested,
                "target": limit.target,
                "achieved": cost[limit.metric],
                "dense": digits.dense[limit.metric],
            }
    assert all(torch.equal(v, before[k]) for k, v in digits.task.model.state_dict().items())


def test_result_holds_what_the_contract_names(result):
    info = result.info
    assert set(info) >= {"task", "strategy", "seed", "seconds", "trials", "budget", "optimality_gap", "score", "layers"}
    assert set(info["trials"]) == {
        "asked", "finished", "failed", "stopped", "distinct", "limit", "outside", "interrupted",
    }  # fmt: skip
    assert set(info["score"]["dense"]) == {"validation", "test"} == set(info["score"]["compressed"])
    for layer in info["layers"]:
        assert set(layer) >= {"name", "method", "rank", "params", "macs", "error", "reason"}
        assert layer["reason"]
    assert info["optimality_gap"] <= 1e-6
    assert info["score"]["compressed"]["test"] > 0.9
    assert json.loads(json.dumps(info)) == info


def test_accuracy_survives_moderate_budgets(digits):
    made = run_search(digits, digits.problem({"params": 0.5}), SearchSettings())
    score = made.info["score"]
    assert score["compressed"]["test"] >= score["dense"]["test"] - 0.02


def test_save_and_load(result, digits, tmp_path):
    result.save(tmp_path)
    for source in (digits.task.model, DigitsNet):  # a model with other weights serves too: all come from the file
        small = rankopt.load(source, tmp_path)
        torch.testing.assert_close(small.eval()(digits.task.example_input), result.model(digits.task.example_input))
    assert read_plan(tmp_path)[0] == result.plan
    assert (tmp_path / "plan.json").stat().st_mode & 0o044, "others may read it"
    text = (tmp_path / "plan.json").read_text()
    assert '"version": 3' in text and "cp_merged" in text and '"form": "factorised"' in text


def test_plans_of_earlier_versions_are_read_with_default_form_and_precision(result, digits, tmp_path):
    result.save(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    for version, unknown in ((2, "precision"), (1, "form")):
        plan["version"] = version
        for layer in plan["layers"]:
            del layer[unknown]
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        assert read_plan(tmp_path)[0] == result.plan
        rankopt.load(digits.task.model, tmp_path)
    plan["layers"][1] |= {"method": "ttn", "rank": [2]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert read_plan(tmp_path)[0].choices[1].form == "reconstructed"


def test_a_model_nobody_prepared(tmp_path):
    torch.manual_seed(0)
    model = Odd()
    batches = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    made = rankopt.compress(model, batches, {"params": 0.95}, space=QUICK, cache=tmp_path / "cache")
    assert rankopt.count(made.model, batches[0]).params <= 0.95 * rankopt.count(model, batches[0]).params
    names = {c.name: c for c in made.plan.choices}
    assert "shared" in names["tied_a"].reason and names["tied_a"].method == "dense"
    assert made.model.alias is made.model.twice
    made.save(tmp_path / "run")
    torch.testing.assert_close(rankopt.load(Odd, tmp_path / "run").eval()(batches[0]), made.model.eval()(batches[0]))
    assert "layers" in made.summary() and max(map(len, made.summary().splitlines())) <= 100


def test_a_single_layer_is_a_model_too(tmp_path):
    torch.manual_seed(0)
    made = rankopt.compress(nn.Linear(32, 32), [torch.randn(64, 32)], {"params": 0.5}, space=QUICK, cache=tmp_path)
    assert rankopt.count(made.model, torch.zeros(1, 32)).params <= 528


def test_loaders_tuples_and_dictionaries(tmp_path):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x, scale=None):
            return {"logits": self.b(torch.relu(self.a(x))) * scale}

    batches = [{"x": torch.randn(8, 24), "scale": torch.ones(8, 1)} for _ in range(4)]
    made = rankopt.compress(TwoInputs(), batches, {"params": 0.6}, space=QUICK, cache=tmp_path)
    assert made.info["budget"]["params"]["achieved"] <= 720
    data = torch.utils.data.TensorDataset(torch.randn(64, 24), torch.zeros(64))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    made = rankopt.compress(
        nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)),
        loader,
        {"params": 0.6},
        space=QUICK,
        cache=tmp_path,
    )
    assert made.info["budget"]["params"]["achieved"] <= 405


def test_train_mode_and_dtype_survive(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 4)).train().double()
    made = rankopt.compress(model, [torch.randn(64, 32).double()], {"params": 0.6}, space=QUICK, cache=tmp_path)
    assert made.model.training and all(p.dtype == torch.float64 for p in made.model.parameters())


# --- bad input --------------------------------------------------------------------------------------


def test_bad_python_input(tmp_path, digits):
    model, x = nn.Sequential(nn.Linear(32, 32)), [torch.randn(8, 32)]
    options = {"space": QUICK, "cache": tmp_path}
    with pytest.raises(rankopt.TaskError, match="calibration set is empty"):
        rankopt.compress(model, [], {"params": 0.5}, **options)
    with pytest.raises(rankopt.TaskError, match="no layer that can be factorised"):
        rankopt.compress(nn.EmbeddingBag(9, 3), [torch.randint(9, (4, 5))], {"params": 0.5}, **options)
    with pytest.raises(rankopt.BudgetError, match="least achievable"):
        rankopt.compress(model, x, {"params": 0.001}, **options)
    with pytest.raises(rankopt.RankoptError, match="unknown strategy"):
        rankopt.compress(model, x, {"params": 0.5}, strategy="magic", **options)
    with pytest.raises(rankopt.RankoptError, match="unknown decomposition 'magic': choose from svd_out"):
        SearchSpace(families=("magic",))
    with pytest.raises(rankopt.StudyError, match="the first said: TaskError: the score is nan"):
        rankopt.compress(model, x, {"params": 0.5}, score=lambda m: float("nan"), **options)
    with pytest.raises(rankopt.TaskError, match="input of layer '0' is NaN"):
        rankopt.compress(model, [torch.full((4, 32), torch.nan)], {"params": 0.5}, **options)


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("plan.json", lambda b: b[: len(b) // 2], "damaged"),
        ("plan.json", lambda b: b"[]", "not a rankopt plan"),
        ("plan.json", lambda b: b.replace(b'"version": 3', b'"version": 99'), "version 99"),
        ("plan.json", lambda b: b.replace(b'"cp_merged"', b'"os.system"'), "unknown method"),
        ("plan.json", lambda b: b.replace(b'"method"', b'"module"'), "damaged"),
        ("plan.json", lambda b: b.replace(b'"factorised"', b'"magic"'), "has no form 'magic'"),
        ("plan.json", lambda b: b.replace(b'"conv2"', b'"conv9"'), "no layer 'conv9'"),
        ("model.safetensors", lambda b: b[:-7], "damaged"),
        ("model.safetensors", lambda b: b[:-7] + b"1234567", "damaged"),
        ("model.safetensors", lambda b: b"", "damaged"),
    ],
)
def test_damaged_files_are_noticed(result, tmp_path, name, change, message):
    result.save(tmp_path)
    damage(tmp_path, name, change)
    with pytest.raises(rankopt.PlanError, match=message):
        rankopt.load(DigitsNet, tmp_path)


def test_missing_files_and_other_models(result, tmp_path):
    with pytest.raises(rankopt.PlanError, match=r"there is no .*plan\.json"):
        rankopt.load(DigitsNet, tmp_path)
    result.save(tmp_path)
    with pytest.raises(rankopt.PlanError, match="for another model: this one has no layer"):
        rankopt.load(nn.Linear(3, 3), tmp_path)
    other = DigitsNet()
    other.conv2 = nn.Conv2d(16, 40, 3)
    with pytest.raises(rankopt.PlanError, match=r"layer 'conv2' is Conv2d with weight \(40, 16, 3, 3\)"):
        rankopt.load(other, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(rankopt.PlanError, match="cannot be read"):
        rankopt.load(DigitsNet, tmp_path)


def test_absurd_ranks_are_refused_before_anything_is_allocated(result, tmp_path):
    result.save(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    layer = next(x for x in plan["layers"] if x["method"] != "dense")
    for rank in ([10**9], [0], [1, 2, 3, 4], [True]):
        layer["rank"] = rank
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        with pytest.raises(rankopt.PlanError, match=r"cannot have rank|rank.0 = True is not what it should be"):
            rankopt.load(DigitsNet, tmp_path)


def test_a_full_disk_spoils_nothing(result, tmp_path, monkeypatch):
    result.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(rankopt.RankoptError, match=r"cannot be written: .*No space left"):
        result.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_a_damaged_cache_entry_is_computed_again(tmp_path):
    task = digits_task()
    cache = tmp_path / "cache"
    first = rankopt.compress(task.model, task.calibration, {"params": 0.3}, space=QUICK, cache=cache)
    files = sorted(cache.iterdir())
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:-9] if path.suffix == ".json" else b"\0" * 40)
    again = rankopt.compress(task.model, task.calibration, {"params": 0.3}, space=QUICK, cache=cache)
    assert again.plan.choices == first.plan.choices


# --- models that tools stumble over -------------------------------------------------------------------


class ReadsAttributes(nn.Module):
    """Its forward asks its layers for their sizes and weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 24)

    def forward(self, x):
        y = self.conv(x).view(len(x), self.conv.out_channels, -1).mean(2)
        return self.head(y.view(-1, self.head.in_features)) + 0 * self.head.weight.sum()


def quick(model, batches, budget, tmp_path, **more):
    return rankopt.compress(model, batches, budget, space=QUICK, cache=tmp_path / "cache", **more)


def test_forwards_that_read_their_layers_attributes(tmp_path):
    torch.manual_seed(0)
    made = quick(ReadsAttributes(), [torch.randn(32, 3, 8, 8)], {"params": 0.7}, tmp_path)
    assert made.model.head.out_features == 24 and made.model.conv.kernel_size == (3, 3)


def test_shared_biases_and_replaced_forwards_stay_dense(tmp_path):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    model[1].bias = model[0].bias
    model[2].forward = lambda x: x
    made = quick(model, [torch.randn(64, 32)], {"params": 0.9}, tmp_path)
    reasons = [c.reason for c in made.plan.choices]
    assert "shared" in reasons[0] and "shared" in reasons[1] and "replaced on the instance" in reasons[2]


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.map, self.what = nn.Linear(32, 32), what

    def forward(self, x):
        return self.what(self.map(x))


def test_any_output_will_do_with_an_objective_of_its_own(tmp_path):
    def objective(model):
        return float((model.map(torch.ones(1, 32)) ** 2).mean())

    for what in (lambda y: {"loss": None, "logits": y}, lambda y: y.argmax(1), lambda y: None):
        made = quick(Returns(what), [torch.randn(64, 32)], {"params": 0.6}, tmp_path, objective=objective)
        assert made.info["budget"]["params"]["achieved"] <= 633
    with pytest.raises(rankopt.TaskError, match="give the task an objective of its own"):
        quick(Returns(lambda y: None), [torch.randn(64, 32)], {"params": 0.6}, tmp_path)


def test_the_cache_tells_forwards_apart(tmp_path):
    """The same weights and data with another forward are another model."""
    torch.manual_seed(0)
    model, x = Returns(torch.relu), [torch.randn(64, 32)]
    first = quick(model, x, {"params": 0.6}, tmp_path)
    model.what = torch.tanh
    cached = quick(model, x, {"params": 0.6}, tmp_path)
    fresh = rankopt.compress(model, x, {"params": 0.6}, space=QUICK, cache=tmp_path / "other")
    assert cached.plan == fresh.plan
    assert cached.info["objective"]["predicted"] == pytest.approx(fresh.info["objective"]["predicted"], rel=1e-6)
    assert cached.info["objective"]["predicted"] != first.info["objective"]["predicted"]


def test_infeasible_budgets_are_refused_before_anything_is_fitted(tmp_path):
    with pytest.raises(rankopt.BudgetError, match="least achievable"):
        quick(nn.Linear(32, 32), [torch.randn(8, 32)], {"params": 0.01}, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_wrong_types_get_clear_errors(tmp_path):
    model, x = nn.Linear(32, 32), torch.randn(64, 32)
    for calibration, budget, message in [
        (x, {"params": 0.5}, r"give batches, for example x\.split"),
        (None, {"params": 0.5}, "give batches"),
        ([x], 0.5, "give a dictionary"),
        ([x], None, "give budget"),
        ([x[:, :5]], {"params": 0.5}, "does not run"),
    ]:
        with pytest.raises(rankopt.RankoptError, match=message):
            quick(model, calibration, budget, tmp_path)
    with pytest.raises(rankopt.TaskError, match=r"give an nn\.Module"):
        quick(lambda y: y, [x], {"params": 0.5}, tmp_path)
