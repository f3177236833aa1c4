"""One stage of a replacement as a convolution that takes over what it must of the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rankopt.kinds import CONVOLUTIONS, TRANSPOSED, convolve, extended

if TYPE_CHECKING:
    from rankopt.decompositions.base import Stage


def stage_convolution(conv: _ConvNd, s: Stage, bias: bool, like: dict[str, Any]) -> nn.Module:
    """The stage as a module: along its axes with the original's geometry, 1 x 1 along the others."""
    along = extended(conv, s.axes)
    apart = s.blocks if s.shared else 1  # blocks that the module folds into the batch

    def pick(values: Any, other: int) -> tuple[int, ...]:
        return tuple(v if on else other for v, on in zip(values, along, strict=True))

    # "same" and "valid" pad a 1 x 1 stage by nothing, too.
    padding = conv.padding if isinstance(conv.padding, str) else pick(conv.padding, 0)
    options: dict[str, Any] = {
        "in_channels": conv.groups * s.in_channels // apart,
        "out_channels": conv.groups * s.out_channels // apart,
        "kernel_size": pick(conv.kernel_size, 1),
        "stride": pick(conv.stride, 1),
        "padding": padding,
        "dilation": pick(conv.dilation, 1),
        "groups": conv.groups * (s.blocks // apart),
        "bias": bias,
        "padding_mode": conv.padding_mode if s.axes else "zeros",
        **like,
    }
    transposed = conv.transposed and bool(s.axes)
    if transposed or apart > 1:
        options["output_padding"] = pick(conv.output_padding, 0)
    if apart > 1:
        return SharedConv(transposed=transposed, **options)
    return (TRANSPOSED if transposed else CONVOLUTIONS)[len(along)](**options)


class SharedConv(_ConvNd):
    """One convolution for every block of the channels: (b, groups * blocks * in, *size), any number of blocks."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        n, groups, inside = len(self.kernel_size), self.groups, self.in_channels // self.groups
        parts = input.unflatten(-n - 1, (groups, -1, inside))
        parts = parts.transpose(-n - 2, -n - 3)  # (b, blocks, groups, in, *size)
        y = convolve(self, parts.reshape(-1, self.in_channels, *input.shape[-n:]), self.weight)
        y = y.reshape(*parts.shape[: -n - 2], groups, -1, *y.shape[-n:]).transpose(-n - 2, -n - 3)
        return y.flatten(-n - 3, -n - 1)
