"""The default objective, and checked calls of a task's own objective and score."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.core.errors import TaskError
from rankopt.model.forward import batch_size, class_axis, inference, main_output, run, take, to_device


class Divergence:
    """The default objective: mean KL divergence (nats) of a model's predictions from the dense model's.

        D = mean KL(p₀ ‖ p), p₀ = softmax(z₀) of the dense model's logits, p = softmax(z)

    The mean is over examples and positions; `class_axis` says where the classes are. Models with a single output have
    no classes: their objective is ‖z − z₀‖² / ‖z₀ − mean(z₀)‖².

    Args:
        dense: The dense model.
        batches: Calibration inputs.

    Raises:
        TaskError: The dense model's outputs are not finite, or hold no tensor.
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
        """The objective of a model.

        Args:
            model: A compressed model.
        """
        total, weight = self.sums(model)
        return total / weight

    def sums(self, model: nn.Module) -> tuple[float, float]:
        """Numerator and denominator of the objective. Those of `slices` add up to those of the whole.

        Args:
            model: A compressed model.
        """
        total = count = 0.0
        for z, reference in zip(self._outputs(model), self.reference, strict=True):
            z0 = reference.to(z.device)
            if self.axis is not None:
                log_p, log_p0 = F.log_softmax(z.double(), self.axis), F.log_softmax(z0.double(), self.axis)
                total += F.kl_div(log_p, log_p0, reduction="sum", log_target=True).item()
                count += z.numel() // z.shape[self.axis]
            else:
                total += (z - z0).double().square().sum().item()
        return total, count if self.axis is not None else self.spread

    def slices(self, shares: Sequence[float]) -> list[Divergence]:
        """Cut the objective into objectives of consecutive examples.

        Args:
            shares: Where to cut, as shares of all examples: rising, the last one 1.

        Raises:
            TaskError: A slice would hold no example, or an output's first dimension is not the batch.
        """
        sizes = [batch_size(x) for x in self.batches]
        if [len(z) for z in self.reference] != sizes:
            raise TaskError("the objective cannot be sliced: an output's first dimension is not the batch's")
        ends = [round(share * sum(sizes)) for share in shares]
        parts = []
        for start, end in zip([0, *ends], ends, strict=False):
            if end <= start:
                raise TaskError(f"a fidelity of {end / sum(sizes):.2g} holds no example more than the one below it")
            parts.append(self._slice(start, end, sizes))
        return parts

    def _slice(self, start: int, end: int, sizes: Sequence[int]) -> Divergence:
        """The objective of the examples from start to end; sizes: of the batches."""
        part, at = copy.copy(self), 0
        part.batches, part.reference, part.spread = [], [], self.spread * (end - start) / sum(sizes)
        for x, z, n in zip(self.batches, self.reference, sizes, strict=True):
            cut = slice(max(start - at, 0), max(end - at, 0))
            if cut.start < min(n, cut.stop):
                part.batches.append(take(x, cut))
                part.reference.append(z[cut])
            at += n
        return part


def call(what: str, function: Callable[[nn.Module], float] | None, model: nn.Module) -> float | None:
    """Call a task's score or objective on a model, in eval mode without gradients.

    Args:
        what: What is called, for messages: "the score".
        function: The score or objective; None if the task has none.
        model: The model.

    Returns:
        Its value; None without a function.

    Raises:
        TaskError: It raises an error, or does not return a finite number.
    """
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
