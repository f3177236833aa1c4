"""Checkpoints of a training: a safetensors file in the run folder, written atomically."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import TypedDict

from rankopt.core.errors import RankoptError, StudyError
from rankopt.core.files import open_tensors, write_beside
from rankopt.core.result_record import EpochRow
from rankopt.core.run_folder import DAMAGE, check_same
from rankopt.core.schema import parse_json
from rankopt.core.text import reason
from rankopt.training.precision import Chosen

FILE = "checkpoint.safetensors"


STEP = "step"

STATES = {torch.optim.AdamW: {STEP, "exp_avg", "exp_avg_sq"}, torch.optim.SGD: {"momentum_buffer"}}
"""What an optimizer keeps of a parameter, by its type."""


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
    chosen: Chosen = field(default_factory=Chosen)
    seconds: float = 0.0

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules to save, by their prefix in the file."""
        return {"model": self.model} | ({} if self.average is None else {"average": self.average})


class Metadata(TypedDict):
    """What a checkpoint's header holds: the training's fingerprint ("question"), and all of its state but tensors."""

    question: str
    before: float | None
    stage: int
    step: int
    epochs: list[EpochRow]
    chosen: Chosen
    seconds: float


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        metadata: Its metadata.
        tensors: Its tensors by name.
        path: The file.
    """

    metadata: Metadata
    tensors: dict[str, Tensor]
    path: Path


def write(path: Path, state: State, optimizer: Any, fingerprint: str) -> None:
    """Write everything that is needed to resume a training.

    Args:
        path: The file.
        state: State of the training.
        optimizer: Optimizer of the current stage.
        fingerprint: Content hash of the training's recipe and inputs, which `read` compares.
    """
    tensors = {f"{k}.{name}": t for k, m in state.modules().items() for name, t in m.state_dict().items()}
    tensors |= {f"best.{name}": t for name, t in (state.best or {}).items()}
    tensors |= {f"losses.{i}": torch.tensor(x, dtype=torch.float64) for i, x in enumerate(state.losses)}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
    metadata: Metadata = {
        "question": fingerprint,
        "before": state.before,
        "stage": state.stage,
        "step": state.step,
        "epochs": state.epochs,
        "chosen": state.chosen,
        "seconds": state.seconds,
    }
    # Copies, as safetensors supports neither shared memory nor strides.
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    write_beside(path, lambda p: save_file(copies, p, {"rankopt": json.dumps(metadata)}))


def read(path: Path, fingerprint: str) -> Checkpoint:
    """Read a checkpoint of a certain training.

    Args:
        path: The file.
        fingerprint: Content hash of the training's recipe and inputs.

    Raises:
        StudyError: The file is damaged, or belongs to another training.
    """
    found = load(path)
    kept, asked = {"fingerprint": found.metadata["question"]}, {"fingerprint": fingerprint}
    what = "training (another recipe, model, teacher or task)"
    check_same(kept, asked, path, what, "Go on with the same settings, or choose another folder")
    return found


def load(path: Path) -> Checkpoint:
    """Read any checkpoint.

    Args:
        path: The file.

    Raises:
        StudyError: The file is damaged.
    """
    with _damage(path), open_tensors(path) as file:
        metadata: Metadata = parse_json(file.metadata()["rankopt"], Metadata)
        if min(metadata["stage"], metadata["step"]) < 0:
            raise ValueError("it has a stage or a step below 0")
        return Checkpoint(metadata, {name: file.get_tensor(name) for name in file.keys()}, path)  # noqa: SIM118


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Context: errors of a damaged checkpoint, also of torch where a tensor does not fit, are a StudyError."""
    try:
        yield
    except (*DAMAGE, OSError, RuntimeError) as error:
        if isinstance(error, RankoptError):
            raise
        raise StudyError(f"{path} is damaged ({reason(error)}): remove it, and train again from the start") from error


def restore(state: State, kept: Checkpoint) -> None:
    """Restore the state of a training in place.

    Args:
        state: The state.
        kept: A checkpoint of the training.

    Raises:
        StudyError: The checkpoint does not fit the training.
    """
    metadata, tensors = kept.metadata, kept.tensors
    with _damage(kept.path):
        for kind, module in state.modules().items():
            module.load_state_dict(under(kind, tensors))
        state.stage, state.step, state.epochs = metadata["stage"], metadata["step"], metadata["epochs"]
        state.before, state.seconds = metadata["before"], metadata["seconds"]
        state.chosen = metadata["chosen"]
        if state.chosen and not {"precision", "channels_last"} <= state.chosen.keys():
            raise ValueError("what was chosen is not complete")
        state.best = under("best", tensors) or None
        if state.best and _shapes(state.best) != _shapes(state.model.state_dict()):
            raise ValueError("the weights of the best epoch do not fit the model")
        losses = under("losses", tensors)
        state.losses = [losses[str(i)].double().tolist() for i in range(len(losses))]
        if [len(x) for x in state.losses[state.stage :]] != [state.step]:
            raise ValueError("it does not have the loss of every step")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in tensors.items()}


def restore_optimizer(optimizer: Any, schedule: Any, kept: Checkpoint, steps: int) -> None:
    """Restore the optimizer and the schedule of the current stage in place.

    Args:
        optimizer: The new optimizer of the stage.
        schedule: Its learning rate schedule.
        kept: A checkpoint of the training.
        steps: Steps of the stage.

    Raises:
        StudyError: The checkpoint does not fit the stage.
    """
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    with _damage(kept.path), warnings.catch_warnings():
        if (done := kept.metadata["step"]) > steps:
            raise ValueError(f"it has {done} steps of {steps}")
        warnings.simplefilter("ignore", UserWarning)  # these steps of the optimizer were made before
        for _ in range(done):
            schedule.step()
        for name, tensor in under("optimizer", kept.tensors).items():
            index, key = name.split(".", 1)
            state[int(index)][key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for parameter, values in optimizer.state.items():
            if values.keys() != STATES[type(optimizer)] or not all(_fits(k, t, parameter) for k, t in values.items()):
                raise ValueError("the state of its optimizer does not fit the model")
            for key, value in values.items():  # in the memory format of the parameter, as fused steps need
                if key != STEP:
                    values[key] = torch.empty_like(parameter).copy_(value)


def _fits(key: str, value: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor can be a parameter's moment, or its number of steps."""
    return value.ndim == 0 and bool(value >= 0) if key == STEP else value.shape == parameter.shape


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors whose names start with a prefix and a dot.

    Args:
        prefix: The prefix.
        tensors: Tensors by name.

    Returns:
        These tensors, by their names without the prefix.
    """
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}
