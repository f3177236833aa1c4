"""`rankopt.compress` with workers, from a script whose classes and functions lie in `__main__`."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("ray")

SCRIPT = """
import json
import os
import sys

import torch
from torch import nn

import rankopt
from rankopt.candidates.search_space import SearchSpace

FACTOR = 2.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return FACTOR * self.b(torch.relu(self.a(x)))


def score(model):
    assert isinstance(model, Net)
    assert os.nice(0) < 15, "Ray's own niceness, with which trials starve on a busy machine"
    return 1 / (1 + model(X).square().mean().item())


if __name__ == "__main__":
    torch.manual_seed(0)
    net, X = Net().eval(), torch.randn(64, 16)
    space = SearchSpace(families=("svd_out",), points=4, steps=0)
    found = []
    for ray in ({}, {"workers": 1, "cpus_per_trial": 0.5}):
        result = rankopt.compress(
            net, [X], {"params": 0.5}, score, strategy="random", trials=3, space=space, cache=sys.argv[1], **ray
        )
        found.append([[c.rank for c in result.plan.choices], result.info["objective"]["best"]])
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_script_that_compresses_on_workers_finds_what_it_finds_without(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    command = [sys.executable, "mine.py", str(tmp_path / "cache")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, env=os.environ)
    assert ran.returncode == 0, ran.stderr
    here, there = json.loads(ran.stdout)
    assert there == [here[0], pytest.approx(here[1], rel=1e-5)]
