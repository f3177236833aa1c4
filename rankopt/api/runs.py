"""Saved models: writing, reading and exporting them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rankopt.api.errors import in_python_words
from rankopt.api.result import Result
from rankopt.core.budget import Limit
from rankopt.core.errors import RankoptError, TaskError
from rankopt.core.records import unwrapped
from rankopt.core.run_folder import read_result, report_damage
from rankopt.decompositions.plan import load, plan_of, read_plan
from rankopt.decompositions.plan import save as save_model
from rankopt.model.counting import count
from rankopt.search import result as search_result

if TYPE_CHECKING:
    from rankopt.export.export import Exported


@in_python_words
def save(model: nn.Module, folder: str | Path, example_input: Any = None) -> None:
    """Write a model with compressed layers to a folder that `rankopt.load` reads: plan.json and model.safetensors.

    It may come from `rankopt.compress` or `rankopt.load`, and may have been trained since. `Result.save` also writes
    the record of the search.

    Args:
        model: The model.
        folder: Where to write; made if it is missing.
        example_input: One input, to count MACs with. Without it the plan says 0 MACs.

    Raises:
        RankoptError: If a file cannot be written.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise TaskError(f"model is a {type(model).__name__}: give an nn.Module")
    save_model(folder, model, plan_of(model, None if example_input is None else count(model, example_input)))


@in_python_words
def load_run(model: nn.Module | Callable[[], nn.Module], folder: str | Path) -> Result:
    """Read a run folder, or what `Result.save` wrote, as a result.

    Args:
        model: The dense model, or a function that builds it, as of `rankopt.load`.
        folder: The folder.

    Returns:
        The result with its model and trials; layers' frontiers and sensitivities are not on disk.

    Raises:
        RankoptError: A file is missing or damaged, or belongs to another model.
    """
    from rankopt.search.storage.local import FILE, read_run_trials

    folder = Path(folder)
    plan, _ = read_plan(folder)
    info = read_result(folder)
    with report_damage(folder):
        limits = tuple(Limit(metric, b["requested"], b["target"]) for metric, b in info["budget"].items())
    trials = read_run_trials(folder) if (folder / FILE).is_file() else []
    return Result.of(search_result.Result(load(model, folder), plan, limits, info, trials))


@in_python_words
def export(
    model: nn.Module | Result,
    path: str | Path,
    inputs: Any,
    *,
    to: str | None = None,
    batch: int | str = "dynamic",
    fuse: bool = False,
) -> Exported:
    """Write a model for use elsewhere, and compare the outputs of what was written with the model's.

    Args:
        model: A compressed model, its result, or any other model.
        path: The file.
        inputs: A batch of inputs to trace and compare with, as the model takes it.
        to: "onnx" or "torch.export". Default: by the file's name, .onnx or .pt2.
        batch: The batch size that the program takes; "dynamic" for any.
        fuse: Whether to fold batch norms, and to merge or multiply out layers where that pays.

    Returns:
        The file, the difference of its outputs, and the loaded program.

    Raises:
        RankoptError: If the model cannot be exported, or an output differs.
    """
    from rankopt.export import export as exports

    suffixes = {exports.SUFFIXES[name]: name for name in exports.LOADERS}
    found = to or suffixes.get(Path(path).suffix)
    if found not in exports.LOADERS:
        raise RankoptError(
            f"the format of {str(path)!r} is not known: give to={' or '.join(map(repr, exports.LOADERS))}"
        )
    size = exports.check_request(found, fuse, str(batch), dense=False)
    return exports.export(model.model if isinstance(model, Result) else model, found, path, inputs, size, fuse)
