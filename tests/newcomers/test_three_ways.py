"""rankopt as newcomers use it, each step right the first time: timm, Hugging Face, and an extension in a notebook."""

from __future__ import annotations

import importlib.util
import sys

import nbformat
import pytest
import torch
import torch.nn.functional as F
from nbclient import NotebookClient

import rankopt
from tests.helpers import ROOT

sys.path.insert(0, str(ROOT))
from studies.tasks.zoo import without_torchvision  # timm asks for torchvision

pytestmark = pytest.mark.slow

SPACE = rankopt.SearchSpace(families=("svd_out",), points=5, steps=5)


def train(model, batches, steps, loss_of):
    """A training loop of one's own; returns the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    model.train()
    for step in range(steps):
        loss = loss_of(model, batches[step % len(batches)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def same_outputs(one, other, *args, **kwargs):
    with torch.no_grad():
        a, b = (getattr(m(*args, **kwargs), "logits", None) for m in (one, other))
        if a is None:
            a, b = one(*args, **kwargs), other(*args, **kwargs)
    return torch.equal(a, b)


def test_a_timm_model_and_a_training_loop_of_ones_own(tmp_path):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is missing: tests/install_models.sh installs it")
    with without_torchvision():
        import timm

    def build():
        with without_torchvision():
            return timm.create_model("resnet10t", num_classes=5)

    torch.manual_seed(0)
    model = build().eval()
    x, y = torch.randn(32, 3, 32, 32), torch.arange(32) % 5
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)

    def top1(model):
        return (model(x).argmax(1) == y).float().mean().item()

    assert len(rankopt.inspect(model, x[:1]).layers) == 15
    result = rankopt.compress(model, loader, {"params": 0.5}, score=top1, space=SPACE, examples=32, progress=False)
    assert result.plan.cost.params <= 0.5 * result.plan.dense.params
    batches = list(loader)
    losses = train(result.model, batches, 12, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
    assert losses[-1] < losses[0]
    rankopt.save(result.model, tmp_path / "trained", x[:1])
    again = rankopt.load(build, tmp_path / "trained").eval()
    assert same_outputs(result.model, again, x)
    assert "layer4.0.conv2" in result.report(tmp_path / "report.html").read_text()


def test_a_hugging_face_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=200, dim=48, hidden_dim=96, n_layers=2, n_heads=4, num_labels=3)
    torch.manual_seed(0)
    model = transformers.DistilBertForSequenceClassification(config).eval()
    ids = torch.randint(200, (24, 12))
    batches = [
        transformers.BatchEncoding({"input_ids": part, "attention_mask": torch.ones_like(part)})
        for part in ids.split(8)
    ]
    result = rankopt.compress(model, batches, {"params": 0.7}, space=SPACE, progress=False)
    assert result.plan.cost.params <= 0.7 * result.plan.dense.params
    labels = torch.arange(8) % 3
    losses = train(result.model, batches, 12, lambda m, batch: m(**batch, labels=labels).loss)
    assert losses[-1] < losses[0]
    rankopt.save(result.model, tmp_path / "run", dict(batches[0]))
    again = rankopt.load(lambda: transformers.DistilBertForSequenceClassification(config), tmp_path / "run").eval()
    assert same_outputs(result.model, again, **batches[0])
    assert "q_lin" in result.report(tmp_path / "report.html").read_text()


def test_an_extension_in_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    source = (ROOT / "examples" / "own_decomposition.py").read_text()
    cells = [
        source.partition("\ndef main")[0].replace("from __future__ import annotations\n", ""),
        "torch.manual_seed(0)\n"
        "model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 4)).eval()\n"
        "batches = [torch.randn(32, 16, 8, 8) for _ in range(2)]\n"
        "space = rankopt.SearchSpace(points=4, steps=5)\n"
        "rankopt.register(WidthFirst())\n"
        "result = rankopt.compress(model, batches, {'params': 0.5}, families=['width_first', 'svd_out'], space=space)\n"
        "result",
        "assert {c.method for c in result.frontier('0')} >= {'width_first'}\nresult.plot_frontier('0');",
        "from IPython.display import HTML\nHTML(result.report('report.html').read_text())",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [str(out.get("data", {}).get("text/html", "")) for cell in notebook.cells for out in cell.outputs]
    assert any("layers replaced" in text for text in shown) and any("The layers" in text for text in shown)
    assert any("image/png" in out.get("data", {}) for out in notebook.cells[2].outputs)
