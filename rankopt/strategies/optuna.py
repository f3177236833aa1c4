"""Bayesian search: Optuna's TPE over relative frontier positions, warm-started from the exact allocation.

Proposals are projected onto the budget and filled before they are scored, and TPE is told the plan that was
scored, so every trial is feasible.
"""

from __future__ import annotations

import warnings

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import TPESampler

from rankopt.allocation import allocate, fill, project
from rankopt.budget import Problem
from rankopt.core import Proposal, Trial
from rankopt.strategies.base import Strategy


class OptunaTpe(Strategy):
    name = "optuna"

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        super().__init__(problem, seed)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(direction="minimize")
        self.space: dict[str, BaseDistribution] = {
            layer.name: FloatDistribution(0.0, 1.0)
            for layer, f in zip(problem.layers, problem.frontiers, strict=True)
            if len(f) > 1
        }

    def propose(self, number: int) -> Proposal | None:
        if number == 0:
            return allocate(self.problem).proposal
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # A sampler of its own for every ask makes the answer a function of the trials told, nothing else.
            self.study.sampler = TPESampler(
                seed=int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]), n_startup_trials=8
            )
            asked = self.study.ask(self.space)
        # What will be told is the projected plan, so the asked trial itself is closed at once.
        self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        wanted = tuple(
            round(asked.params.get(layer.name, 1.0) * (len(f) - 1))
            for layer, f in zip(self.problem.layers, self.problem.frontiers, strict=True)
        )
        return fill(self.problem, project(self.problem, wanted))

    def tell(self, trial: Trial) -> None:
        if trial.objective is None:
            return
        params = {
            layer.name: at / (len(f) - 1)
            for layer, f, at in zip(self.problem.layers, self.problem.frontiers, trial.proposal, strict=True)
            if layer.name in self.space
        }
        self.study.add_trial(optuna.trial.create_trial(params=params, distributions=self.space, value=trial.objective))
