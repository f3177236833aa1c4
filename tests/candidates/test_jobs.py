"""Where fits run: on a GPU, with layers of equal shapes at once, or on the cores beside it."""

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankopt.candidates import fit as fits
from rankopt.candidates import lazy
from rankopt.candidates.jobs import Job, for_cores, for_gpu, seconds_on_a_core, stacks
from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.core.errors import RankoptError
from rankopt.core.records import Task
from rankopt.decompositions.plan import apply
from rankopt.model.inventory import inventory
from tests.helpers.layers import make


def job(family="cp_merged", ranks=((4,),), steps=20, layer=None):
    return Job(layer or make("conv3x3").layer, family, ranks, steps, True, f"{family}{ranks}{steps}")


FAMILIES = st.sampled_from(["svd_out", "svd_in", "cp_merged", "tucker2"])
KINDS = st.lists(st.tuples(FAMILIES, st.integers(1, 500), st.integers(1, 6)), min_size=1, max_size=8)


def in_stacks(kinds):
    """Jobs, and a stack for each family with its steps and number of layers."""
    jobs, found = [], []
    for family, steps, layers in kinds:
        found.append([*range(len(jobs), len(jobs) + layers)])
        jobs += [job(family, ((2, 2),) if family == "tucker2" else ((2,),), steps)] * layers
    return jobs, found


@given(KINDS, st.integers(1, 16))
def test_a_gpu_and_the_cores_share_fits_so_that_they_are_done_sooner_than_either_alone(kinds, cores):
    jobs, found = in_stacks(kinds)

    def ends(chosen):
        left = [stack for stack in found if stack not in chosen]
        longest = [jobs[i].seconds() for stack in left for i in stack]
        on_gpu = sum(jobs[stack[0]].seconds_on_gpu(len(stack)) for stack in chosen)
        together = sum(seconds_on_a_core([jobs[i] for i in stack]) for stack in left)
        return max(on_gpu, 1.0 + max(*longest, together / cores) if left else 0.0)

    here = for_gpu(jobs, found, cores, 1.0)
    assert here == [stack for stack in found if stack in here]
    assert ends(here) <= min(ends([]), ends(found)) + 1e-9


def test_few_short_fits_do_not_wait_for_processes_and_wide_ones_go_to_the_gpu():
    short = [job(steps=5)] * 3
    assert for_gpu(short, [[0, 1, 2]], 16, 2.0) == [[0, 1, 2]]
    (wide,) = inventory(torch.nn.Conv2d(256, 256, 3), torch.zeros(1, 256, 4, 4))
    jobs = [job(steps=25, layer=wide, ranks=((128,),)), *[job(steps=25)] * 16]
    assert for_gpu(jobs, [[i] for i in range(17)], 16) == [[0]]


@given(KINDS, st.integers(1, 16))
def test_stacks_are_cut_so_that_cores_are_busy_to_the_end(kinds, cores):
    jobs, found = in_stacks(kinds)
    parts = for_cores(jobs, found, cores)
    seconds = [seconds_on_a_core([jobs[i] for i in part]) for part in parts]
    assert sorted(i for part in parts for i in part) == [*range(len(jobs))]
    assert seconds == sorted(seconds, reverse=True)
    ends = [0.0] * cores
    for spent in seconds:  # as workers take them
        ends[ends.index(min(ends))] += spent
    longest = max(one.seconds() for one in jobs)
    assert max(ends) <= sum(seconds) / cores + max(longest, seconds[0])
    assert sum(seconds) <= sum(one.seconds() for one in jobs) + 1e-9
    for part in parts:
        assert any(set(part) <= set(stack) for stack in found)


def test_narrow_layers_are_stacked_and_wide_ones_are_not():
    narrow, wide = (inventory(torch.nn.Conv2d(n, n, 3), torch.zeros(1, n, 4, 4))[0] for n in (16, 256))
    assert for_cores([job(layer=narrow)] * 4, [[0, 1, 2, 3]], 1) == [[0, 1, 2, 3]]
    assert for_cores([job(layer=wide, ranks=((200,),))] * 4, [[0, 1, 2, 3]], 1) == [[0], [1], [2], [3]]


