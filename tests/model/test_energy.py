"""Energy of an inference, from counters written as a kernel would, and from those of this machine."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import nn

from rankopt.model import energy
from rankopt.model.energy import GRAMS_PER_KWH, RAPL, per_inference, rapl_meter

RANGE = 262_143_328_850


def zone(folder, number, name, start):
    path = folder / f"intel-rapl:{number}"
    path.mkdir(parents=True)
    for file, value in (("name", name), ("max_energy_range_uj", RANGE), ("energy_uj", start)):
        (path / file).write_text(f"{value}\n")
    return path / "energy_uj"


@pytest.fixture
def sysfs(tmp_path):
    """Two packages, the first with a part of its own, and the platform as a whole."""
    counters = [zone(tmp_path, 0, "package-0", 1_000), zone(tmp_path, 1, "package-1", RANGE - 2_000_000)]
    zone(tmp_path, "0:0", "core", 0)
    zone(tmp_path, 2, "psys", 0)
    (tmp_path / "dtpm").mkdir()
    return tmp_path, counters


def add(counter, microjoules):
    counter.write_text(f"{(int(counter.read_text()) + microjoules) % (RANGE + 1)}\n")


def test_packages_are_summed_over_the_end_of_a_counter(sysfs):
    folder, counters = sysfs
    meter = rapl_meter(folder)
    assert meter() == 0
    for steps in itertools.accumulate([1, 1, 1]):
        add(counters[0], 500_000)
        add(counters[1], 1_500_000)
        assert meter() == pytest.approx(2.0 * steps)


def test_joules_and_grams_of_an_inference(sysfs):
    folder, counters = sysfs
    found = per_inference(lambda: add(counters[0], 250_000), 0.05, rapl=folder)
    assert found.joules == pytest.approx(0.25) and found.inferences >= 1
    assert found.grams == pytest.approx(0.25 / 3.6e6 * GRAMS_PER_KWH)
    assert per_inference(lambda: add(counters[1], 10**6), 0, rapl=folder, grams_per_kwh=36).grams == pytest.approx(1e-5)
    assert "0.25 J" in str(found) and "RAPL" in str(found) and "CO₂ per inference" in str(found)


def test_counters_only_for_root_are_reported(sysfs, monkeypatch):
    folder, counters = sysfs
    read = energy.Path.read_text

    def refused(path, *args, **kwargs):
        if path == counters[0]:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(energy.Path, "read_text", refused)
    found = per_inference(lambda: None, rapl=folder)
    assert found.joules is None is found.grams
    assert (
        str(found)
        == f"energy not available here: {counters[0]} is only for root: run as root, or let this user read it"
    )


def test_a_machine_without_counters_is_reported(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        text = f"energy not available here: no RAPL counter of a CPU package in {folder} (virtual machines"
        assert str(per_inference(lambda: None, rapl=folder)).startswith(text)


def test_gpus_need_the_package_and_the_driver(monkeypatch):
    if not torch.cuda.is_available():
        assert "energy not available here: NVML does not tell the energy of GPU 0" in str(
            per_inference(lambda: None, gpu=0)
        )
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert str(per_inference(lambda: None, gpu=0)) == (
        "energy not available here: nvidia-ml-py is not installed (pip install 'rankopt[energy]')"
    )


@pytest.mark.gpu
def test_a_gpu_tells_its_energy():
    model, x = nn.Linear(4096, 4096).cuda(), torch.randn(512, 4096, device="cuda")
    found = per_inference(lambda: model(x), 2.0, gpu=0)
    assert found.joules is not None and 1e-4 < found.joules < 10


def test_this_machine_answers():
    """Joules of a plausible power, or in words why not."""
    model, x = nn.Linear(512, 512), torch.randn(64, 512)
    found = per_inference(lambda: model(x), 0.5)
    if found.joules is None:
        assert "not available here: " in str(found)
        assert not any((z / "energy_uj").exists() for z in RAPL.glob("*-rapl:*")) or "only for root" in str(found)
    else:
        assert 0.1 < found.joules * found.inferences / 0.5 < 2000
