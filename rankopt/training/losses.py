"""Losses of fine-tuning: from labels, a teacher's predictions, and the dense model's feature maps."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.core.errors import TaskError
from rankopt.core.records import Task
from rankopt.model.composites import expand_composites
from rankopt.model.forward import (
    class_axis,
    find_output,
    hooked,
    inference,
    main_output,
    map_tensors,
    model_input,
    run,
    to_device,
)
from rankopt.model.inputs import keywords
from rankopt.training.loop import divergence, labelled
from rankopt.training.recipe import Recipe
from rankopt.training.step import Loss

Maps = Mapping[str, Sequence[Tensor]]
"""Outputs by module name, one for each call of the module."""


def factorised(model: nn.Module) -> list[str]:
    """List the names of a model's factorised layers, in the model's order.

    Args:
        model: A compressed model.
    """
    return [name for name, module in model.named_modules() if hasattr(module, "method") and hasattr(module, "rank")]


def blocks(model: nn.Module) -> list[str]:
    """List the names of the modules that hold a model's factorised layers.

    Args:
        model: A compressed model.

    Returns:
        Names in the model's order; a layer that the model itself holds is its own block.
    """
    return [*dict.fromkeys(name.rpartition(".")[0] or name for name in factorised(model))]


def with_same_names(dense: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return the dense model with a module under each name.

    Args:
        dense: The dense model.
        names: Names of modules of the compressed model.

    Returns:
        The dense model itself, or a copy with composite modules expanded if it lacks a name.

    Raises:
        TaskError: A name is missing even then.
    """
    known = dict(dense.named_modules())
    if not known.keys() >= set(names):
        dense = expand_composites(copy.deepcopy(dense), names)
        known = dict(dense.named_modules())
    missing = sorted(set(names) - known.keys())
    if missing:
        raise TaskError(f"the dense model has no module {missing[0]!r}: give the task that the model was made from")
    return dense


@contextmanager
def recorded(model: nn.Module, names: Sequence[str], apart: bool = False) -> Iterator[dict[str, list[Tensor]]]:
    """Record the outputs of modules while a model runs in this context.

    The model itself continues with copies of the outputs, which it may change in place.

    Args:
        model: The model.
        names: Names of its modules to record.
        apart: Whether to detach the inputs of these modules, so that no gradient passes from one to another.

    Yields:
        Outputs by module name, filled as the model runs.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)

    def detached(_: str, args: Any) -> Any:
        return map_tensors(args, lambda t: t.detach())

    def note(name: str, _args: Any, _kwargs: Any, out: Any) -> Any:
        z = find_output(out)
        if z is not None:
            found[name].append(z)
        return out.clone() if isinstance(out, Tensor) else out

    with hooked(model, names, on_input=detached if apart else None, on_output=note):
        yield found


def distance(maps: Maps, wanted: Maps) -> Tensor:
    """Compute the mean over modules of ‖y − ŷ‖² / ‖y − mean(y)‖².

    Args:
        maps: Outputs ŷ of the compressed model, by module name.
        wanted: Outputs y of the dense model.

    Returns:
        A scalar.

    Raises:
        TaskError: No module was reached.
    """
    parts = []
    for name, outputs in maps.items():
        pairs = [(_full(a), _full(b)) for a, b in zip(outputs, wanted[name], strict=True)]
        error = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
        spread = torch.stack([(b - b.mean()).square().sum() for _, b in pairs]).sum()
        parts.append(error / spread.clamp_min(1e-12))
    if not parts:
        raise TaskError("no factorised layer was reached by a batch, so no feature maps can be compared")
    return torch.stack(parts).mean()


def _wide(out: Any) -> Any:
    """An output in full precision for a task's own loss; a dict subclass, such as a ModelOutput, stays as it is."""
    return out if isinstance(out, dict) and type(out) is not dict else map_tensors(out, _full)


def _full(z: Tensor) -> Tensor:
    """A tensor in float32 if it is in half precision, in which losses are too inexact."""
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


def has_labels(task: Task) -> bool:
    """Return whether a task has labels and a loss to learn from.

    Args:
        task: The task.
    """
    return task.train is not None and task.loss is not None


