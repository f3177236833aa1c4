"""Checkpoints of a training: a safetensors file in the run folder, written atomically."""

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
from rankopt.core.result_record import EpochRow
from rankopt.core.run_folder import check_same
from rankopt.core.text import reason

FILE = "checkpoint.safetensors"


@dataclass
class State:
    """The state of a training, except for its optimizer and schedule.

    Attributes:
        model: The model in training.
        average: Moving average of its weights.
        before: Validation score before the training.
        stage: Index of the current stage.
        step: Completed steps of the current stage.
        losses: The losses of every step, by stage.
        epochs: A record of each epoch.
        best: State dict of the best epoch.
        chosen: The precision and memory format that were chosen, if the recipe left it open.
        seconds: Duration so far.
    """

    model: nn.Module
    average: AveragedModel | None = None
    before: float | None = None
    stage: int = 0
    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    epochs: list[EpochRow] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules to save, by their prefix in the file."""
        return {"model": self.model} | ({} if self.average is None else {"average": self.average})


def write(path: Path, state: State, optimizer: Any, schedule: Any, fingerprint: str) -> None:
    """Write everything that is needed to resume a training.

    Args:
        path: The file.
        state: State of the training.
        optimizer: Optimizer of the current stage.
        schedule: Learning rate schedule of the current stage.
        fingerprint: Content hash of the training's recipe and inputs, which `read` compares.
    """
    tensors = {f"{k}.{name}": t for k, m in state.modules().items() for name, t in m.state_dict().items()}
    tensors |= {f"best.{name}": t for name, t in (state.best or {}).items()}
    tensors |= {f"losses.{i}": torch.tensor(x, dtype=torch.float64) for i, x in enumerate(state.losses)}
    kept = optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in kept["state"].items():
        numbers[str(index)] = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
    metadata = {
        "question": fingerprint,
        "before": state.before,
        "stage": state.stage,
        "step": state.step,
        "epochs": state.epochs,
        "chosen": state.chosen,
        "seconds": state.seconds,
        "groups": kept["param_groups"],
        "numbers": numbers,
        "schedule": schedule.state_dict(),
    }
    # Copies, as safetensors supports neither shared memory nor strides.
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    write_beside(path, lambda p: save_file(copies, p, {"rankopt": json.dumps(metadata)}))


def read(path: Path, fingerprint: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint of a certain training.

    Args:
        path: The file.
        fingerprint: Content hash of the training's recipe and inputs.

    Returns:
        Metadata, and tensors by name.

    Raises:
        StudyError: The file is damaged, or belongs to another training.
    """
    metadata, tensors = load(path)
    kept, asked = {"fingerprint": metadata.get("question")}, {"fingerprint": fingerprint}
    what = "training (another recipe, model, teacher or task)"
    check_same(kept, asked, path, what, "Go on with the same settings, or choose another folder")
    return metadata, tensors


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read any checkpoint.

    Args:
        path: The file.

    Returns:
        Metadata, and tensors by name.

    Raises:
        StudyError: The file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["rankopt"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{path} is damaged ({reason(error)}): remove it, and train again from the start") from error
    return metadata, tensors


def restore(state: State, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Restore the state of a training in place.

    Args:
        state: The state.
        metadata: Metadata of a checkpoint.
        tensors: Its tensors.
    """
    for kind, module in state.modules().items():
        module.load_state_dict(under(kind, tensors))
    state.stage, state.step, state.epochs = metadata["stage"], metadata["step"], metadata["epochs"]
    state.before, state.seconds = metadata["before"], metadata["seconds"]
    state.chosen = metadata["chosen"]
    state.best = under("best", tensors) or None
    losses = under("losses", tensors)
    state.losses = [losses[str(i)].tolist() for i in range(len(losses))]


def restore_optimizer(optimizer: Any, schedule: Any, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Restore the optimizer and the schedule of the current stage in place.

    Args:
        optimizer: The optimizer.
        schedule: Its learning rate schedule.
        metadata: Metadata of a checkpoint.
        tensors: Its tensors.
    """
    kept: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in metadata["numbers"].items()}
    for name, tensor in under("optimizer", tensors).items():
        index, key = name.split(".", 1)
        kept[int(index)][key] = tensor
    own = optimizer.state_dict()["param_groups"]  # how to compute is not kept: the device may be another one
    groups = [
        old | {k: v for k, v in new.items() if k in ("fused", "foreach", "capturable")}
        for new, old in zip(own, metadata["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": kept, "param_groups": groups})
    for parameter, values in optimizer.state.items():  # in the memory format of the parameter, as fused steps need
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter).copy_(value)
    schedule.load_state_dict(metadata["schedule"])


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors whose names start with a prefix and a dot.

    Args:
        prefix: The prefix.
        tensors: Tensors by name.

    Returns:
        These tensors, by their names without the prefix.
    """
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}
