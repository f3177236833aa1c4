"""Plan <-> module: applying a plan, saving it, and rebuilding from a folder."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from rankopt.candidates import FactorStore, write_beside
from rankopt.core import (
    BUDGETS,
    DENSE,
    METRICS,
    PRECISIONS,
    SAME,
    Candidate,
    Choice,
    Cost,
    Layer,
    Plan,
    PlanError,
    RankoptError,
    StudyError,
)
from rankopt.decompositions import DECOMPOSITIONS
from rankopt.decompositions.base import load_factors
from rankopt.kinds import KINDS, describe
from rankopt.precision import store
from rankopt.unfold import parts, take_ordinary_path, unfold

FORMAT, VERSION = "rankopt-plan", 3
READ = {"task", "strategy", "seed", "seconds", "trials", "budget", "cost", "score", "milliseconds", "layers"}
LARGEST = 2**24  # bytes of a JSON file that is read: 10,000 layers take 5 MB
PLAN, WEIGHTS, RESULT = "plan.json", "model.safetensors", "result.json"


# --- replacing layers ------------------------------------------------------------------------------


def replace(model: nn.Module, layer: Layer, new: nn.Module) -> nn.Module:
    """Put a module in a layer's place, under each of its names; returns the model (the new one, if it is the root)."""
    if layer.name == "":
        return new
    for name in (layer.name, *layer.aliases):
        model.set_submodule(name, new)
    return model


def apply(
    model: nn.Module, layers: Sequence[Layer], candidates: Sequence[Candidate], factors: FactorStore
) -> nn.Module:
    """A copy of the model with each layer in its candidate's form. The input model is unchanged.

    Of modules that hold several maps, those with a map that changes are unfolded.
    """

    def fill(new: nn.Module, candidate: Candidate) -> None:
        stored = factors[candidate.key] if candidate.key is not None else ()
        if candidate.precision == SAME:
            load_factors(new, stored)
        else:
            store(new, candidate.precision, stored)

    return assemble(model, layers, candidates, fill)


def assemble(
    model: nn.Module,
    layers: Sequence[Layer],
    candidates: Sequence[Candidate],
    fill: Callable[[nn.Module, Candidate], Any],
) -> nn.Module:
    """As apply; fill(replacement, candidate) writes the factors."""
    pairs = zip(layers, candidates, strict=True)
    model = unfold(copy.deepcopy(model), [layer.name for layer, c in pairs if not c.unchanged])
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
    """Write model.safetensors and plan.json (which holds the weights' checksum) into a folder."""
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


def _read_json(path: Path, failure: type[RankoptError], if_missing: str) -> Any:
    try:
        size = path.stat().st_size
        content = json.loads(path.read_text()) if size <= LARGEST else None
    except FileNotFoundError:
        raise failure(f"there is no {path}: {if_missing}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise failure(f"{path} is damaged ({error}): run the search again with --resume") from error
    if size > LARGEST:
        raise failure(f"{path} is larger than {LARGEST:,} bytes: it is not one of rankopt's")
    return content


def read_result(folder: str | Path) -> dict[str, Any]:
    """A run's result.json. Raises StudyError if it is missing or damaged."""
    path = Path(folder) / RESULT
    info = _read_json(path, StudyError, "name a finished run's folder, or finish it with --resume")
    if not isinstance(info, dict) or not info.keys() >= READ:
        raise StudyError(f"{path} is damaged: it is not a rankopt result")
    return info


DAMAGE = ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError


@contextmanager
def sound(folder: str | Path) -> Iterator[None]:
    """Around what reads a result's entries: where one is not what it should be, a StudyError."""
    try:
        yield
    except RankoptError:
        raise
    except DAMAGE as error:
        path = Path(folder) / RESULT
        raise StudyError(f"{path} is damaged ({type(error).__name__}: {error}): make it anew with --resume") from error


def read_plan(folder: str | Path) -> tuple[Plan, str]:
    """The plan in a folder and its weights' checksum. Raises PlanError if it is missing, damaged or too new."""
    path = Path(folder) / PLAN
    content = _read_json(path, PlanError, "name the folder that a search wrote")
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
    """An entry of a plan of version 1, where every family had but its usual form."""
    method = entry["method"]
    return {**entry, "form": DECOMPOSITIONS[method].forms[0] if method in DECOMPOSITIONS else DENSE}


def _choice(entry: Mapping[str, Any]) -> Choice:
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
    """The model, in place, in the plan's form, its factors still empty. Raises PlanError for another model's plan."""
    model = unfold(model, [c.name for c in plan.choices if not c.unchanged])
    modules = dict(model.named_modules(remove_duplicate=False))
    folded = {part for name, module in modules.items() for part in parts(module, name)}
    for choice in plan.choices:
        module = modules.get(choice.name)
        if module is None and choice.name in folded and choice.unchanged:
            continue
        if module is None:
            raise PlanError(f"the plan is for another model: this one has no layer {choice.name!r}")
        if choice.unchanged:
            continue
        kind = type(module).__name__
        layer = describe(module, choice.name) if type(module) in KINDS else Layer(choice.name, kind, ())
        if (kind, layer.own_shape) != (choice.kind, choice.shape):
            raise PlanError(
                f"the plan is for another model: layer {choice.name!r} is {kind} with weight {layer.own_shape}, "
                f"the plan has {choice.kind} {choice.shape}"
            )
        if choice.method == DENSE:
            store(module, choice.precision)
            continue
        aliases = tuple(n for n, m in modules.items() if m is module and n != choice.name)
        layer = dataclasses.replace(layer, aliases=aliases)
        family = DECOMPOSITIONS[choice.method]
        full = family.full_rank(layer)
        if full is None or len(full) != len(choice.rank) or family.valid(layer, choice.rank) != choice.rank:
            raise PlanError(
                f"layer {choice.name!r}: {choice.method} cannot have rank {choice.rank} (full rank: {full})"
            )
        new = family.build(module, layer, choice.rank, choice.form)
        model = replace(model, layer, store(new, choice.precision))
    return take_ordinary_path(model)


def load(model: nn.Module | Callable[[], nn.Module], folder: str | Path) -> nn.Module:
    """The compressed model of a folder: plan.json + model.safetensors on a dense model or its builder.

    Nothing is unpickled. Raises PlanError if a file is missing or damaged, or belongs to another model.
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
        if path.stat().st_size > 2 * expected + LARGEST:
            raise PlanError(f"{path} is larger than the plan's model: it is from elsewhere")
        if _sha256(path) != checksum:
            raise PlanError(f"{path} is damaged or from another run: its checksum is not the one in {PLAN}")
        load_model(small, str(path))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error}") from error
    except (SafetensorError, RuntimeError) as error:
        raise PlanError(f"{path} does not fit this model: {error}") from error
    return small
