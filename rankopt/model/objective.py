"""Model -> numbers: the default objective, and guarded calls of a task's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.core.errors import TaskError
from rankopt.model.forward import batch_size, class_axis, inference, main_output, map_tensors, run, to_device


class Divergence:
    """The default objective: mean KL divergence, in nats, of a model's predictions from the dense model's.

    Classes lie where `calibration.class_axis` says. Where there is but one output, the squared error relative to
    the dense outputs' variance takes its place.
    """

    def __init__(self, dense: nn.Module, batches: Sequence[Any]) -> None:
        self.batches = list(batches)
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
        total, weight = self.sums(model)
        return total / weight

    def sums(self, model: nn.Module) -> tuple[float, float]:
        """Numerator and denominator; those of slices add up to the whole's."""
        total = count = 0.0
        for z, z0 in zip(self._outputs(model), self.reference, strict=True):
            z0 = z0.to(z.device)
            if self.axis is not None:
                log_p, log_p0 = F.log_softmax(z.double(), self.axis), F.log_softmax(z0.double(), self.axis)
                total += F.kl_div(log_p, log_p0, reduction="sum", log_target=True).item()
                count += z.numel() // z.shape[self.axis]
            else:
                total += (z - z0).double().square().sum().item()
        return total, count if self.axis is not None else self.spread

    def slices(self, shares: Sequence[float]) -> list[Divergence]:
        """The same in consecutive slices, cut at these shares (rising, the last one 1) of the examples.

        Raises TaskError where a slice would hold no example, or outputs do not go by examples.
        """
        sizes = [batch_size(x) for x in self.batches]
        if [len(z) for z in self.reference] != sizes:
            raise TaskError("the objective cannot be sliced: an output's first dimension is not the batch's")
        ends = [round(share * sum(sizes)) for share in shares]
        parts = []
        for start, end in zip([0, *ends], ends, strict=False):
            if end <= start:
                raise TaskError(f"a fidelity of {end / sum(sizes):.2g} holds no example more than the one below it")
            part, at = copy.copy(self), 0
            part.batches, part.reference, part.spread = [], [], self.spread * (end - start) / sum(sizes)
            for x, z, n in zip(self.batches, self.reference, sizes, strict=True):
                cut = slice(max(start - at, 0), max(end - at, 0))
                if cut.start < min(n, cut.stop):
                    part.batches.append(map_tensors(x, lambda t, n=n, c=cut: t[c] if t.ndim and len(t) == n else t))
                    part.reference.append(z[cut])
                at += n
            parts.append(part)
        return parts


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
