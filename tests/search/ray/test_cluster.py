"""A search uses all nodes of a cluster, goes on when one dies, and uses one that joins. Two raylets on this machine.

Statistics, candidates and sensitivities are made on all nodes in the same way.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from rankopt.candidates.prepare import prepare
from rankopt.candidates.search_space import SearchSpace
from rankopt.experiments.tasks import load_task
from rankopt.search.evaluator import Evaluator
from rankopt.search.loop import Study
from rankopt.search.ray.runner import RaySearch
from rankopt.strategies.allocation import allocate
from rankopt.strategies.registry import make_strategy
from rankopt.training import checkpoint
from tests.helpers.problems import synthetic
from tests.search.ray.test_runner import SPACE
from tests.search.ray.test_training import Loss, away, here, weights

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.slow  # a minute each: raylets start, and their death has to be noticed


class OnNode:
    """An evaluation that takes a while; its score tells the node that it ran on."""

    def __init__(self, evaluate, seconds):
        self.evaluate, self.seconds = evaluate, seconds

    def __call__(self, proposal):
        import ray

        objective, _ = self.evaluate(proposal)
        time.sleep(self.seconds)
        return objective, float(int(ray.get_runtime_context().get_node_id()[:8], 16))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return prepare(load_task("digits"), SPACE, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves workers on a busy machine
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


def search(digits, trials, seconds, report):
    """Search; `report` is called with the study, so far, and each trial that ends."""
    problem = digits.problem({"params": 0.3})
    study = Study(problem, make_strategy("random", problem, 0), trials, callbacks=[report])
    found = RaySearch(2)(study, OnNode(Evaluator.of(digits, problem), seconds))
    assert len({t.proposal for t in found}) == len(found)
    assert all(t.state == "finished" for t in found), [t.error for t in found]
    return found


def test_a_search_goes_on_without_a_node_that_died(digits, cluster):
    second = cluster.add_node(num_cpus=1)

    def report(study, trial):
        if len(study.trials) == 4:
            cluster.remove_node(second, allow_graceful=False)

    found = search(digits, 10, 1.0, report)
    assert len(found) == 10
    assert len({t.score for t in found[:4]}) == 2, "both nodes had work"
    assert len({t.score for t in found[-3:]}) == 1


def test_a_node_that_joins_is_used(digits, cluster):
    """The search ends as soon as it is, or after five minutes."""

    def report(study, trial):
        if len(study.trials) == 2:
            cluster.add_node(num_cpus=1)
        if len({t.score for t in study.trials}) == 2:
            study.stop()

    found = search(digits, 100, 3.0, report)
    assert len({t.score for t in found[:2]}) == 1
    assert len({t.score for t in found}) == 2 and len(found) < 100


FITS = SearchSpace(families=("svd_out", "cp_merged", "tucker2"), points=10, steps=200)


@pytest.mark.parametrize("killed_in", ["_fit_away", "_list_rises"])
def test_a_task_is_prepared_on_all_nodes_to_the_same_plan(killed_in, cluster, tmp_path, monkeypatch):
    """A node dies in the middle. None of them sees this process's cache."""
    monkeypatch.setattr("rankopt.candidates.fit.START_UP", 0.0)
    second = cluster.add_node(num_cpus=1)
    ended = []

    def pool(function, calls, memory, shared=None):
        calls = ((function, *arguments) for arguments in calls)
        for result in RaySearch(2).task_pool()(on_node, calls, memory, shared):
            ended.append((function.__name__, result[1]))
            if [name for name, _ in ended].count(killed_in) == 3 and second in cluster.list_all_nodes():
                cluster.remove_node(second, allow_graceful=False)
            yield result[0]

    task = load_task("digits")
    away = prepare(task, FITS, tmp_path / "away", workers=pool)
    here = prepare(task, FITS, tmp_path / "here", workers=1)
    assert {name for name, _ in ended} == {"_measure_away", "_fit_away", "_list_rises"} and len(
        {node for _, node in ended}
    ) == 2
    assert away.curves == here.curves and away.passes == here.passes
    assert away.candidates.keys() == here.candidates.keys()
    for name, candidates in here.candidates.items():
        assert [(c.method, c.rank) for c in away.candidates[name]] == [(c.method, c.rank) for c in candidates]
        assert [c.error for c in away.candidates[name]] == pytest.approx([c.error for c in candidates], rel=1e-9)
    problem = here.problem({"params": 0.3})
    assert allocate(away.problem({"params": 0.3})).proposal == allocate(problem).proposal


