"""Model -> numbers: the default objective, and guarded calls of a task's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.calibration import class_axis, main_output
from rankopt.core import TaskError
from rankopt.inventory import inference, run, to_device


class Divergence:
    """The default objective: mean KL divergence, in nats, of a model's predictions from the dense model's.

    Classes lie where `calibration.class_axis` says. Where there is but one output, the squared error relative to
    the dense outputs' variance takes its place.
    """

    def __init__(self, dense: nn.Module, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.reference = [z.cpu() for z in self._outputs(dense)]
        finite = all(torch.isfinite(z).all() for z in self.reference)
        if not finite:
            raise TaskError("the dense model's outputs are NaN or infinite on the calibration data")
        self.axis = class_axis(self.reference[0])
        everything = torch.cat([z.flatten() for z in self.reference]).double()
        self.spread = max((everything - everything.mean()).square().sum().item(), 1e-30)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with inference(model):
            return [main_output(run(model, to_device(b, model))).float() for b in self.batches]

    def __call__(self, model: nn.Module) -> float:
        total = count = 0.0
        for z, z0 in zip(self._outputs(model), self.reference, strict=True):
            z0 = z0.to(z.device)
            if self.axis is not None:
                log_p, log_p0 = F.log_softmax(z.double(), self.axis), F.log_softmax(z0.double(), self.axis)
                total += F.kl_div(log_p, log_p0, reduction="sum", log_target=True).item()
                count += z.numel() // z.shape[self.axis]
            else:
                total += (z - z0).double().square().sum().item()
        return total / count if self.axis is not None else total / self.spread


def call(what: str, function: Callable[[nn.Module], float] | None, model: nn.Module) -> float | None:
    """A task's score or objective in eval mode, without gradients. Raises TaskError if it gives no finite number."""
    if function is None:
        return None
    try:
        with inference(model):
            value = function(model)
    except Exception as error:
        raise TaskError(f"{what} raised {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TaskError(f"{what} returned {type(value).__name__}, not a number") from error
    if not math.isfinite(number):
        raise TaskError(f"{what} is {number}")
    return number
