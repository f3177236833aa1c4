"""The bonds of a compressed model, as Python users have them: latent channels, what drives them and what they do."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from rankopt.api.errors import in_python_words
from rankopt.api.result import Result, import_pandas
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.progress import Progress, silent
from rankopt.core.records import unwrapped
from rankopt.core.result_record import CorrelationEntry

if TYPE_CHECKING:
    from pandas import DataFrame

    from rankopt.report.bond_analysis import LayerBonds, Subject
    from rankopt.report.bond_latents import Effort, LatentBond, Latents, Step
    from rankopt.report.pictures import Axes

WAYS = {"ablated": 0, "patched": 1}


class Example(NamedTuple):
    """An example that a channel responds to.

    Attributes:
        number: Its number among the examples that were analysed.
        response: The channel's response, with its sign.
        place: The position of the layer's output where it is strongest: of a text the number of the token.
        token: The token there; None for other inputs.
    """

    number: int
    response: float
    place: int
    token: str | None = None


class Bonds:
    """The latent channels of a compressed model's bonds. `rankopt.bonds` makes it.

    Attributes:
        latents: The channels of each bond: energy shares, responses, predicted and measured effects, controls.
        layers: Every layer with the spectra of its bonds, or why it has none.
        title: Name of the model or run.
    """

    def __init__(
        self,
        latents: Latents,
        layers: Sequence[LayerBonds],
        title: str = "model",
        classes: Sequence[str] | None = None,
        decode: Callable[[int], str] | None = None,
    ) -> None:
        self.latents, self.layers, self.title = latents, list(layers), title
        latents.classes = list(classes or latents.classes)
        latents.decode = decode or latents.decode

    @classmethod
    def of(
        cls,
        subject: Subject,
        effort: Effort,
        progress: Progress = silent,
        title: str = "model",
        classes: Sequence[str] | None = None,
        decode: Callable[[int], str] | None = None,
    ) -> Bonds:
        """Analyse a model.

        Args:
            subject: The model, its statistics and its inputs.
            effort: How much is measured.
            progress: Shows the measurements.
            title: Name of the model or run.
            classes: Names of the classes.
            decode: Token id -> text.
        """
        from rankopt.model.inputs import first_examples
        from rankopt.report.bond_analysis import inspect_bonds, with_pictures
        from rankopt.report.bond_effects import class_count
        from rankopt.report.bond_latents import analyse

        batches = first_examples(subject.batches, effort.examples)
        if classes is not None and len(classes) != (n := class_count(subject.dense, batches[0])):
            raise TaskError(f"there are {len(classes)} names for {n} classes: give one for each")
        latents = analyse(*subject._replace(batches=batches), effort, progress)
        return cls(latents, with_pictures(inspect_bonds(subject), latents), title, classes, decode)

    # --- as text ---

    def __repr__(self) -> str:
        bonds = self.latents.bonds
        channels = sum(b.effects.count for b in bonds)
        text = f"{len(bonds)} bonds in {len({b.layer for b in bonds})} layers, {channels} channels"
        found = self.agreement()
        if found["spearman"] is not None:
            text += f"; predicted and measured ablation: Spearman {found['spearman']:.2f} (n = {found['n']})"
        return f"<Bonds: {text}>"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self)[1:-1])}</p>{_table(self._overview())}"

    def _overview(self) -> list[dict[str, str]]:
        """A line for each bond."""
        rows = []
        for bond in self.latents.bonds:
            strongest = int(bond.effects.predicted[0].argmax())
            rows.append(
                {
                    "layer": bond.layer or "(the model)",
                    "bond": bond.bond,
                    "channels": str(bond.effects.count),
                    "strongest": str(strongest),
                    "predicted rise": f"{bond.effects.predicted[0, strongest].item():.2g}",
                    "measured": _number(bond.effects.measured[0, strongest].item()),
                }
            )
        return rows

    # --- as data ---

    def bond(self, layer: str, number: int = 0) -> LatentBond:
        """One bond.

        Args:
            layer: Name of its layer.
            number: Its number in the layer, from the input on.

        Raises:
            RankoptError: There is no such bond.
        """
        found = [b for b in self.latents.bonds if b.layer == layer]
        if not found:
            names = ", ".join(dict.fromkeys(repr(b.layer) for b in self.latents.bonds)) or "none is factorised"
            raise RankoptError(f"there is no bond in a layer {layer!r}: choose from {names}")
        if not 0 <= number < len(found):
            raise RankoptError(f"layer {layer!r} has no bond {number}: it has {len(found)}, counted from 0")
        return found[number]

    def to_pandas(self) -> DataFrame:
        """The channels as a pandas DataFrame.

        Columns: layer, method, bond, channel, share (of the bond's energy), predicted and measured (rise of the
        objective when the channel is ablated; NaN: not measured), patched_predicted, patched_measured, top_class (whose
        examples have the highest mean response), selectivity (share of the responses' variance between classes).

        Raises:
            RankoptError: If pandas is not installed.
        """
        return import_pandas().DataFrame([row for bond in self.latents.bonds for row in self._rows(bond)])

    def _rows(self, bond: LatentBond) -> list[dict[str, Any]]:
        from rankopt.report.bond_latents import class_means, selectivity

        means, selective = class_means(self.latents, bond), selectivity(self.latents, bond)
        rows = []
        for r in range(bond.effects.count):
            row: dict[str, Any] = {"layer": bond.layer, "method": bond.method, "bond": bond.bond, "channel": r}
            row["share"] = bond.shares[r].item()
            for name, prefix in (("ablated", ""), ("patched", "patched_")):
                row[f"{prefix}predicted"] = bond.effects.predicted[WAYS[name], r].item()
                row[f"{prefix}measured"] = bond.effects.measured[WAYS[name], r].item()
            if means is not None and selective is not None:
                row["top_class"] = self.latents.classes[int(means[r].nan_to_num(-math.inf).argmax())]
                row["selectivity"] = selective[r].item()
            rows.append(row)
        return rows

    def class_effects(self, layer: str, bond: int = 0) -> DataFrame:
        """How each class's loss rises when a channel is ablated, predicted: a row a channel, a column a class.

        The loss is the cross entropy of the class on the examples that the dense model assigns to it.

        Args:
            layer: Name of the layer.
            bond: Number of the bond.

        Raises:
            RankoptError: If there is no such bond, or pandas is not installed.
        """
        effects = self.bond(layer, bond).effects
        return import_pandas().DataFrame(effects.class_predicted.numpy(), columns=self.latents.classes)

    def responses(self, layer: str, bond: int = 0) -> Tensor:
        """The response of each channel to each example, (examples, channels).

        That is what the channel adds to the layer's output, along its main direction, where this is strongest. The
        sign of a channel is arbitrary, the same for all examples.

        Args:
            layer: Name of the layer.
            bond: Number of the bond.

        Raises:
            RankoptError: If there is no such bond, or the layer's input has no row for each example.
        """
        found = self.bond(layer, bond).effects.responses
        if found is None:
            raise RankoptError(f"the inputs of layer {layer!r} are not one for each example: it has no responses")
        return found

    def top_examples(self, layer: str, channel: int, bond: int = 0, n: int = 5) -> list[Example]:
        """The examples that a channel responds to most strongly.

        Args:
            layer: Name of the layer.
            channel: Number of the channel.
            bond: Number of the bond.
            n: How many.

        Raises:
            RankoptError: As of `responses`, or there is no such channel.
        """
        from rankopt.report.bond_latents import token_at

        responses = self._column(layer, channel, bond)
        places = self.bond(layer, bond).effects.places
        assert places is not None
        order = responses.abs().argsort(descending=True)[:n].tolist()
        found = [(i, responses[i].item(), int(places[i, channel])) for i in order]
        return [Example(*x, token_at(self.latents, x[0], x[2])) for x in found]

    def _column(self, layer: str, channel: int, bond: int) -> Tensor:
        responses = self.responses(layer, bond)
        if not 0 <= channel < responses.shape[1]:
            raise RankoptError(
                f"bond {bond} of layer {layer!r} has {responses.shape[1]} channels: there is no {channel}"
            )
        return responses[:, channel]

    def follow(self, layer: str, channel: int, bond: int = 0) -> list[Step]:
        """Follow a channel through the later layers: which channels respond to the same examples.

        Args:
            layer: Name of the layer.
            channel: Number of the channel.
            bond: Number of the bond.

        Returns:
            For each later bond the channel whose responses correlate most, with the correlation and with the largest
            that chance gives.

        Raises:
            RankoptError: As of `top_examples`.
        """
        from rankopt.report.bond_latents import follow

        self._column(layer, channel, bond)
        return list(follow(self.latents, self.bond(layer, bond), channel))

    def agreement(self, of: str = "channels", way: str = "ablated", within: bool = False) -> CorrelationEntry:
        """Spearman's rank correlation of predicted and measured rises of the objective, with its interval.

        Args:
            of: "channels"; or a control, "rotated" or "random": what is measured of these directions, beside what is
                predicted of the channels.
            way: "ablated" or "patched".
            within: Compare channels within each bond only; layers differ in how much they matter, which alone makes a
                correlation.

        Raises:
            RankoptError: There is no such control, or way.
        """
        from rankopt.report import bond_latents

        names = (bond_latents.CHANNELS, bond_latents.ROTATED, bond_latents.RANDOM)
        if of not in names or way not in WAYS:
            raise RankoptError(
                f"agreement({of!r}, {way!r}): of is {', '.join(map(repr, names))}; way is 'ablated' or 'patched'"
            )
        return bond_latents.agreement(self.latents, of, WAYS[way], within)

    # --- as pictures ---

    def plot_agreement(self, ax: Axes | None = None) -> Axes:
        """Plot measured against predicted rises of the objective, of the channels and the controls.

        Args:
            ax: Matplotlib axes. Default: new ones.
        """
        from rankopt.report import bond_pictures, pictures

        return pictures.on_axes(ax, bond_pictures.agreement, self.latents)

    def plot_effects(self, layer: str, bond: int = 0, ax: Axes | None = None) -> Axes:
        """Plot what the strongest channels of a bond do when they are ablated, predicted and measured.

        Args:
            layer: Name of the layer.
            bond: Number of the bond.
            ax: Matplotlib axes. Default: new ones.

        Raises:
            RankoptError: There is no such bond.
        """
        from rankopt.report import bond_pictures, pictures

        return pictures.on_axes(ax, bond_pictures.effects, self.bond(layer, bond))

    def plot_classes(self, layer: str, bond: int = 0, ax: Axes | None = None) -> Axes:
        """Plot how much each class's loss rises when a channel is ablated.

        Args:
            layer: Name of the layer.
            bond: Number of the bond.
            ax: Matplotlib axes. Default: new ones.

        Raises:
            RankoptError: There is no such bond, or the model's output is not a vector of classes.
        """
        from rankopt.report import bond_pictures, pictures

        found = self.bond(layer, bond)
        if not bond_pictures.has_classes(found):
            raise RankoptError("there are no effects on classes: the model's output is not a vector of classes")
        return pictures.on_axes(ax, bond_pictures.class_effects, found, self.latents.classes)

    def plot_flow(self, layer: str, channel: int, bond: int = 0, ax: Axes | None = None) -> Axes:
        """Plot how a channel is followed through the later layers.

        Args:
            layer: Name of the layer.
            channel: Number of the channel.
            bond: Number of the bond.
            ax: Matplotlib axes. Default: new ones.

        Raises:
            RankoptError: As of `follow`, or it is the last bond.
        """
        from rankopt.report import bond_pictures, pictures

        steps = self.follow(layer, channel, bond)
        if not steps:
            raise RankoptError(f"layer {layer!r} has the last bond: there is no later one to follow a channel to")
        return pictures.on_axes(ax, bond_pictures.flow, steps, height=1.2 + 0.25 * len(steps))

    def plot_spectra(self, layer: str, ax: Axes | None = None) -> Axes:
        """Plot the energies of a layer's channels, each bond's in descending order.

        Args:
            layer: Name of the layer.
            ax: Matplotlib axes. Default: new ones.

        Raises:
            RankoptError: The layer has no bond.
        """
        from rankopt.report import bond_pictures, pictures

        self.bond(layer)
        return pictures.on_axes(ax, bond_pictures.shares, [b for b in self.latents.bonds if b.layer == layer])

    @in_python_words
    def report(self, path: str | Path) -> Path:
        """Write one HTML page that needs nothing else.

        Args:
            path: The file; its folder is made if it is missing.

        Returns:
            The file.

        Raises:
            RankoptError: If it cannot be written.
        """
        from rankopt.report.bonds_page import write_bonds

        return write_bonds(Path(path), self.title, self.layers, self.latents)


@in_python_words
def bonds(  # noqa: PLR0913  # a public entry point: everything after `calibration` is optional and by keyword
    result: Result | nn.Module,
    calibration: Iterable[Any] | None = None,
    *,
    dense: nn.Module | None = None,
    layers: str | Sequence[str] = "*",
    examples: int = 128,
    measured: int | None = 8,
    controls: bool = True,
    classes: Sequence[str] | None = None,
    decode: Callable[[int], str] | None = None,
    seed: int = 0,
    progress: bool | Progress | None = None,
) -> Bonds:
    """Analyse the bonds of a compressed model: their latent channels, what drives these and what they do.

    Where two factors of a layer meet there is a bond, whose index numbers latent channels that a dense network does not
    have. For each channel: its share of the energy; the examples and classes that it responds to; and how much the
    objective and each class's loss rise when it is ablated (taken away) or patched (replaced by what it is for another
    example). The rises are predicted for all channels, from one forward and about ten backward passes over the
    examples, and measured for some.

    Args:
        result: What `rankopt.compress` returned; or a compressed model, with `dense` and `calibration`.
        calibration: Batches of inputs. Default: those of the result.
        dense: The dense model. Default: that of the result.
        layers: Names or patterns of layers to analyse, such as "layer3.*".
        examples: How many examples channels are changed on.
        measured: Channels of each bond that are measured, too, evenly spread over the order of the predicted effects;
            None: all.
        controls: Also measure as many directions of a randomly rotated bond, and random directions of the output.
        classes: Names of the model's classes. Default: their numbers.
        decode: Token id -> text, such as a tokenizer's `decode`, for models of text.
        seed: Of everything random.
        progress: As of `rankopt.compress`.

    Returns:
        The channels, as tables, plots and a page.

    Raises:
        RankoptError: Something is missing or does not fit; the message says what to do.

    Example:
        >>> found = rankopt.bonds(result)
        >>> found.to_pandas().sort_values("predicted", ascending=False)
        >>> found.report("bonds.html")
    """
    from rankopt.report.bond_analysis import EXAMPLES, subject
    from rankopt.report.bond_latents import Effort
    from rankopt.search.progress import displays

    small = result.model if isinstance(result, Result) else unwrapped(result)
    if not isinstance(small, nn.Module):
        raise TaskError(f"result is a {type(small).__name__}: give what rankopt.compress returned, or a model")
    if isinstance(result, Result):
        dense = result.dense if dense is None else dense
        calibration = result.inputs if calibration is None else calibration
    if dense is None or calibration is None:
        missing = "dense=, the dense model" if dense is None else "calibration, batches of inputs"
        raise TaskError(f"the bonds of a model that was not compressed here need more: give {missing}")
    for name, value in (("examples", examples), ("measured", measured)):
        if value is not None and value < 1:
            raise TaskError(f"{name} is {value}: give a positive number")
    shown = displays(progress)[0]
    patterns = [layers] if isinstance(layers, str) else list(layers)
    most = max(EXAMPLES, examples)
    found = subject(unwrapped(dense), small, calibration, only=patterns, examples=most, progress=shown)
    if not found.replaced:
        raise TaskError(
            f"no factorised layer's name fits {', '.join(map(repr, patterns))}: there is nothing to analyse"
        )
    effort = Effort(examples, measured, controls, seed)
    return Bonds.of(found, effort, shown, type(small).__name__, classes, decode)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2g}"


def _table(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(x)}</td>' for x in row.values())}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
