"""Checks on decompositions of other packages: a mistake is named where it is made, before it costs a search."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from rankopt.core.errors import RankoptError
from rankopt.core.records import Layer, Rank
from rankopt.decompositions.registry import DECOMPOSITIONS
from rankopt.decompositions.targets import full_target
from rankopt.decompositions.types import Fit, Original

TOLERANCE = 1e-3
"""By how much the error that a fit declares may differ from that of its factors, relative and absolute."""


@contextmanager
def named(family: str, layer: Layer, what: str) -> Iterator[None]:
    """Context: an error that a decomposition raises becomes a RankoptError with its name and the layer's.

    Args:
        family: Name of the decomposition.
        layer: The layer.
        what: What it is asked for, for the message.

    Raises:
        RankoptError: An error was raised.
    """
    try:
        yield
    except RankoptError:
        raise
    except Exception as error:
        raise _fault(family, layer, f"its {what} raised {type(error).__name__}: {error}") from error


def code_of(family: str) -> tuple[str, ...]:
    """What tells the fits of a decomposition's code from those of the code that it had before.

    Args:
        family: Name of the decomposition.

    Returns:
        Nothing for rankopt's own, whose changes `candidates.cache.VERSION` counts.
    """
    if DECOMPOSITIONS.is_own(family):
        return ()
    decomposition = DECOMPOSITIONS[family]
    kind, state = type(decomposition), vars(decomposition)
    try:
        source = inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):  # made in a notebook
        own = [vars(k).values() for k in kind.__mro__ if k.__module__ == kind.__module__]
        source = repr([_bytecode(f.__code__) for values in own for f in values if isinstance(f, FunctionType)])
    return kind.__module__, kind.__qualname__, source, *([repr(sorted(state.items()))] if state else [])


def _bytecode(code: CodeType) -> tuple[Any, ...]:
    """A function without the lines that it is on: what changes when it does something else."""
    constants = [_bytecode(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    return code.co_code, code.co_names, constants


def check_modules(family: str, module: nn.Module, layer: Layer, ranks: Sequence[Rank]) -> None:
    """Check that the modules of a decomposition have the factors and cost that it declares.

    rankopt's own are covered by its tests, and not checked again.

    Args:
        family: Name of the decomposition.
        module: The layer's module; it is not changed.
        layer: The layer.
        ranks: The ranks that will be tried.

    Raises:
        RankoptError: It does not keep what it declares; the message says what to do.
    """
    if DECOMPOSITIONS.is_own(family) or not ranks:
        return
    decomposition, empty = DECOMPOSITIONS[family], copy.deepcopy(module).to("meta").train()
    for rank in ranks:
        with named(family, layer, f"shapes, cost or build at rank {rank}"):
            shapes = [tuple(s) for s in decomposition.shapes(layer, rank)]
            cost = decomposition.cost(layer, rank)
            built = [decomposition.build(empty, layer, rank, form) for form in decomposition.forms]
        for replacement in built:
            factors = [p for name, p in replacement.named_parameters() if not name.endswith("bias")]
            if [p.numel() for p in factors] != [math.prod(s) for s in shapes]:
                raise _fault(
                    family,
                    layer,
                    f"at rank {rank} it declares factors of the shapes {shapes}, its {type(replacement).__name__} has "
                    f"{[tuple(p.shape) for p in factors]}: make `shapes` and `factorised` agree",
                )
            if (counted := sum(p.numel() for p in replacement.parameters())) != cost.params:
                raise _fault(
                    family,
                    layer,
                    f"at rank {rank} it declares {cost.params:,} parameters, its {type(replacement).__name__} has "
                    f"{counted:,}: make `cost` and `factorised` agree",
                )


def checked_fits(family: str, original: Original, ranks: Sequence[Rank], found: Sequence[Any]) -> list[Fit]:
    """The fits of a decomposition, their factors contiguous and without gradients.

    What rankopt's own decompositions declare is not checked again.

    Args:
        family: Name of the decomposition.
        original: What was fitted.
        ranks: The ranks that were asked for.
        found: What `fit` gave.

    Raises:
        RankoptError: Ranks, shapes, types or errors are not those that `fit` has to give.
    """
    if DECOMPOSITIONS.is_own(family):
        return list(found)
    given = [fit.rank if isinstance(fit, Fit) else fit for fit in found]
    if given != list(ranks):
        asked = f"its fit gave {given} for the ranks {list(ranks)}: yield a Fit for each, in order"
        raise _fault(family, original.layer, asked)
    fits = [fit._replace(factors=tuple(f.detach().clone().contiguous() for f in fit.factors)) for fit in found]
    for fit in fits:
        _check_fit(family, original, fit)
    return fits


def _check_fit(family: str, original: Original, fit: Fit) -> None:
    decomposition, layer = DECOMPOSITIONS[family], original.layer
    kind = {"shape": tuple(map(tuple, decomposition.shapes(layer, fit.rank))), "dtype": original.weight.dtype}
    shapes = tuple(tuple(f.shape) for f in fit.factors)
    if shapes != kind["shape"] or any(f.dtype != kind["dtype"] for f in fit.factors):
        types = sorted({str(f.dtype) for f in fit.factors})
        raise _fault(
            family,
            layer,
            f"its fit of rank {fit.rank} gave factors of the shapes {shapes} in {', '.join(types)}, where "
            f"{kind['shape']} in {kind['dtype']} are declared",
        )
    if not all(torch.isfinite(f).all() for f in fit.factors):
        raise _fault(family, layer, f"its fit of rank {fit.rank} gave factors that are NaN or infinite")
    target = full_target(*original)
    with named(family, layer, f"weight at rank {fit.rank}"):
        whole = decomposition.weight(layer, tuple(f.double() for f in fit.factors)).reshape(target.weight.shape)
    error = target.error(whole)
    if not abs(error - fit.error) <= TOLERANCE * (1 + error):
        raise _fault(
            family,
            layer,
            f"its fit of rank {fit.rank} declares an error of {fit.error:.4g}, its factors have {error:.4g}: end `fit` "
            "with targets.stored_fit",
        )


def _fault(family: str, layer: Layer, what: str) -> RankoptError:
    return RankoptError(f"the decomposition {family!r} fails on layer {layer.name!r}: {what}")
