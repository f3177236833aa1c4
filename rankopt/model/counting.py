"""The cost of a model as it is: parameters, MACs and bytes, counted on the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode, sdpa_flop_count

from rankopt.core.errors import TaskError
from rankopt.core.records import Cost
from rankopt.model.forward import hooked, inference, run, to_device
from rankopt.model.inputs import one_example
from rankopt.model.memory import stored_bytes

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Operations of both products of attention; arguments are shapes."""
    return sdpa_flop_count(query, key, value)


UNCOUNTED = dict.fromkeys(
    (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_fused_attention_overrideable,  # Intel GPUs and other backends
        aten._scaled_dot_product_attention_math_for_mps,
    ),
    _attention,
)
"""Kernels of attention that torch's counter does not know, while it knows those of other devices."""


def count(model: nn.Module, example_input: Any) -> Cost:
    """Count a model's cost.

    Args:
        model: The model.
        example_input: A tensor, or a tuple or dict of the forward's arguments; the first example is run.

    Returns:
        Unique parameters, MACs (half of what torch's FlopCounterMode counts, attention included on every device), and
        bytes of parameters and buffers.

    Raises:
        TaskError: The model does not run on the input, or its operations cannot be counted.
    """
    x = to_device(one_example(model, example_input), model)
    try:
        with inference(model), _visible_recurrence(), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as flops:
            run(model, x)
    except RuntimeError as error:
        raise TaskError(f"the operations cannot be counted, does the forward take gradients? ({error})") from error
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        macs=flops.get_total_flops() // 2,
        bytes=stored_bytes(model),
    )


def inputs_of(model: nn.Module, names: Iterable[str], example_input: Any) -> dict[str, list[tuple[torch.Size, ...]]]:
    """The shapes of what some modules are called with, by name; of two models they differ where data choose the way.

    Args:
        model: The model; modules that it lacks are left out.
        names: Names of modules.
        example_input: As of `count`.
    """
    modules = dict(model.named_modules())
    found: dict[str, list[tuple[torch.Size, ...]]] = {name: [] for name in names if name in modules}
    x = to_device(one_example(model, example_input), model)

    def note(name: str, args: tuple[Any, ...]) -> None:
        found[name].append(tuple(t.shape for t in args))

    with inference(model), hooked(model, found, on_input=note):
        run(model, x)
    return found


def _without_dynamo() -> None:
    """Keep torch's counter from importing torch._dynamo, to tell it that it skips the counter: 2 to 5 seconds.

    Nothing is compiled while it counts.
    """
    function = getattr(_FlopCounterMode.__torch_dispatch__, "__wrapped__", None)
    if function is not None and not hasattr(function, "__dynamo_disable"):
        setattr(function, "__dynamo_disable", function)  # as an attribute it would be mangled in a class


_without_dynamo()


@contextmanager
def _visible_recurrence() -> Iterator[None]:
    """Context: recurrent layers run in torch's own operations, as the counter does not see the backends' kernels."""
    mkldnn = torch.backends.mkldnn
    with torch.backends.cudnn.flags(enabled=False), mkldnn.flags(False, mkldnn.deterministic, mkldnn.allow_tf32):
        yield
