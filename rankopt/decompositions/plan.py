"""Applying a plan to a model, saving it, and loading a compressed model from a folder.

A folder holds plan.json (the choice for every layer) and model.safetensors (the weights of the compressed model), which
is called rankopt.safetensors for models with a save_pretrained of their own: both may be used on one folder.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from typing_extensions import TypedDict

from rankopt.core.errors import PlanError
from rankopt.core.files import write_beside
from rankopt.core.records import (
    DENSE,
    FACTORISED,
    PRECISIONS,
    RECONSTRUCTED,
    SAME,
    Candidate,
    Choice,
    Cost,
    Layer,
    Plan,
)
from rankopt.core.run_folder import PLAN, WEIGHTS, WEIGHTS_BESIDE
from rankopt.core.schema import LARGEST, checked, read_json
from rankopt.core.text import few, reason
from rankopt.decompositions.modules import Factorised, Reconstructed, load_factors
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.types import FactorLookup
from rankopt.model.composites import expand_composites, parts, take_ordinary_path
from rankopt.model.forward import device_of
from rankopt.model.layer_kinds import describe, is_kind
from rankopt.model.memory import stored_bytes
from rankopt.model.pretrained import holds_pretrained, mark_replaced
from rankopt.model.quantization import quantize_

log = logging.getLogger(__name__)


FORMAT, VERSION = "rankopt-plan", 4
SHOWN = 5  # names in a message
LONGEST_TEXT = 250  # characters of a layer's name in a file, and numbers of its shape
EARLIER = "replaced in the model that was compressed"


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

    return assemble(model, layers, candidates, lambda new, candidate: _fill(new, candidate, factors))


def replacement(module: nn.Module, layer: Layer, candidate: Candidate, factors: FactorLookup) -> nn.Module:
    """Build the module that a candidate replaces a layer's by.

    Args:
        module: The layer's module; it is not changed.
        layer: The layer.
        candidate: A candidate for it.
        factors: Factors by `Candidate.key`.
    """
    if candidate.method == DENSE:
        new = copy.deepcopy(module)
    else:
        new = DECOMPOSITIONS[candidate.method].build(module, layer, candidate.rank, candidate.form)
    _fill(new, candidate, factors)
    return new


def to_measure(layer: Layer, candidate: Candidate, device: torch.device) -> Candidate:
    """The form of a candidate in which its loss is measured soonest; outputs are the same up to rounding.

    On a GPU, cuDNN takes about 10 ms to plan a convolution of a shape that it has not met, and each rank has shapes of
    its own. Reconstructed convolutions have the dense layer's.

    Args:
        layer: The layer.
        candidate: A candidate for it.
        device: Where the model is.
    """
    if device.type != "cuda" or len(layer.own_shape) == 2 or candidate.method == DENSE or candidate.precision != SAME:
        return candidate
    if RECONSTRUCTED not in DECOMPOSITIONS[candidate.method].forms:
        return candidate
    return dataclasses.replace(candidate, form=RECONSTRUCTED)


def apply_to_measure(
    model: nn.Module, layers: Sequence[Layer], candidates: Sequence[Candidate], factors: FactorLookup
) -> nn.Module:
    """As `apply`, in the form in which the model is measured soonest: see `to_measure`.

    Args:
        model: The dense model; it is not changed.
        layers: Its layers.
        candidates: One candidate per layer.
        factors: Factors by `Candidate.key`.
    """
    device = device_of(model)
    found = [to_measure(layer, candidate, device) for layer, candidate in zip(layers, candidates, strict=True)]
    return apply(model, layers, found, factors)


def _fill(new: nn.Module, candidate: Candidate, factors: FactorLookup) -> None:
    """Write a candidate's factors into its module, in the candidate's precision."""
    stored = factors[candidate.key] if candidate.key is not None else ()
    if candidate.precision == SAME:
        load_factors(new, stored)
    else:
        quantize_(new, candidate.precision, stored)


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
    names, pairs = list(model.state_dict()), zip(layers, candidates, strict=True)
    model = expand_composites(copy.deepcopy(model), [layer.name for layer, c in pairs if not c.unchanged])
    for layer, candidate in zip(layers, candidates, strict=True):
        if candidate.unchanged:
            continue
        new = model.get_submodule(layer.name)
        if candidate.method != DENSE:
            new = DECOMPOSITIONS[candidate.method].build(new, layer, candidate.rank, candidate.form)
        fill(new, candidate)
        model = replace(model, layer, new)
    return mark_replaced(take_ordinary_path(model), names)


# --- the plan on disk ------------------------------------------------------------------------------


def save(folder: str | Path, model: nn.Module, plan: Plan) -> None:
    """Write the compressed model's weights and plan.json, which holds their checksum.

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
    path = folder / _weights_file(model)
    write_beside(path, lambda p: save_model(model, str(p)))
    content = {
        "format": FORMAT,
        "version": VERSION if plan.before else VERSION - 1,  # earlier readers know all but `before`
        "cost": dataclasses.asdict(plan.cost),
        "dense": dataclasses.asdict(plan.dense),
        "latency_on": plan.latency_on,
        "weights": {"sha256": _sha256(path)},
        "layers": [dataclasses.asdict(c) for c in plan.choices],
        **({"before": [dataclasses.asdict(c) for c in plan.before]} if plan.before else {}),
    }
    write_beside(folder / PLAN, lambda p: p.write_text(json.dumps(content, indent=1)))


