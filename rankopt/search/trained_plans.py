"""The weights of trials that were trained at the last fidelity, kept until the result is written.

Without them the chosen plan would be trained once more. The best trials' are kept, in files, since workers write them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from rankopt.core.errors import RankoptError
from rankopt.core.files import digest, open_tensors, write_beside
from rankopt.core.problem import Problem
from rankopt.core.records import Proposal
from rankopt.search.loop import plan_key

KEPT = 3
"""Trained models on disk: the best so far, the one before, and one that another worker is about to write."""


@dataclass(frozen=True)
class TrainedPlans:
    """A folder with the weights of the best trained trials.

    Attributes:
        folder: The folder. On a machine that does not have it, nothing is kept.
    """

    folder: Path

    def keep(self, problem: Problem, proposal: Proposal, model: nn.Module, objective: float) -> None:
        """Keep a trial's weights, if it is among the best.

        Args:
            problem: The problem of the proposal.
            proposal: The trial's plan.
            model: Its trained model.
            objective: Its objective.
        """
        if not self.folder.is_dir() or not math.isfinite(objective):
            return
        known = self._objectives()
        path = self._path(problem, proposal)
        ranked = sorted([(value, other) for other, value in known.items() if other != path] + [(objective, path)])
        if (objective, path) in ranked[:KEPT]:
            write_beside(path, lambda p: save_model(model, str(p), {"objective": objective.hex()}))
        self._remove(other for _, other in ranked[KEPT:])

    def restored(self, problem: Problem, proposal: Proposal, model: nn.Module) -> nn.Module | None:
        """The trained model of a trial.

        Args:
            problem: The problem of the proposal.
            proposal: The trial's plan.
            model: Its model before the training; it is not changed.

        Returns:
            A copy with the trained weights; None if they were not kept, or are damaged: training them again gives them.
        """
        path, trained = self._path(problem, proposal), copy.deepcopy(model)
        if path not in self._objectives():
            return None
        try:
            load_model(trained, str(path))
        except (SafetensorError, OSError, RuntimeError):
            return None
        return trained

    def only(self, problem: Problem, proposals: Iterable[Proposal]) -> None:
        """Remove the weights of all other plans, so that they do not take the place of those that can be chosen.

        Args:
            problem: The problem of the proposals.
            proposals: Plans that can be chosen.
        """
        wanted = {self._path(problem, proposal) for proposal in proposals}
        self._remove(path for path in self._objectives() if path not in wanted)

    def _path(self, problem: Problem, proposal: Proposal) -> Path:
        return self.folder / f"{digest(plan_key(problem, proposal))}.safetensors"

    def _objectives(self) -> dict[Path, float]:
        """The readable files and the objectives of their trials."""
        found = {}
        for path in self.folder.glob("*.safetensors"):
            try:
                with open_tensors(path) as file:
                    found[path] = float.fromhex(file.metadata()["objective"])
            except (OSError, ValueError, KeyError, TypeError, RankoptError):  # another worker removed it, or damage
                continue
        return found

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