def on_node(shared, function, *arguments):
    return function(shared, *arguments), ray.get_runtime_context().get_node_id()


class Held:
    """Holds a CPU."""


def test_a_training_goes_on_without_the_node_that_died_to_the_same_weights(cluster, tmp_path):
    held = ray.remote(num_cpus=1)(Held).remote()  # so that the training takes place on the other node
    ray.get(held.__ray_ready__.remote())
    second = cluster.add_node(num_cpus=1)
    loss, killed = Loss(tmp_path, seconds=0.2), []

    def note(text):
        if not killed and (tmp_path / checkpoint.FILE).is_file() and sum(loss.counts()) >= 6:
            killed.extend(loss.counts())
            ray.kill(held)
            cluster.remove_node(second, allow_graceful=False)

    trained = away(tmp_path, loss, note=note)
    first, rest = loss.counts()
    assert 6 <= killed[0] <= first < 18 and 18 - first <= rest < 18, "from the last checkpoint that had come here"
    assert torch.equal(weights(trained), here(tmp_path))


class Heavy:
    """An evaluation that carries more bytes than the object store holds."""

    def __init__(self):
        self.ballast = torch.zeros(75_000_000)

    def __call__(self, proposal):
        return float(sum(proposal)), float(self.ballast[0])


def test_a_search_goes_on_where_the_object_store_is_full():
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR", **small)
    try:
        problem, _ = synthetic()
        trials = RaySearch(2)(Study(problem, make_strategy("random", problem, 0), 6), Heavy())
    finally:
        ray.shutdown()
    assert [t.objective for t in trials] == [sum(t.proposal) for t in trials] and len(trials) == 6


def test_a_cluster_with_a_token_lets_in_whoever_has_it(tmp_path, quick_space):
    """Without it, the error says what to set."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef"}
    free = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
    free.close()
    temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's sockets have long paths
    head = ("start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats")
    ray_command = [str(Path(sys.executable).with_name("ray")), *head, f"--temp-dir={temporary}"]
    options = ("--budget=params=0.3", "--strategy=random", "--trials=2", "--workers=1", "--no-html")
    search = [sys.executable, "-m", "rankopt.cli", "search", "digits", *options, "--space", str(quick_space)]

    def searched(folder, **environment):
        where = {**os.environ, "RANKOPT_CACHE": str(tmp_path / "cache"), **environment}
        command = [*search, f"--ray-address={address}", f"--out={tmp_path / folder}"]
        return subprocess.run(command, env=where, capture_output=True, text=True, check=False)

    with subprocess.Popen(
        [*ray_command, f"--port={address.rpartition(':')[2]}"], env={**os.environ, **token}
    ) as started:
        try:
            wait_for_port(address)
            assert searched("with", **token).returncode == 0
            refused = searched("without", RAY_AUTH_MODE="disabled")
            assert refused.returncode == 2 and "RAY_AUTH_TOKEN" in refused.stderr.strip().splitlines()[-1]
        finally:
            started.send_signal(signal.SIGTERM)
            started.wait(60)
            shutil.rmtree(temporary, ignore_errors=True)


def wait_for_port(address):
    host, port = address.split(":")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.2)
    raise AssertionError(f"nothing answers at {address}")