def _weights_file(model: nn.Module) -> str:
    """The name of a model's file of weights; never one that its own save_pretrained writes."""
    return WEIGHTS_BESIDE if holds_pretrained(model) else WEIGHTS


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
    try:
        found = _parsed(read_json(path, Any))
    except FileNotFoundError:
        raise PlanError(f"there is no {path}: name the folder that a search wrote") from None
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{path} is damaged, or no plan that this rankopt can read ({reason(error)}): get the folder again"
        ) from error
    return Plan(found.layers, found.cost, found.dense, found.latency_on, found.before), found.weights["sha256"]


class _Checksum(TypedDict):
    sha256: str


@dataclass(frozen=True)
class _Content:
    """What plan.json holds beside its format and version."""

    cost: Cost
    dense: Cost
    weights: _Checksum
    layers: tuple[Choice, ...]
    latency_on: str = ""
    before: tuple[Choice, ...] = ()


def _parsed(content: Any) -> _Content:
    """Parse and check the content of plan.json; raises ValueError if it is malformed."""
    version = content.get("version") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if version is None:
        raise ValueError("it is not a rankopt plan")
    if version not in range(1, VERSION + 1):
        raise ValueError(f"it has version {version!r:.40}, this rankopt reads version 1 to {VERSION}")
    found: _Content = checked(content, _Content)
    if version == 1:
        found = dataclasses.replace(found, layers=tuple(map(_with_form, found.layers)))
    if len(found.latency_on) > LONGEST_TEXT:
        raise ValueError(f"its latency_on is longer than {LONGEST_TEXT} characters")
    for choice in (*found.layers, *found.before):
        _check(choice)
    return found


def _with_form(choice: Choice) -> Choice:
    """Add the form to a choice of a version 1 plan, where every family had only its default form."""
    known = choice.method in DECOMPOSITIONS
    return dataclasses.replace(choice, form=DECOMPOSITIONS[choice.method].forms[0] if known else DENSE)


def _check(choice: Choice) -> None:
    """Raise ValueError for a choice that no plan can hold."""
    if max(map(len, (choice.name, choice.kind, choice.shape, choice.rank))) > LONGEST_TEXT:
        raise ValueError(f"a layer has a name, a shape or a rank that is longer than {LONGEST_TEXT}")
    if not choice.kind.isprintable():
        raise ValueError(f"layer {choice.name!r}: no class is called {choice.kind!r}")
    if min(*choice.shape, *choice.rank, choice.params, choice.macs) < 0:
        raise ValueError(f"layer {choice.name!r}: shapes, ranks and costs must be whole numbers from 0 on")
    if choice.precision not in PRECISIONS:
        raise ValueError(f"layer {choice.name!r}: unknown precision {choice.precision!r}")
    if choice.method != DENSE and choice.method not in DECOMPOSITIONS:
        raise ValueError(f"layer {choice.name!r}: unknown method {choice.method!r}")
    forms = (DENSE,) if choice.method == DENSE else DECOMPOSITIONS[choice.method].forms
    if choice.form not in forms:
        raise ValueError(f"layer {choice.name!r}: {choice.method} has no form {choice.form!r}, it has {forms}")


# --- rebuilding ------------------------------------------------------------------------------------


