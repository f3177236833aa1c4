"""Budgets as users write them ("params=0.5", "latency=5ms") and the limits that they stand for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankopt.core.errors import BudgetError
from rankopt.core.records import BUDGETS, MEASURED, Cost

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


BYTES = ("bytes", "memory", "disk")
"""The metrics whose unit is the byte."""


SCALES = {"latency": "s", "energy": "J"}
"""The units of what is measured. `Cost` counts billionths of them."""


PREFIXES = {"N": 1, "U": 10**3, "M": 10**6, "": 10**9}
"""Prefixes of these units, in billionths."""


EQUAL = 0.05
"""Times, and energies, that differ by this share at most count as equal: so much their measurements may differ, too."""


HELP = (
    "give a fraction of dense (0.5, 50%) or an absolute number (150000, 2M, 500KB; latency: 5ms, 800us; "
    "energy: 20mJ, 500uJ)"
)


@dataclass(frozen=True)
class Limit:
    """The limit on one metric.

    Attributes:
        metric: One of BUDGETS.
        requested: What the user gave: a fraction of the dense model's cost, or an absolute number.
        target: The limit in absolute numbers, in the unit of `Cost`. For 100 % of a time or an energy, the share EQUAL
            is added.
    """

    metric: str
    requested: float
    target: int


def share(limits: Sequence[Limit], cost: Cost) -> float:
    """A cost in shares of the limits, summed over metrics.

    Args:
        limits: The limits.
        cost: The cost.
    """
    return sum(cost[x.metric] / max(x.target, 1) for x in limits)


def parse_budget(budget: Mapping[str, Any] | Sequence[str], dense: Cost) -> tuple[Limit, ...]:
    """Read a budget.

    Args:
        budget: {"params": 0.5, "bytes": "500KB"} or ["params=0.5", "bytes=500KB"].
        dense: The dense model's cost, to which fractions refer.

    Returns:
        One limit per metric, in the order given.

    Raises:
        BudgetError: The budget cannot be read, names no metric or one twice, is above the dense model's cost, or
            limits a metric that was not measured.
    """
    if isinstance(budget, str) or not isinstance(budget, (Mapping, Sequence)):
        raise BudgetError(f"budget is {budget!r}: give a dictionary such as {{'params': 0.5}}")
    if not isinstance(budget, Mapping):
        pairs = [item.partition("=") for item in budget]
        for metric, equals, _ in pairs:
            if not equals:
                raise BudgetError(f"budget {metric!r} is not METRIC=VALUE: {HELP}")
        names = [metric for metric, _, _ in pairs]
        if len(set(names)) < len(names):
            raise BudgetError(f"a budget metric is given twice: {', '.join(names)}")
        budget = {metric: value for metric, _, value in pairs}
    if not budget:
        raise BudgetError(f"no budget: give at least one of {', '.join(BUDGETS)}, for example params=0.5")
    return tuple(_limit(metric, value, dense) for metric, value in budget.items())


def limited_metrics(budget: Any) -> set[str]:
    """The metrics that a budget limits, before it is checked.

    Args:
        budget: As `parse_budget` takes it; anything else limits nothing.
    """
    if isinstance(budget, str) or not isinstance(budget, (Mapping, Sequence)):
        return set()
    return {str(item).partition("=")[0].strip() for item in budget}


def check_metrics(metrics: Iterable[str]) -> None:
    """Check that a budget may limit these metrics.

    Args:
        metrics: Names of metrics.

    Raises:
        BudgetError: One of them is not in BUDGETS.
    """
    if unknown := set(metrics) - set(BUDGETS):
        raise BudgetError(f"unknown budget metric {min(unknown)!r}: choose from {', '.join(BUDGETS)}")


def _limit(metric: str, value: Any, dense: Cost) -> Limit:
    check_metrics([metric])
    number, is_fraction = _number(metric, value)
    if not dense[metric]:
        raise BudgetError(
            f"budget {metric}={value}: the dense model's {metric} was not measured here; rankopt search, "
            "rankopt.compress and prepare(budget=...) do"
        )
    target = math.floor(number * dense[metric] + 1e-9) if is_fraction else math.floor(number)
    if metric in MEASURED and is_fraction and number == 1:  # not slower
        return Limit(metric, number, math.floor((1 + EQUAL) * dense[metric]))
    if number <= 0:
        raise BudgetError(f"budget {metric}={value} is not above 0: {HELP}")
    if target > dense[metric]:
        whole = amount(metric, dense[metric])
        raise BudgetError(
            f"budget {metric}={value} is {amount(metric, target)}, above the dense model's {whole}: nothing to do"
        )
    return Limit(metric, number, target)


def _number(metric: str, value: Any) -> tuple[float, bool]:
    """The number in the metric's unit, and whether it is a fraction of the dense model's cost."""
    text = str(value).strip()
    wrong = BudgetError(f"budget {metric}={text} is not understood: {HELP}")
    if isinstance(value, bool):
        raise wrong
    match = re.fullmatch(
        r"([+-]?\d+(?:\.\d*)?(?:e[+-]?\d+)?|[+-]?\.\d+(?:e[+-]?\d+)?)\s*(%|[KMG]?B?|[NUM]?[SJ])", text, re.I
    )
    if not match:
        raise wrong
    number, unit = float(match[1]), match[2].upper()
    if not math.isfinite(number):
        raise wrong
    if unit == "%":
        return number / 100, True
    scale = SCALES.get(metric, "").upper()
    if unit.endswith(("S", "J")) or (scale and unit):
        if not scale or not unit.endswith(scale):
            raise wrong
        return number * PREFIXES[unit[:-1]], False
    if unit:
        if unit.endswith("B") and metric not in BYTES:
            raise BudgetError(f"budget {metric}={text}: {unit} counts bytes, {metric} takes K, M or G")
        return number * UNITS[unit.removesuffix("B")], False
    return _without_unit(metric, text, number, is_integer=re.fullmatch(r"[+-]?\d+", match[1]) is not None)


def _without_unit(metric: str, text: str, number: float, is_integer: bool) -> tuple[float, bool]:
    """As `_number`: an integer is absolute, any other number a fraction."""
    if is_integer and metric in MEASURED:
        units = "5ms, 800us" if metric == "latency" else "20mJ, 500uJ"
        raise BudgetError(f"budget {metric}={text}: give a unit ({units}) or a fraction of dense (0.6, 60%)")
    if is_integer and number == 1:
        raise BudgetError(f"budget {metric}=1 is ambiguous: 100% keeps everything, 1.0 likewise; one {metric} is none")
    if not is_integer and number > 1:
        raise BudgetError(f"budget {metric}={text}: a fraction is at most 1, an absolute number is an integer; {HELP}")
    return number, not is_integer


def amount(metric: str, value: float) -> str:
    """An amount of a metric as text: "1,234", "5.67 ms" or "12.3 mJ".

    Args:
        metric: One of BUDGETS.
        value: In the unit of `Cost`.
    """
    return f"{value / 1e6:,.4g} m{SCALES[metric]}" if metric in MEASURED else f"{value:,}"


def at_least(metric: str, value: int) -> str:
    """A budget's value that is no less than an amount, as users write it: "1234" or "5671us".

    Args:
        metric: One of BUDGETS.
        value: In the unit of `Cost`.
    """
    return f"{math.ceil(value / 1000)}u{SCALES[metric]}" if metric in MEASURED else f"{value}"
