"""The front of a search, against all pairs of trials."""

from __future__ import annotations

import numpy as np
import pytest

from rankopt.core.errors import RankoptError
from rankopt.core.records import Cost, Trial
from rankopt.search.front import Front, searched_metrics


def trials(seed, count=30):
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        params, macs, objective = rng.integers(1, 6, 3).tolist()
        ended = ("failed", None) if number % 7 == 3 else ("finished", objective)
        found.append(Trial(number, (number,), ended[0], Cost(params, macs, 0), ended[1]))
    return found


@pytest.mark.parametrize("metrics", [("params",), ("macs", "params")])
@pytest.mark.parametrize("seed", range(5))
def test_no_trial_beats_one_of_the_front_and_each_other_is_beaten(metrics, seed):
    all_trials = trials(seed)
    points = {t.number: (*(t.cost[m] for m in metrics), t.objective) for t in all_trials if t.objective is not None}

    def beats(a, b):
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    best = {p for p in points.values() if not any(beats(q, p) for q in points.values())}
    found = Front.of(all_trials, metrics)
    assert {points[t.number] for t in found} == best and len(found) == len(best)
    assert found[0].cost[metrics[0]] == min(p[0] for p in points.values())
    assert [row["trial"] for row in found.rows] == [t.number for t in found] and set(metrics) <= found.rows[0].keys()


def test_of_equal_trials_the_first_is_kept():
    same = [Trial(n, (n,), "finished", Cost(1, 1, 0), 2.0) for n in range(3)]
    assert [t.number for t in Front.of(same, ["params"])] == [0]


@pytest.mark.parametrize("metrics", [(), ("speed",)])
def test_metrics_that_are_none(metrics):
    with pytest.raises(RankoptError, match=r"give one of|choose from params"):
        Front.of(trials(0), metrics)


@pytest.mark.parametrize("text", ["objective,macs,latency", "objective, macs , latency", "macs,latency"])
def test_metrics_of_a_searchs_objectives_are_read_with_and_without_spaces(text):
    assert searched_metrics({"objectives": text}) == ["macs", "latency"]
    assert searched_metrics({}) == []