def rebuild(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace a model's layers, in place, as a plan says; the factors are left uninitialised.

    Args:
        model: The dense model; or, of a plan for a compressed model, this compressed model.
        plan: A plan for this model.

    Returns:
        The model, or its replacement if the plan replaces the whole model.

    Raises:
        PlanError: If the plan is for another model.
    """
    names = list(model.state_dict())
    if not set(map(_identity, plan.before)) <= set(map(_identity, replaced_layers(model))):
        for choice in plan.before:  # one by one: some are parts of others
            model = _rebuild(model, [choice])
    return mark_replaced(take_ordinary_path(_rebuild(model, plan.choices)), names)


def _identity(choice: Choice) -> tuple[Any, ...]:
    return choice.name, choice.method, choice.rank, choice.form, choice.precision


def replaced_layers(model: nn.Module) -> tuple[Choice, ...]:
    """The choices that had to be made to get a model's replaced and quantized layers from a dense one.

    Args:
        model: A compressed model, or any other.

    Returns:
        A choice for each, the outer of nested layers first; none for a dense model.
    """
    found: list[Choice] = []
    quantized: list[str] = []  # replacements whose parts are quantized along with them
    for name, module in model.named_modules():
        precision = _precision(module)
        if isinstance(layer := getattr(module, "layer", None), Layer) and hasattr(module, "method"):
            form = RECONSTRUCTED if isinstance(module, Reconstructed) else FACTORISED
            method, rank, kind, shape = module.method, module.rank, layer.kind, layer.own_shape
            quantized += [f"{name}."] if precision != SAME else []
        elif precision != SAME and is_kind(getattr(module, "base", object)) and not name.startswith(tuple(quantized)):
            method, rank, form, kind, shape = DENSE, (), DENSE, module.base.__name__, tuple(module.weight.shape)
        else:
            continue
        params = sum(p.numel() for p in module.parameters())
        found.append(Choice(name, kind, shape, str(method), rank, params, 0, 0.0, EARLIER, form, precision))
    return tuple(found)


def plan_of(model: nn.Module, cost: Cost | None = None) -> Plan:
    """The plan with which `load` rebuilds a model with replaced layers, wherever these come from.

    Args:
        model: A compressed model, or any other.
        cost: What it costs; None counts parameters and bytes, and gives 0 MACs.
    """
    made = replaced_layers(model)
    names = {choice.name for choice in made}
    outer = [c for c in made if not any(c.name.startswith(f"{name}.") for name in names)]
    if cost is None:
        tensors = [*model.parameters(), *model.buffers()]
        stored = sum(t.numel() * t.element_size() for t in tensors)
        cost = Cost(sum(p.numel() for p in model.parameters()), 0, stored)
    saved = sum(_dense_params(model.get_submodule(c.name), c) - c.params for c in outer)
    dense = dataclasses.replace(cost, params=cost.params + saved)
    # Of nested replacements the inner ones can be made only once the outer ones are.
    return Plan(made, cost, dense) if len(outer) == len(made) else Plan((), cost, dense, before=made)


def _dense_params(module: nn.Module, choice: Choice) -> int:
    """Parameters of the dense layer that a replacement stands for."""
    layer = getattr(module, "layer", None)
    bias = layer.shape[0] if isinstance(layer, Layer) and layer.bias else 0
    return math.prod(choice.shape) + bias if choice.method != DENSE else choice.params


def _precision(module: nn.Module) -> str:
    """The precision that all weights of a layer, or of its replacement, are stored in."""
    holders = list(module) if isinstance(module, Factorised) else [getattr(module, "cores", module)]
    found = {str(getattr(part, "precision", SAME)) for part in holders}
    return found.pop() if len(found) == 1 else SAME


def _rebuild(model: nn.Module, choices: Sequence[Choice]) -> nn.Module:
    """Make the choices in a model; raises PlanError if they are for another one."""
    model = expand_composites(model, [c.name for c in choices if not c.unchanged])
    modules = dict(model.named_modules(remove_duplicate=False))
    unexpanded = {part for name, module in modules.items() for part in parts(module, name)}
    _check_names(choices, modules.keys(), unexpanded)
    for choice in choices:
        if choice.unchanged:
            continue
        module = modules[choice.name]
        aliases = tuple(n for n, m in modules.items() if m is module and n != choice.name)
        layer = dataclasses.replace(_checked_layer(module, choice), aliases=aliases)
        if choice.method == DENSE:
            quantize_(module, choice.precision)
        else:
            model = replace(model, layer, quantize_(_replacement(module, layer, choice), choice.precision))
    return model


def _check_names(choices: Sequence[Choice], names: Collection[str], unexpanded: Collection[str]) -> None:
    """Raise PlanError if a model lacks layers of a plan: another model, or a part of the right one."""
    missing = [c.name for c in choices if c.name not in names and not (c.unchanged and c.name in unexpanded)]
    if not missing:
        return
    below: dict[str, list[str]] = defaultdict(list)
    for head, _, rest in (c.name.partition(".") for c in choices):
        below[head] += [rest] if rest else []
    part = next((head for head, inside in below.items() if inside and set(inside) <= set(names)), None)
    advice = "give the model that was compressed"
    if part:
        advice = f"give the whole model that was compressed, and take {part!r} from what load returns"
    raise PlanError(f"the plan is for another model: this one has no layer {_listed(missing)}; {advice}")


def _listed(names: Sequence[str]) -> str:
    return few(list(map(repr, names)), SHOWN)


def _checked_layer(module: nn.Module, choice: Choice) -> Layer:
    """The description of a module; raises PlanError if the choice was made for another one."""
    kind = type(module).__name__
    layer = describe(module, choice.name) if is_kind(type(module)) else Layer(choice.name, kind, ())
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


def load(model: nn.Module | Callable[[], nn.Module], folder: str | Path, strict: bool = True) -> nn.Module:
    """Load a compressed model from plan.json and its weights.

    Nothing is unpickled.

    Args:
        model: The dense model, which is copied, or a function that builds it. It may be on the meta device. For a plan
            of a compressed model, that compressed model does, too.
        folder: A folder that a search wrote, `Result.save` or `rankopt.save`.
        strict: False leaves out what the model does not have, or has in another shape, such as the head of the model
            that a backbone was compressed in; a model's own further layers stay as they are. A warning names both.

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
    plan = plan if strict else _part_for(dense, plan)
    off_device = any(t.is_meta for t in dense.parameters())
    small = _off_meta(rebuild(dense, plan))
    path = Path(folder) / _weights_file(small)
    if not path.exists():
        path = Path(folder) / WEIGHTS  # of earlier versions
    try:
        expected = stored_bytes(small)
        if path.stat().st_size > 2 * expected + LARGEST:
            raise PlanError(f"{path} is larger than the plan's model: it is from elsewhere")
        if not path.is_file():
            raise PlanError(f"{path} is no regular file")
        if _sha256(path) != checksum:
            raise PlanError(f"{path} is damaged or from another run: its checksum is not the one in {PLAN}")
        if not strict:
            return _load_part(small, path, plan, off_device)
        missing, unexpected = load_model(small, str(path), strict=False)
        if missing or unexpected:
            raise PlanError(f"{path} does not fit this model: {_differences(missing, unexpected)}")
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {reason(error)}") from error
    except (SafetensorError, RuntimeError) as error:
        raise PlanError(f"{path} does not fit this model: {error}") from error
    return small


def _part_for(model: nn.Module, plan: Plan) -> Plan:
    """The choices of a plan that can be made in a model which is only part of the one that was compressed."""
    if plan.before:
        raise PlanError("a model that was compressed twice is loaded whole: give strict=True")
    expanded = expand_composites(copy.deepcopy(model), [c.name for c in plan.choices if not c.unchanged])
    modules = dict(expanded.named_modules(remove_duplicate=False))

    def fits(choice: Choice) -> bool:
        module = modules.get(choice.name)
        if module is None or choice.unchanged:
            return module is not None
        kind = type(module).__name__
        return is_kind(type(module)) and (kind, describe(module, choice.name).own_shape) == (choice.kind, choice.shape)

    return dataclasses.replace(plan, choices=tuple(filter(fits, plan.choices)))


def _load_part(model: nn.Module, path: Path, plan: Plan, off_device: bool) -> nn.Module:
    """Load the weights of a file that a model has, in place; `strict=False` of `load`."""
    own, kept = model.state_dict(keep_vars=True), load_file(path)
    fitting = {name: t for name, t in kept.items() if name in own and own[name].shape == t.shape}
    model.load_state_dict(fitting, strict=False)
    loaded = {id(own[name]) for name in fitting}  # a tied weight is in the file once
    missing = sorted(name for name, t in own.items() if id(t) not in loaded)
    made = tuple(f"{c.name}." for c in plan.choices if not c.unchanged)
    if lost := [name for name in missing if off_device or name.startswith(made)]:
        raise PlanError(f"{path} does not fit this model: {_differences(lost, [])}")
    if missing or len(fitting) < len(kept):
        left = f"left as they were: {_listed(missing)}" if missing else "the model is loaded whole"
        over = f"; not in the model: {_listed(sorted(kept.keys() - fitting))}" if len(fitting) < len(kept) else ""
        log.warning("%s: %s%s", path, left, over)
    return model


def _differences(missing: Collection[str], unexpected: Collection[str]) -> str:
    """What a file lacks and has too much, in words."""
    lacks = f"the file lacks {_listed(sorted(missing))}" if missing else ""
    has = f"the model has no {_listed(sorted(unexpected))}" if unexpected else ""
    return ", and ".join(filter(None, (lacks, has)))


def _off_meta(model: nn.Module) -> nn.Module:
    """Give the tensors of a model that are on the meta device memory on the CPU, in place, for the file to fill."""
    saved = model.state_dict().keys()
    lost = [name for name, t in model.named_buffers() if t.is_meta and name not in saved]
    if lost:
        raise PlanError(
            f"the model is on the meta device, and its buffers {_listed(lost)} are not among the saved weights: build "
            "it on the CPU"
        )
    made: dict[int, Tensor] = {}  # a tied tensor stays one
    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for key, t in tensors.items():
                if t is not None and t.is_meta:
                    tensors[key] = made.setdefault(id(t), _empty_on_cpu(t))
    return model


def _empty_on_cpu(t: Tensor) -> Tensor:
    empty = torch.empty_like(t, device="cpu")
    return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty


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