class TrainingLoss:
    """The loss of a training step, from labels, a teacher's predictions and the dense model's feature maps.

        (1 − w) L(ŷ, labels) + w T² KL(teacher ‖ model) + f Σ_l ‖y_l − ŷ_l‖² / ‖y_l − mean(y_l)‖² / layers

    (Hinton 2015; Romero 2015). With label smoothing s (Szegedy 2016), L is (1 − s) times the task's loss plus s times
    the mean over classes of −log p. Without labels w is 1.

    Args:
        recipe: The weights w (`distill`), f (`features`) and s (`smoothing`), and the temperature T.
        task: The task, with the dense model.
        teacher: The model to distil from; may be the dense one.
        model: The model to train.

    Raises:
        TaskError: The recipe needs labels that the task does not have, or factorised layers that the model does not
            have.
    """

    def __init__(self, recipe: Recipe, task: Task, teacher: nn.Module, model: nn.Module) -> None:
        self.recipe = recipe
        self.criterion = task.loss if has_labels(task) else None
        if self.criterion is None and (recipe.smoothing or not recipe.distill):
            raise TaskError("smoothing, or distill=0, is for labels: give the task train and loss, or leave these out")
        self.weight = recipe.distill if self.criterion is not None else 1.0
        self.names = factorised(model) if recipe.features else []
        if recipe.features and not self.names:
            raise TaskError("the model has no factorised layer whose feature maps could be compared: give features=0")
        self.dense = with_same_names(task.model, self.names)
        self.teacher = self.dense if teacher is task.model else teacher

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        x = as_input(batch, model, self.recipe)
        with recorded(model, self.names) as maps, autocast(self.recipe, x):
            out = run(model, x)
        z = _full(main_output(out))
        loss: Any = 0.0
        with recorded(self.dense, self.names) as wanted, inference(self.dense, reseed=False), autocast(self.recipe, x):
            predicted = run(self.dense, x) if self.names or (self.weight and self.teacher is self.dense) else None
        if self.weight:
            if self.teacher is not self.dense:
                predicted = self._run_teacher(x)
            loss += self.weight * divergence(z, _full(main_output(predicted)).to(z.device), self.recipe.temperature)
        if self.names:
            loss += self.recipe.features * distance(maps, wanted)
        if self.weight < 1:
            loss += (1 - self.weight) * self._labels(_wide(out), to_device(_target(batch), model))
        return loss

    def _run_teacher(self, x: Any) -> Any:
        try:
            with inference(self.teacher, reseed=False), autocast(self.recipe, x):
                return run(self.teacher, to_device(x, self.teacher))
        except Exception as error:
            raise TaskError(f"the teacher cannot take the task's inputs: {type(error).__name__}: {error}") from error

    def _labels(self, out: Any, target: Any) -> Tensor:
        assert self.criterion is not None
        loss, smoothing = labelled(self.criterion, out, target), self.recipe.smoothing
        if smoothing:
            z = main_output(out)
            axis = class_axis(z)
            if axis is None:
                raise TaskError("the model has one output, where there are no labels to smooth: give smoothing=0")
            loss = (1 - smoothing) * loss - smoothing * F.log_softmax(z, axis).mean()
        return loss


def as_input(batch: Any, model: nn.Module, recipe: Recipe) -> Any:
    """Return the input in a batch, on the model's device and in the recipe's memory format.

    Args:
        batch: An input, or (input, target).
        model: The model.
        recipe: The recipe.
    """
    x = to_device(keywords(model, model_input(batch)), model)
    return map_tensors(x, in_channels_last) if recipe.channels_last else x


def in_channels_last(x: Tensor) -> Tensor:
    """Convert a 4-dimensional tensor to the channels-last memory format; others are returned as they are.

    Args:
        x: The tensor.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def autocast(recipe: Recipe, x: Any) -> Any:
    """Return torch.autocast for the device of an input, enabled if the recipe's precision is bfloat16.

    Args:
        recipe: The recipe.
        x: A nested input.
    """
    kinds: list[str] = []
    map_tensors(x, lambda t: kinds.append(t.device.type))
    return torch.autocast(kinds[0], torch.bfloat16, enabled=recipe.precision == "bfloat16")


def _target(batch: Any) -> Any:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TaskError("train must give (input, target) for the task's loss: give these, or distill=1")
    return batch[1]


def layer_by_layer(dense: nn.Module, names: Sequence[str], recipe: Recipe) -> Loss:
    """Make a loss that trains each named module towards the output of its counterpart in the dense model.

    A module gets its input in the compressed model, and should reproduce the dense model's output (He et al. 2017,
    asymmetric reconstruction). No gradient passes from one module to another, so all are trained at once.

    Args:
        dense: The dense model.
        names: Names of the modules to train.
        recipe: Memory format and precision.

    Returns:
        A loss on (model, inputs).
    """
    teacher = with_same_names(dense, names)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = as_input(batch, model, recipe)
        with recorded(teacher, names) as wanted, inference(teacher, reseed=False), autocast(recipe, x):
            run(teacher, x)
        with recorded(model, names, apart=True) as maps, autocast(recipe, x):
            run(model, x)
        return distance(maps, wanted)

    return loss


UNITS: dict[str, Callable[[nn.Module], list[str]]] = {"layers": factorised, "blocks": blocks}
"""How `Recipe.units` selects the modules that are trained layer by layer."""
