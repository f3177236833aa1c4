"""Applying a plan to a model, saving it, and loading a compressed model from a folder.

A folder holds plan.json (the choice for every layer) and model.safetensors (the weights of the compressed model).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from rankopt.core.errors import PlanError
from rankopt.core.files import write_beside
from rankopt.core.records import BUDGETS, DENSE, METRICS, PRECISIONS, SAME, Candidate, Choice, Cost, Layer, Plan
from rankopt.core.run_folder import LARGEST_JSON, PLAN, WEIGHTS, read_json
from rankopt.decompositions.modules import load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import FactorLookup
from rankopt.model.composites import expand_composites, parts, take_ordinary_path
from rankopt.model.layer_kinds import KINDS, describe
from rankopt.model.quantization import quantize_

FORMAT, VERSION = "rankopt-plan", 3


# --- replacing layers ------------------------------------------------------------------------------


def replace(model: nn.Module, layer: Layer, new: nn.Module) -> nn.Module:
    """Replace a layer's module in place, under each of its names.

    Args:
        model: Model that contains the layer.
        layer: Layer to replace.
        new: Its replacement.

    Returns:
        The model; `new` if the layer is the whole model.
    """
    if layer.name == "":
        return new
    for name in (layer.name, *layer.aliases):
        model.set_submodule(name, new)
    return model


def apply(
    model: nn.Module, layers: Sequence[Layer], candidates: Sequence[Candidate], factors: FactorLookup
) -> nn.Module:
    """Build a compressed copy of a model.

    Composite modules (attention, recurrent layers) of which a part changes are expanded into their parts.

    Args:
        model: The dense model; it is not changed.
        layers: Its layers.
        candidates: One candidate per layer.
        factors: Factors by `Candidate.key`.
    """

    def fill(new: nn.Module, candidate: Candidate) -> None:
        stored = factors[candidate.key] if candidate.key is not None else ()
        if candidate.precision == SAME:
            load_factors(new, stored)
        else:
            quantize_(new, candidate.precision, stored)

    return assemble(model, layers, candidates, fill)


def assemble(
    model: nn.Module,
    layers: Sequence[Layer],
    candidates: Sequence[Candidate],
    fill: Callable[[nn.Module, Candidate], Any],
) -> nn.Module:
    """As `apply`, with the factors written by a callback.

    Args:
        model: The dense model; it is not changed.
        layers: Its layers.
        candidates: One candidate per layer.
        fill: Called with each new module and its candidate; writes the factors.
    """
    pairs = zip(layers, candidates, strict=True)
    model = expand_composites(copy.deepcopy(model), [layer.name for layer, c in pairs if not c.unchanged])
    for layer, candidate in zip(layers, candidates, strict=True):
        if candidate.unchanged:
            continue
        new = model.get_submodule(layer.name)
        if candidate.method != DENSE:
            new = DECOMPOSITIONS[candidate.method].build(new, layer, candidate.rank, candidate.form)
        fill(new, candidate)
        model = replace(model, layer, new)
    return take_ordinary_path(model)


# --- the plan on disk ------------------------------------------------------------------------------


def save(folder: str | Path, model: nn.Module, plan: Plan) -> None:
    """Write model.safetensors and plan.json, which holds the checksum of the weights.

    Args:
        folder: Folder to write to; created if missing.
        model: The compressed model.
        plan: Its plan.

    Raises:
        PlanError: If the folder cannot be created.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"{folder} cannot be made: {error}") from error
    write_beside(folder / WEIGHTS, lambda p: save_model(model, str(p)))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "cost": dataclasses.asdict(plan.cost),
        "dense": dataclasses.asdict(plan.dense),
        "latency_on": plan.latency_on,
        "weights": {"sha256": _sha256(folder / WEIGHTS)},
        "layers": [dataclasses.asdict(c) for c in plan.choices],
    }
    write_beside(folder / PLAN, lambda p: p.write_text(json.dumps(content, indent=1)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_plan(folder: str | Path) -> tuple[Plan, str]:
    """Read plan.json.

    Args:
        folder: A folder that `save` wrote.

    Returns:
        The plan, and the SHA-256 of its weights.

    Raises:
        PlanError: If the plan is missing, damaged or of a newer version.
    """
    path = Path(folder) / PLAN
    content = read_json(path, PlanError, "name the folder that a search wrote")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlanError(f"{path} is not a rankopt plan")
    version = content.get("version")
    if version not in range(1, VERSION + 1):
        raise PlanError(f"{path} has version {version!r}; this rankopt reads version 1 to {VERSION}")
    try:
        choices = tuple(_choice(_with_form(c) if version == 1 else c) for c in content["layers"])
        plan = Plan(choices, _cost(content["cost"]), _cost(content["dense"]), str(content.get("latency_on", "")))
        return plan, str(content["weights"]["sha256"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _with_form(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Add the form to an entry of a version 1 plan, where every family had only its default form."""
    method = entry["method"]
    return {**entry, "form": DECOMPOSITIONS[method].forms[0] if method in DECOMPOSITIONS else DENSE}


def _choice(entry: Mapping[str, Any]) -> Choice:
    """Parse and check an entry; raises TypeError or ValueError if it is malformed."""
    choice = Choice(**entry)
    numbers = (*choice.shape, *choice.rank, choice.params, choice.macs)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError(f"layer {choice.name!r}: shapes, ranks and costs must be whole numbers")
    if choice.precision not in PRECISIONS:
        raise ValueError(f"layer {choice.name!r}: unknown precision {choice.precision!r}")
    if not all(isinstance(s, str) for s in (choice.name, choice.kind, choice.method, choice.reason)):
        raise ValueError(f"layer {choice.name!r}: names, methods and reasons must be text")
    if choice.method != DENSE and choice.method not in DECOMPOSITIONS:
        raise ValueError(f"layer {choice.name!r}: unknown method {choice.method!r}")
    forms = (DENSE,) if choice.method == DENSE else DECOMPOSITIONS[choice.method].forms
    if choice.form not in forms:
        raise ValueError(f"layer {choice.name!r}: {choice.method} has no form {choice.form!r}, it has {forms}")
    return dataclasses.replace(choice, shape=tuple(choice.shape), rank=tuple(choice.rank))


def _cost(entry: Mapping[str, Any]) -> Cost:
    counted = {m: int(entry[m]) for m in METRICS}
    return Cost(**counted, **{m: int(entry.get(m, 0)) for m in BUDGETS if m not in METRICS})


# --- rebuilding ------------------------------------------------------------------------------------


def rebuild(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace a model's layers, in place, as a plan says; the factors are left uninitialised.

    Args:
        model: The dense model.
        plan: A plan for this model.

    Returns:
        The model, or its replacement if the plan replaces the whole model.

    Raises:
        PlanError: If the plan is for another model.
    """
    model = expand_composites(model, [c.name for c in plan.choices if not c.unchanged])
    modules = dict(model.named_modules(remove_duplicate=False))
    unexpanded = {part for name, module in modules.items() for part in parts(module, name)}
    for choice in plan.choices:
        module = modules.get(choice.name)
        if module is None and choice.name in unexpanded and choice.unchanged:
            continue
        if module is None:
            raise PlanError(f"the plan is for another model: this one has no layer {choice.name!r}")
        if choice.unchanged:
            continue
        aliases = tuple(n for n, m in modules.items() if m is module and n != choice.name)
        layer = dataclasses.replace(_checked_layer(module, choice), aliases=aliases)
        if choice.method == DENSE:
            quantize_(module, choice.precision)
        else:
            model = replace(model, layer, quantize_(_replacement(module, layer, choice), choice.precision))
    return take_ordinary_path(model)


def _checked_layer(module: nn.Module, choice: Choice) -> Layer:
    """The description of a module; raises PlanError if the choice was made for another one."""
    kind = type(module).__name__
    layer = describe(module, choice.name) if type(module) in KINDS else Layer(choice.name, kind, ())
    if (kind, layer.own_shape) != (choice.kind, choice.shape):
        raise PlanError(
            f"the plan is for another model: layer {choice.name!r} is {kind} with weight {layer.own_shape}, "
            f"the plan has {choice.kind} {choice.shape}"
        )
    return layer


def _replacement(module: nn.Module, layer: Layer, choice: Choice) -> nn.Module:
    """The uninitialised replacement of a module; raises PlanError if the family cannot have the rank."""
    family = DECOMPOSITIONS[choice.method]
    full = family.full_rank(layer)
    if full is None or len(full) != len(choice.rank) or family.valid(layer, choice.rank) != choice.rank:
        raise PlanError(f"layer {choice.name!r}: {choice.method} cannot have rank {choice.rank} (full rank: {full})")
    return family.build(module, layer, choice.rank, choice.form)


def load(model: nn.Module | Callable[[], nn.Module], folder: str | Path) -> nn.Module:
    """Load a compressed model from plan.json and model.safetensors.

    Nothing is unpickled.

    Args:
        model: The dense model, which is copied, or a function that builds it.
        folder: A folder that a search wrote, or `save`.

    Returns:
        The compressed model.

    Raises:
        PlanError: If a file is missing or damaged, or belongs to another model.
    """
    plan, checksum = read_plan(folder)
    try:
        dense = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    except RuntimeError as error:
        raise PlanError(f"the model cannot be copied ({error}): give a function that builds it") from error
    small = rebuild(dense, plan)
    path = Path(folder) / WEIGHTS
    try:
        expected = sum(t.numel() * t.element_size() for t in (*small.parameters(), *small.buffers()))
        if path.stat().st_size > 2 * expected + LARGEST_JSON:
            raise PlanError(f"{path} is larger than the plan's model: it is from elsewhere")
        if _sha256(path) != checksum:
            raise PlanError(f"{path} is damaged or from another run: its checksum is not the one in {PLAN}")
        load_model(small, str(path))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error}") from error
    except (SafetensorError, RuntimeError) as error:
        raise PlanError(f"{path} does not fit this model: {error}") from error
    return small


@torch.no_grad()
def multiplied_out(dense: nn.Module, small: nn.Module) -> nn.Module:
    """A copy of the dense model with the compressed model's weights, its factors multiplied out.

    Args:
        dense: The dense model; only its architecture matters.
        small: Its compressed version.
    """
    model = copy.deepcopy(dense)
    for name, module in model.named_modules():
        other = small.get_submodule(name)
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            tensor.copy_(getattr(other, key))
    return model
