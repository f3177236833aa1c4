"""What a model's layers are, and what they may become."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.api.errors import in_python_words
from rankopt.candidates.pareto import dense_candidate
from rankopt.candidates.prepare import mark_dense
from rankopt.candidates.quantize import in_each_precision
from rankopt.candidates.search_space import SearchSpace, load_space
from rankopt.core.records import Cost, Layer, unwrapped
from rankopt.model.counting import count
from rankopt.model.inventory import inventory, unfolded


@dataclass(frozen=True)
class Inspection:
    """The layers of a model, before anything is calibrated or fitted.

    Attributes:
        layers: All layers; `reason` says why some stay dense.
        options: Layer name -> decompositions and precisions that have a cheaper candidate for it.
        dense: Cost of the model.
    """

    layers: tuple[Layer, ...]
    options: Mapping[str, Sequence[str]]
    dense: Cost

    def __repr__(self) -> str:
        from rankopt.search.summary import wrapped

        return f"{_table(self)}\n{wrapped(self._total(), 0)}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def _total(self) -> str:
        free = [x for x in self.layers if x.reason is None]
        share = sum(x.cost.params for x in free) / max(self.dense.params, 1)
        return (
            f"whole model: {self.dense.params:,} parameters, {self.dense.macs:,} MACs for one example, "
            f"{self.dense.bytes:,} bytes; {len(free)} of {len(self.layers)} layers ({share:.1%} of the parameters) may "
            "be factorised"
        )


@in_python_words
def inspect(model: nn.Module, example_input: Any, space: SearchSpace | str | Path = "default") -> Inspection:
    """List a model's layers: shape, parameters, MACs, what each may become, what stays dense and why.

    Args:
        model: The model.
        example_input: One input; a tensor, or a tuple or dict of the forward's arguments.
        space: A search space, its name, or the path of its TOML file.

    Returns:
        The layers, which a notebook and `print` show as a table.

    Raises:
        RankoptError: If the model does not run on the input, or the space does not exist.
    """
    model = unwrapped(model)
    allowed = space if isinstance(space, SearchSpace) else load_space(space)
    layers = mark_dense(inventory(unfolded(model, example_input, allowed.split_qkv), example_input), allowed)
    free = [x for x in layers if x.reason is None]
    options = {x.name: [f for f in allowed.families_of(x) if allowed.ranks(f, x)] for x in free}
    for x in free:
        options[x.name] += [c.precision for c in in_each_precision(x, dense_candidate(x), allowed.precisions)]
    return Inspection(layers, options, count(model, example_input))


def _table(found: Inspection) -> str:
    """Every layer in a line, and below it why it stays dense; decompositions by a letter, which stands below."""
    from rankopt.search.summary import columns, wrapped

    options = [", ".join(found.options.get(x.name, [])) or "nothing" for x in found.layers]
    free = dict.fromkeys(text for x, text in zip(found.layers, options, strict=True) if x.reason is None)
    letters = {text: _letter(i) for i, text in enumerate(free)}
    rows, below = [], []
    for x, text in zip(found.layers, options, strict=True):
        shape = "×".join(map(str, x.own_shape)) + (f" g{x.groups}" if x.groups > 1 else "")
        may = letters[text] if x.reason is None else "dense"
        rows.append((x.kind, shape, f"{x.cost.params:,}", f"{x.cost.macs:,}", may))
        also = [f"also {', '.join(x.aliases)}"] if x.aliases else []
        below.append("; ".join([*also, *([f"dense: {x.reason}"] if x.reason else [])]))
    head = ("layer", "kind", "weight", "params", "MACs", "may become")
    legend = [wrapped(f"{letter}: {text}", 3) for text, letter in letters.items()]
    return "\n".join([columns(head, [x.name for x in found.layers], rows, below), "", *legend])


def _letter(i: int) -> str:
    """a, b, ..., z, a1, b1, ..."""
    return chr(ord("a") + i % 26) + (str(i // 26) if i >= 26 else "")
