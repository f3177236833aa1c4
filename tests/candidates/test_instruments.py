"""Measuring forward passes by events of a GPU, by a counter of energy, in a captured graph. No GPU is needed."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from torch import nn

from rankopt.candidates import instruments
from rankopt.candidates.instruments import ENERGY, CudaEvents, EnergyOfCalls
from rankopt.candidates.latency_table import Conditions, captured, interleaved, machine, passes
from rankopt.core.errors import RankoptError
from rankopt.model.energy import NotHereError

GPU = torch.device("cuda:0")


class Clock:
    """A clock and a counter that move when work is done, the counter only every tenth second."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds

    def joules(self) -> float:
        return 200.0 * round(self.now // 0.1 * 0.1, 6)


def test_events_time_a_call_from_the_idle_gpu_to_the_end_of_its_work():
    clock, said = Clock(), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            said.append(f"record on {stream}")
            self.at = clock.now

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    sample = CudaEvents(GPU, Event, lambda device: f"stream of {device}", lambda device: said.append("wait"))
    assert sample(lambda: clock.work(0.0015)) == 1_500_000
    assert said == ["wait", "record on stream of cuda:0", "record on stream of cuda:0", "wait"]


@pytest.mark.parametrize("call", [0.0005, 0.03])
def test_energy_is_read_from_one_update_of_the_counter_to_another(call):
    """A counter that is updated every 0.1 s gives the energy of a call of 0.5 ms to the last digit."""
    clock = Clock()
    sample = EnergyOfCalls(clock.joules, lambda: None, 0.05, 0.3, lambda: clock.now)
    found = [sample(lambda: clock.work(call)) for _ in range(3)]
    assert found == [pytest.approx(200 * call * 1e9, rel=0.07)] * 3


def test_a_counter_that_stands_still_is_given_up():
    clock = Clock()
    sample = EnergyOfCalls(lambda: 5.0, lambda: None, 0.0, 0.1, lambda: clock.now)
    with pytest.raises(RankoptError, match="counter stands still"):
        sample(lambda: clock.work(0.01))


def test_energy_is_that_of_one_example(monkeypatch):
    """Of a pass of 8 examples, and of ten passes in a row."""
    used = 0.0

    def call():
        nonlocal used
        used += 0.16

    monkeypatch.setattr(instruments, "open_meter", lambda gpu: ("", lambda: used))
    monkeypatch.setitem(instruments.WINDOWS, "cpu", (0.0, 0.0))
    assert interleaved([call], Conditions(batch=8), 2, ENERGY, count=10) == [[2_000_000, 2_000_000]]


def test_without_a_counter_energy_is_no_budget(monkeypatch):
    def none(gpu):
        raise NotHereError("no counter")

    monkeypatch.setattr(instruments, "open_meter", none)
    with pytest.raises(RankoptError, match="energy cannot be measured here, nor be a budget: no counter"):
        ENERGY.open(torch.device("cpu"))


class FakeCuda:
    """What `captured` uses of torch.cuda: a graph keeps the calls that are made while it is captured."""

    def __init__(self):
        self.log = []
        self.graphs = []

    def install(self, patch):
        stream = types.SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))
        patch.setattr(torch.cuda, "CUDAGraph", self.new_graph)
        patch.setattr(torch.cuda, "Stream", lambda device: stream)
        patch.setattr(torch.cuda, "current_stream", lambda device: stream)
        patch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
        patch.setattr(torch.cuda, "device", lambda d: contextlib.nullcontext())
        patch.setattr(torch.cuda, "graph", lambda graph, stream: self.capturing())

    def new_graph(self):
        self.graphs.append(types.SimpleNamespace(replay=lambda: self.log.append("replay")))
        return self.graphs[-1]

    @contextlib.contextmanager
    def capturing(self):
        self.log.append("capture")
        yield
        self.log.append("captured")


def test_a_graph_is_captured_after_a_warm_up_and_replayed(monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    replay = captured(lambda: cuda.log.append("call"), GPU)
    assert cuda.log == ["wait", "call", "call", "wait", "capture", "call", "captured"]
    cuda.log.clear()
    replay()
    assert cuda.log == ["replay"]


def test_a_model_that_no_graph_can_hold_is_refused(monkeypatch):
    class Reads(nn.Module):
        def forward(self, x):
            if torch.cuda.log[-1:] == ["capture"]:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
            return x

    cuda = FakeCuda()
    cuda.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "log", cuda.log, raising=False)
    monkeypatch.setattr(Conditions, "of_module", lambda self, module: module)
    monkeypatch.setattr(Conditions, "of_input", lambda self, x: x)
    with pytest.raises(RankoptError, match=r"runtime=graph does not take this model on cuda \(RuntimeError: operation"):
        passes([Reads()], torch.zeros(1), Conditions("cuda", runtime="graph", table="elsewhere"))


def test_each_of_many_modules_is_compiled(monkeypatch):
    """torch.compile gives up after eight shapes of the same code, without a word, and runs eagerly."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: real(module, backend=backend, **options))
    modules = [nn.Linear(4, n) for n in range(1, 12)]
    x = torch.ones(1, 4)
    found = passes(modules, x, Conditions(runtime="compile"))
    assert len(compiled) == len(modules)
    with torch.inference_mode():
        assert [f().shape[1] for f in found] == list(range(1, 12))
    assert len(compiled) == len(modules), "measured as it was compiled"


def test_conditions_of_a_gpu_elsewhere_can_be_named_here():
    conditions = Conditions.parse("cuda:7,batch=64,dtype=bfloat16,runtime=graph,table=elsewhere")
    assert Conditions.parse(str(conditions)) == conditions and conditions.layer_calls == 10
    if torch.cuda.device_count() < 8:
        assert machine(conditions) == "a machine without cuda:7"
    with pytest.raises(RankoptError, match="runtime=graph captures a CUDA graph"):
        Conditions(runtime="graph")
