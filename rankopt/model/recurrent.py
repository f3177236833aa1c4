"""nn.LSTM, nn.GRU and nn.RNN, rebuilt from ordinary Linears and a loop over time: the same function."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rankopt.core.errors import not_scriptable
from rankopt.model.attention import linear


class Recurrent(nn.Module):
    """A recurrent network with the same arguments and outputs as the torch module, in which each weight is a Linear.

    `ih_l0` maps the inputs of layer 0, for all time steps at once; `hh_l0` maps its state, one step at a time; `hr_l0`
    projects its output (proj_size). The other direction's names end in `_reverse`. The attributes weight_ih_l0,
    bias_hh_l0, ... are the dense tensors, rebuilt if a map is factorised.

    Args:
        module: The nn.LSTM, nn.GRU or nn.RNN that it replaces.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.input_size, self.hidden_size = module.mode, module.input_size, module.hidden_size
        self.num_layers, self.bidirectional, self.proj_size = module.num_layers, module.bidirectional, module.proj_size
        self.bias, self.batch_first, self.dropout = module.bias, module.batch_first, module.dropout
        for name in part_names(module):
            self.add_module(name, linear(getattr(module, f"weight_{name}"), getattr(module, f"bias_{name}", None)))
        self.train(module.training)

    def __getattr__(self, name: str) -> Any:
        if found := re.fullmatch(r"(weight|bias)_([ih][hr]_l\d+(?:_reverse)?)", name):
            return getattr(super().__getattr__(found[2]), found[1])
        return super().__getattr__(name)

    def flatten_parameters(self) -> None:
        """Does nothing: models call it for torch's modules."""

    def extra_repr(self) -> str:
        return f"{self.mode}, {self.input_size}, {self.hidden_size}"

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse torch.jit.script."""
        raise not_scriptable("a recurrent network with factorised or quantized parts")

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:  # noqa: A002
        """As nn.LSTM, nn.GRU or nn.RNN.

        Args:
            input: (time, batch, features), (batch, time, features), (time, features) or a PackedSequence.
            hx: The states at the start; None for zeros.
        """
        if isinstance(input, PackedSequence):
            x, sizes = input.data, input.batch_sizes.tolist()
            h, c = self._initial(hx, sizes[0], x)
            if hx is not None and input.sorted_indices is not None:
                h, c = (s.index_select(1, input.sorted_indices) for s in (h, c))
            y, h, c = self._layers(x, sizes, h, c)
            if input.unsorted_indices is not None:
                h, c = (s.index_select(1, input.unsorted_indices) for s in (h, c))
            return PackedSequence(y, *input[1:]), self._state(h, c)
        if input.ndim not in (2, 3):
            raise ValueError(f"{self.mode} takes 2 or 3 dimensions (without or with a batch), not {input.ndim}")
        if input.ndim == 2:
            hx = tuple(s.unsqueeze(1) for s in hx) if isinstance(hx, tuple) else hx if hx is None else hx.unsqueeze(1)
        swapped = input.ndim == 3 and self.batch_first
        x = input.unsqueeze(1) if input.ndim == 2 else input.transpose(0, 1) if swapped else input
        steps, n = x.shape[:2]
        y, h, c = self._layers(x.flatten(0, 1), [n] * steps, *self._initial(hx, n, x))
        y = y.unflatten(0, (steps, n))
        if input.ndim == 2:
            return y.squeeze(1), self._state(h.squeeze(1), c.squeeze(1))
        return y.transpose(0, 1) if swapped else y, self._state(h, c)

    def _initial(self, hx: Any, batch: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The states h and c at the start, (layers * directions, batch, size) each; zeros if none are given."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        zeros = tuple(x.new_zeros(rows, batch, n) for n in (self.proj_size or self.hidden_size, self.hidden_size))
        h, c = zeros if hx is None else hx if self.mode == "LSTM" else (hx, zeros[1])
        for state, expected in ((h, zeros[0]), (c, zeros[1])):
            if state.shape != expected.shape:
                raise ValueError(f"{self.mode}: a state is {tuple(state.shape)}, expected {tuple(expected.shape)}")
        return h, c

    def _state(self, h: Tensor, c: Tensor) -> Any:
        return (h, c) if self.mode == "LSTM" else h

    def _layers(self, x: Tensor, sizes: list[int], h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All layers on x: (rows, features), of which sizes[t] rows, never more than before, belong to step t."""
        states: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in directions(self, layer):
                at = len(states)
                y, last = self._direction(suffix, x, sizes, h[at], c[at])
                outputs.append(y)
                states.append(last)
            x = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, torch.stack([h for h, _ in states]), torch.stack([c for _, c in states])

    def _direction(
        self, suffix: str, x: Tensor, sizes: list[int], h: Tensor, c: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One layer in one direction. Rows beyond sizes[t] have ended (in reverse: not begun) and keep their state."""
        step = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _rnn_tanh, "RNN_RELU": _rnn_relu}[self.mode]
        hidden, project = getattr(self, f"hh_{suffix}"), getattr(self, f"hr_{suffix}", None)
        inputs = getattr(self, f"ih_{suffix}")(x).split(sizes)
        outputs: list[Tensor] = [x] * len(sizes)
        order = range(len(sizes))
        for t in reversed(order) if suffix.endswith("_reverse") else order:
            n = sizes[t]
            new_h, new_c = step(inputs[t], hidden(h[:n]), h[:n], c[:n])
            outputs[t] = new_h = new_h if project is None else project(new_h)
            h, c = (new_h, new_c) if n == h.shape[0] else (torch.cat([new_h, h[n:]]), torch.cat([new_c, c[n:]]))
        return torch.cat(outputs), (h, c)


# One step: the maps of the input and of the state, (n, gates * size) each, and the states h and c, (n, size) each ->
# the new states.


def _lstm(x: Tensor, y: Tensor, _: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """i, f, g, o = x + y;  c' = σ(f) c + σ(i) tanh(g);  h' = σ(o) tanh(c') (Hochreiter 1997, as in torch)."""
    i, f, g, o = (x + y).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """r, z = σ(x + y);  n = tanh(x + r y);  h' = (1 − z) n + z h (Cho 2014, as in torch)."""
    (xr, xz, xn), (yr, yz, yn) = x.chunk(3, 1), y.chunk(3, 1)
    n = (xn + (xr + yr).sigmoid() * yn).tanh()
    return n + (xz + yz).sigmoid() * (h - n), c


def _rnn_tanh(x: Tensor, y: Tensor, _: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return (x + y).tanh(), c


def _rnn_relu(x: Tensor, y: Tensor, _: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return (x + y).relu(), c


def directions(module: Any, layer: int) -> list[str]:
    """torch's suffixes for the directions of a layer: l0, and l0_reverse if there are two.

    Args:
        module: A recurrent network.
        layer: The layer's number.
    """
    return [f"l{layer}", f"l{layer}_reverse"] if module.bidirectional else [f"l{layer}"]


def part_names(module: nn.RNNBase) -> list[str]:
    """The names of the Linears of a recurrent network, in torch's order: ih_l0, hh_l0, ...

    Args:
        module: The torch module.
    """
    kinds = ("ih", "hh", "hr") if module.proj_size else ("ih", "hh")
    return [f"{k}_{d}" for layer in range(module.num_layers) for d in directions(module, layer) for k in kinds]