def test_fits_of_equal_shapes_and_steps_and_alike_ranks_are_one_stack_and_those_of_a_layer_follow_each_other():
    a, b = (dataclasses.replace(make("conv3x3").layer, name=name) for name in "ab")
    other = dataclasses.replace(make("linear").layer, name="other")
    jobs = [job(layer=a), job("svd_out", layer=other), job("tucker2", ((2, 2),), layer=a), job(layer=b)]
    jobs += [job(layer=b, steps=21), job(layer=b, ranks=((5,),))]
    assert stacks(jobs, lambda layer: repr(layer.shape)) == [[0, 3, 5], [2], [4], [1]]
    jobs.append(job(layer=b, ranks=((9,),)))
    assert stacks(jobs, lambda layer: repr(layer.shape)) == [[0, 3, 5], [2], [4], [6], [1]]
    assert stacks(jobs, lambda layer: repr(layer.shape), most=1) == [[0], [3], [5], [2], [4], [6], [1]]


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d
    model = torch.nn.Sequential(
        conv(6, 12, 3), torch.nn.ReLU(), conv(12, 12, 3), torch.nn.ReLU(), conv(12, 12, 3), torch.nn.Flatten()
    ).eval()
    x = torch.randn(64, 6, 8, 8)
    return Task(model, x[:1], [x])


@pytest.mark.parametrize("workers", [1, 2])
def test_fits_that_a_gpu_and_workers_share_are_those_of_workers(task, tmp_path, monkeypatch, workers):
    """A CPU plays the GPU's part: the same calls, in stacks."""
    space = SearchSpace(
        families=("svd_out", "cp_merged", "tucker2", "svd_grouped"), points=6, steps=40, effort="normal"
    )
    monkeypatch.setattr(lazy, "SMALL", 0.0)
    before = prepare(task, space, tmp_path / "before", workers=1)
    stacked = []
    whole = fits._fit_stack

    def watch(cache, numbers, *others):
        stacked.append(len(numbers))
        return whole(cache, numbers, *others)

    def half(jobs, found, *_):
        return found[::2]

    monkeypatch.setattr(fits, "is_on_gpu", lambda statistics: True)
    monkeypatch.setattr(fits, "free_on_gpu", lambda device: 2**34)
    monkeypatch.setattr(fits, "for_gpu", half)
    monkeypatch.setattr(fits, "_fit_stack", watch)
    after = prepare(task, space, tmp_path / "after", workers=workers)
    assert max(stacked) > 1
    for name, candidates in before.candidates.items():
        errors = {(c.method, c.rank): c.error for c in candidates}
        again = {(c.method, c.rank): c.error for c in after.candidates[name]}
        assert errors.keys() == again.keys()
        assert [again[key] for key in errors] == pytest.approx([*errors.values()], rel=0.02)


def test_a_task_s_own_objective_gets_the_compressed_model_itself(task, tmp_path, monkeypatch):
    """It may count operations, for example; on a GPU the default one is measured on reconstructed weights."""
    space, asked = SearchSpace(families=("svd_out",), points=2), []

    def build(*given):
        asked.append(given)
        return apply(*given)

    monkeypatch.setattr("rankopt.candidates.prepare.apply_to_measure", build)
    for objective, count in ((None, 1), (lambda model: 0.0, 1)):
        found = prepare(dataclasses.replace(task, objective=objective), space, tmp_path, workers=1)
        problem = found.problem({"params": 0.8})
        found.to_measure(problem, tuple(0 for _ in problem.frontiers))
        assert len(asked) == count


def test_workers_read_statistics_from_the_cache_and_say_what_is_lost(task, tmp_path):
    statistics = prepare(task, SearchSpace(families=("svd_out",), points=2), tmp_path, workers=1).statistics
    stored = pickle.loads(pickle.dumps(statistics.stored))
    for name in statistics:
        assert statistics.shapes(name) == {
            "moment": [*statistics[name][0].shape],
            "metric": [*statistics[name][1].shape],
        }
        for mine, other in zip(statistics[name], stored[name], strict=True):
            assert mine.dtype == other.dtype == torch.float64 and torch.equal(mine, other)
    for path in tmp_path.glob("statistics-*"):
        path.unlink()
    with pytest.raises(RankoptError, match=r"the cache .* lost what was just written"):
        stored["0"]
    assert torch.equal(statistics["0"][0], mine_again(task, tmp_path)), "measured again"


def mine_again(task, cache):
    return prepare(task, SearchSpace(families=("svd_out",), points=2), cache, workers=1).statistics["0"][0]


def test_families_that_could_not_take_a_step_are_left_out_and_named(task, tmp_path, monkeypatch):
    families = SearchSpace(families=("svd_out", "cp_merged", "tucker2"), points=3, steps=10)
    monkeypatch.setattr("rankopt.decompositions.parameter_search.MAX_FLOPS", 1e3)
    found = prepare(task, families, tmp_path, workers=1)
    assert {c.method for menu in found.candidates.values() for c in menu} == {"svd_out"}
    assert sum("cp_merged, tucker2 are not tried on" in warning for warning in found.warnings) == 3
    others = prepare(task, SearchSpace(families=("cp_merged",), points=3, steps=10), tmp_path, workers=1)
    assert all(others.candidates.values()), "where there are no others, these are offered as they start"
    assert not any("are not tried" in warning for warning in others.warnings)
