"""The layers of a model: their dense costs, and which may be factorised or why not."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankopt.core.errors import TaskError
from rankopt.core.records import Call, Cost, Layer
from rankopt.model.checks import check_model, parametrisation
from rankopt.model.composites import COMPOSITES, expand_composites, is_composite, parts, take_ordinary_path
from rankopt.model.forward import hooked, inference, run, to_device
from rankopt.model.inputs import one_example
from rankopt.model.layer_kinds import KINDS, describe, is_kind, pair
from rankopt.model.quantization import QuantizedMixin
from rankopt.model.stand_in import Trial, faulty, light_copy

UNKNOWN = Call(0, (0, 0), (0, 0))
"""A call with more than one argument, or of a module that cannot be factorised: its sizes are not recorded."""


SEVERAL = "{} holds several maps: unfold it first, if the model's output stays the same (does it ask isinstance?)"


NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def unfolded(model: nn.Module, example_input: Any, split_qkv: bool = True) -> nn.Module:
    """A copy of a model in which recurrent and attention modules and fused Linears are made of ordinary Linears.

    Modules that must stay as they are (shared, parametrised, hooked, not called, ...) do; the inventory says why.

    Args:
        model: The model, which is not changed.
        example_input: A tensor, or a tuple or dict of the forward's arguments.
        split_qkv: Also split Linears that compute queries, keys and values at once.

    Returns:
        The copy; the model itself if it has no such modules.

    Raises:
        TaskError: The model does not run on the example.
    """
    found = {m: names for m, names in names_of(model).items() if is_composite(m, names[0], split_qkv)}
    if not found:
        return model
    calls, owners = _record_calls(model, example_input), weight_owners(model)
    free = {names[0]: m for m, names in found.items() if obstacle(m, calls[m], owners) is None}

    def expanded(names: Sequence[str], copied: nn.Module) -> nn.Module:
        return take_ordinary_path(expand_composites(copied, [p for name in names for p in parts(free[name], name)]))

    trial = Trial(model, one_example(model, example_input))
    at_fault = faulty(list(free), lambda names: trial.works(expanded(names, light_copy(model))))
    return expanded([name for name in free if name not in at_fault], copy.deepcopy(model))


def inventory(model: nn.Module, example_input: Any) -> tuple[Layer, ...]:
    """List the layers of a model: all modules but norms that own a weight of two or more dimensions.

    Args:
        model: The model.
        example_input: A tensor, or a tuple or dict of the forward's arguments; the first example is run.

    Returns:
        The layers in the model's order.

    Raises:
        TaskError: `check_model` refuses the model, it does not run on the example, or has a NaN or infinite weight.
    """
    check_model(model)
    names = names_of(model)
    calls = _record_calls(model, example_input)
    owners = weight_owners(model)
    layers = []
    for module, aliases in names.items():
        weight = _main_weight(module)
        if weight is None or isinstance(module, (*NORMS, parametrize.ParametrizationList)):
            continue  # of a parametrised weight, the layer is listed that has it
        if not torch.isfinite(weight).all():
            raise TaskError(f"layer {aliases[0]!r} has NaN or infinite weights: load a sound checkpoint")
        layers.append(_layer(module, weight, aliases, calls[module], owners))
    return tuple(layers)


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The names of every module; a shared module has several.

    Args:
        model: The model.

    Returns:
        Module -> its names, in the model's order.
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    return names


def _main_weight(module: nn.Module) -> Tensor | None:
    """The module's own largest parameter of two or more dimensions (parametrised ones included)."""
    own = [*module.parameters(recurse=False)]
    if parametrize.is_parametrized(module):
        own += [getattr(module, name) for name in module.parametrizations]  # type: ignore[union-attr]
    own = [p for p in own if p.ndim >= 2]
    return max(own, key=lambda p: p.numel(), default=None)


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """Which modules own each parameter.

    Args:
        model: The model.

    Returns:
        id of the parameter -> its names in different modules; more than one if it is tied.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append(f"{name}.{key}" if name else key)
    return owners


def _record_calls(model: nn.Module, example_input: Any) -> dict[nn.Module, list[Call]]:
    """Run one example and record every call of a module with a weight."""
    calls: dict[nn.Module, list[Call]] = defaultdict(list)

    def note(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], out: Any) -> None:
        calls[module].append(_call(module, args[0], out) if len(args) == 1 and not options else UNKNOWN)

    x = to_device(one_example(model, example_input), model)
    program = torch.jit.ScriptModule  # takes no hooks
    weighted = [m for m in model.modules() if _main_weight(m) is not None and not isinstance(m, program)]
    try:
        with inference(model), hooked(model, weighted, on_output=note):
            run(model, x)
    except Exception as error:
        raise TaskError(f"the model does not run on example_input: {type(error).__name__}: {error}") from error
    return calls


def _call(module: nn.Module, x: Any, out: Any) -> Call:
    """The sizes of a call."""
    if not is_kind(type(module)):
        return UNKNOWN
    if isinstance(module, nn.modules.conv._ConvNd):
        axes = len(module.kernel_size)
        return Call(len(x) if x.ndim > axes + 1 else 1, pair(x.shape[-axes:]), pair(out.shape[-axes:]))
    if isinstance(module, nn.Embedding):
        return Call(x.numel(), (0, 0), (1, 1))
    return Call(x.numel() // max(x.shape[-1], 1), (1, 1), (1, 1))


def _layer(
    module: nn.Module,
    weight: Tensor,
    aliases: list[str],
    calls: list[Call],
    owners: dict[int, list[str]],
) -> Layer:
    if is_kind(type(module)):
        layer = describe(module, aliases[0])
    else:
        kind = type(module).__mro__[parametrize.is_parametrized(module)]  # torch derives a class for each such module
        layer = Layer(aliases[0], kind.__name__, tuple(weight.shape))
    layer = dataclasses.replace(
        layer,
        calls=tuple(calls),
        element_size=weight.element_size(),
        reason=_reason(module, calls, owners),
        aliases=tuple(aliases[1:]),
    )
    own = list(module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        own += module.parametrizations.parameters()  # type: ignore[union-attr]
    params, stored = sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)
    return dataclasses.replace(layer, cost=Cost(params, layer.macs, stored))


def _reason(module: nn.Module, calls: list[Call], owners: dict[int, list[str]]) -> str | None:
    """Why a layer must stay dense; None if it may be factorised."""
    if computed := parametrisation(module):
        return computed
    if type(module) in COMPOSITES:
        return obstacle(module, calls, owners) or SEVERAL.format(type(module).__name__)
    if not is_kind(type(module)):
        return _kind_reason(module)
    if any(c.maps == 0 for c in calls):
        return "called with more than its input, or with keywords, which the replacement does not take"
    table = _table_reason(module) if isinstance(module, nn.Embedding) else None
    return table or obstacle(module, calls, owners)


def _kind_reason(module: nn.Module) -> str:
    """Why a module of another kind must stay dense."""
    if isinstance(module, QuantizedMixin):
        return f"its weight is stored in {module.precision} already"
    base = next((c.__name__ for c in (*KINDS, *COMPOSITES) if isinstance(module, c)), None)
    if base:
        return f"a subclass of {base} may do something else with its weight"
    return f"{type(module).__name__} cannot be factorised yet"


def obstacle(module: nn.Module, calls: list[Call], owners: dict[int, list[str]]) -> str | None:
    """Why a module of any kind cannot be replaced by another one.

    Args:
        module: The module.
        calls: Its calls by the example input.
        owners: As `weight_owners` gives them.

    Returns:
        The reason, in words; None if it can be replaced.
    """
    inside, weights = list(module.modules()), list(module.parameters())
    shared = next((owners[id(p)] for p in weights if len(owners[id(p)]) > 1), [])
    other_types = [p.dtype for p in weights if not p.is_floating_point()]
    computed = next(filter(None, map(parametrisation, inside)), None)
    reasons = {
        str(computed): computed is not None,
        f"its weight or bias is shared: {', '.join(shared)}; untie them to factorise each": bool(shared),
        "its forward was replaced on the instance, which the replacement would lose": any(
            "forward" in vars(m) for m in inside
        ),
        "not called as a module by the first example (unused, for other data, or its weight read directly)": not calls,
        f"its weight is {other_types[0] if other_types else ''}": bool(other_types),
        "it carries hooks, which the replacement would lose": any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in inside
        ),
        "its weight is empty": any(p.numel() == 0 for p in weights),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _table_reason(module: nn.Embedding) -> str | None:
    """Why an Embedding must stay dense; None if it may be factorised."""
    if module.max_norm is not None:
        return "max_norm rescales the rows that are read, and the replacement has no such rows"
    if module.scale_grad_by_freq or module.sparse:
        return "scale_grad_by_freq or sparse says how its rows are trained, and the replacement has no such rows"
    return None
