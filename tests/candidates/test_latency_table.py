"""Conditions of a measurement, runtimes, and files of times."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import nn

from rankopt.candidates.latency import random_factors
from rankopt.candidates.latency_table import Conditions, interleaved, machine, passes, read_table
from rankopt.candidates.prepare import prepare
from rankopt.core.errors import RankoptError
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.model.layer_kinds import describe
from tests.helpers.latency import SPACE, Net, make_task


def test_conditions_are_read_and_written():
    given = Conditions.parse("cpu, batch=8, threads=2,layout=channels_last")
    assert given == Conditions(batch=8, threads=2, layout="channels_last")
    assert Conditions.parse(str(given)) == given
    assert str(Conditions()) == "cpu,batch=1,threads=1,runtime=eager"
    assert Conditions.parse("threads=2").device == "cpu"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu,speed=3", "'speed=3' is none of"),
        ("cpu,batch=two", "whole numbers"),
        ("cpu,batch=0", "1 or more"),
        ("cpu,runtime=tvm", "runtime='tvm', choose from"),
        ("nonsense", "no device 'nonsense'"),
        ("cpu,runtime=onnxruntime,dtype=bfloat16", "float32 on cpu"),
    ],
)
def test_bad_conditions_are_refused(text, said):
    with pytest.raises(RankoptError, match=said):
        Conditions.parse(text)


def test_times_are_ordered_as_work_is_and_threads_are_restored():
    threads = torch.get_num_threads()
    modules = [nn.Conv2d(8, 8, 3), nn.Conv2d(128, 128, 3)]
    modules = [nn.Sequential(nn.Conv2d(16, m.in_channels, 1), m) for m in modules]
    small, large = (
        statistics.median(s)
        for s in interleaved(passes(modules, torch.randn(1, 16, 32, 32), Conditions(threads=2)), Conditions(threads=2))
    )
    assert small < large and torch.get_num_threads() == threads


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_a_pass_in_a_runtime_computes_what_the_module_does(runtime):
    module, x = Net().eval(), torch.randn(2, 3, 24, 24)
    (one,) = passes([module], x, Conditions(runtime=runtime))
    found = one()
    found = torch.from_numpy(found[0]) if runtime == "onnxruntime" else found
    torch.testing.assert_close(found, module(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["svd_grouped", "tt"])
def test_onnxruntime_times_families_that_one_exporter_does_not_know(family):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    layer = describe(conv, "")
    rank = DECOMPOSITIONS[family].ranks(layer, [0.5])[0]
    module, x = random_factors(DECOMPOSITIONS[family].build(conv, layer, rank)), torch.randn(1, 8, 6, 6)
    (one,) = passes([module], x, Conditions(runtime="onnxruntime"))
    torch.testing.assert_close(torch.from_numpy(one()[0]), module(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("damage", ["", "[]", '{"format": 1}', "{"])
def test_a_damaged_table_is_refused(tmp_path, damage):
    path = tmp_path / "table.json"
    path.write_text(damage)
    with pytest.raises(RankoptError, match="no table of times"):
        read_table(path, Conditions())
    with pytest.raises(RankoptError, match="there is no table"):
        prepare(make_task(), SPACE, budget={"latency": 0.9}, latency_on=Conditions(table="nowhere"))


def test_machine_names_the_processor():
    assert "torch" in machine(Conditions())


def test_both_models_may_be_fused_before_they_are_timed():
    conditions = Conditions.parse("cpu,fused=yes")
    assert str(conditions) == "cpu,batch=1,threads=1,runtime=eager,fused=yes"
    assert "fused" in conditions.measured and "fused" not in Conditions().measured  # tables of earlier versions serve
    with pytest.raises(RankoptError, match="fused='maybe'"):
        Conditions.parse("fused=maybe")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    for one in passes([model], torch.randn(1, 3, 8, 8), Conditions()):
        one()
    assert seen
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(1, 3, 8, 8)
    (fused,) = passes([plain], x, conditions)
    with torch.no_grad():
        assert torch.allclose(fused(), plain(x), atol=1e-5)
