"""A training on disk, at one of its steps: a safetensors file beside the run, written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rankopt.core.errors import StudyError
from rankopt.core.files import write_beside

FILE = "checkpoint.safetensors"


@dataclass
class State:
    """Where a training is. stage: index of the one that runs; step: how many of its steps are done."""

    model: nn.Module
    average: AveragedModel | None = None
    before: float | None = None  # validation score of the model that was given
    stage: int = 0
    step: int = 0
    losses: list[list[float]] = field(default_factory=list)  # of each stage, of each step
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None  # state dict of the best epoch
    seconds: float = 0.0

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model} | ({} if self.average is None else {"average": self.average})


def write(path: Path, state: State, optimizer: Any, schedule: Any, question: str) -> None:
    """Write everything that a training goes on from. question: what it trains, which `read` compares."""
    tensors = {f"{k}.{name}": t for k, m in state.modules().items() for name, t in m.state_dict().items()}
    tensors |= {f"best.{name}": t for name, t in (state.best or {}).items()}
    tensors |= {f"losses.{i}": torch.tensor(x, dtype=torch.float64) for i, x in enumerate(state.losses)}
    kept = optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in kept["state"].items():
        numbers[str(index)] = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
    about = {
        "question": question,
        "before": state.before,
        "stage": state.stage,
        "step": state.step,
        "epochs": state.epochs,
        "seconds": state.seconds,
        "groups": kept["param_groups"],
        "numbers": numbers,
        "schedule": schedule.state_dict(),
    }
    # Each by itself and contiguous: the format knows neither shared memory nor strides.
    alone = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    write_beside(path, lambda p: save_file(alone, p, {"rankopt": json.dumps(about)}))


def read(path: Path, question: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As `load`. Raises StudyError for a file of another training, too."""
    about, tensors = load(path)
    if about.get("question") != question:
        raise StudyError(
            f"{path} belongs to another training (another recipe, model, teacher or task): go on with the same "
            "settings, or choose another folder"
        )
    return about, tensors


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` wrote. Raises StudyError for a file that is damaged."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["rankopt"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{path} is damaged ({error}): remove it, and train again from the start") from error
    return about, tensors


def restore(state: State, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Bring a state, its optimizer aside, to what was read."""
    for kind, module in state.modules().items():
        module.load_state_dict(under(kind, tensors))
    state.stage, state.step, state.epochs = about["stage"], about["step"], about["epochs"]
    state.before, state.seconds = about["before"], about["seconds"]
    state.best = under("best", tensors) or None
    losses = under("losses", tensors)
    state.losses = [losses[str(i)].tolist() for i in range(len(losses))]


def restore_optimizer(optimizer: Any, schedule: Any, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Bring the optimizer and the schedule of the stage that runs to what was read."""
    kept: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in about["numbers"].items()}
    for name, tensor in under("optimizer", tensors).items():
        index, key = name.split(".", 1)
        kept[int(index)][key] = tensor
    optimizer.load_state_dict({"state": kept, "param_groups": about["groups"]})
    schedule.load_state_dict(about["schedule"])


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}
