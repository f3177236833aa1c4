"""Names of Optuna that are not public, in one place: another version may lack them, which a test finds."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial


def study_id(study: optuna.Study) -> int:
    """The number of a study in its storage.

    Args:
        study: The study.
    """
    return study._study_id


def trial_id(trial: FrozenTrial) -> int:
    """The number of a trial in its storage; `trial.number` is that in its study.

    Args:
        trial: A trial that was read from a storage.
    """
    return trial._trial_id


def stale_trials(storage: RDBStorage, study: optuna.Study) -> list[int]:
    """The ids of running trials without a heartbeat for as long as the storage's grace period.

    Args:
        storage: The storage.
        study: A study in it.
    """
    return storage._get_stale_trial_ids(study_id(study))


def in_range(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a distribution has a value.

    Args:
        distribution: A range of numbers, or choices.
        value: The value, as Optuna stores it.
    """
    return distribution._contains(value)
