"""The private names of Optuna that rankopt uses: where a version lacks or changes one, this says which."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage

import rankopt
from rankopt.search.storage import private

HELP = f"of Optuna {optuna.__version__}: look for its new name in rankopt/search/storage/private.py"


@pytest.fixture
def storage(tmp_path):
    return RDBStorage(f"sqlite:///{tmp_path / 'study.db'}", heartbeat_interval=1, grace_period=1)


def test_ids_are_those_of_the_storage(storage):
    optuna.create_study(storage=storage)
    study = optuna.create_study(storage=storage, study_name="second")
    trial = study.get_trials()[0] if study.add_trial(optuna.trial.create_trial(value=1.0)) else study.trials[0]
    assert private.study_id(study) == storage.get_study_id_from_name("second"), f"Study._study_id {HELP}"
    number = storage.get_trial_number_from_id(private.trial_id(trial))
    assert number == trial.number == 0, f"FrozenTrial._trial_id {HELP}"


def test_a_trial_without_a_heartbeat_is_stale(storage):
    study = optuna.create_study(storage=storage)
    trial = storage.create_new_trial(private.study_id(study))
    storage.record_heartbeat(trial)
    assert private.stale_trials(storage, study) == [], f"RDBStorage._get_stale_trial_ids {HELP}"
    time.sleep(2.5)
    assert private.stale_trials(storage, study) == [trial], f"RDBStorage._get_stale_trial_ids {HELP}"


def test_a_distribution_knows_its_values():
    cases = [
        (FloatDistribution(0.0, 1.0), 0.5, 1.5),
        (IntDistribution(1, 7, step=2), 3, 4),
        (CategoricalDistribution(("a", "b")), 0, 2),
    ]
    for distribution, inside, outside in cases:
        assert private.in_range(distribution, inside), f"BaseDistribution._contains {HELP}"
        assert not private.in_range(distribution, outside), f"BaseDistribution._contains {HELP}"


def test_private_names_are_used_nowhere_else():
    """In files that import optuna, attributes with an underscore in front belong to self, or to their own classes."""
    found = set()
    for path in Path(rankopt.__file__).parent.rglob("*.py"):
        source = path.read_text()
        if "optuna" not in source or path == Path(private.__file__):
            continue
        tree = ast.parse(source)
        own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os")
                if not mine and node.attr not in own:
                    found.add(f"{path.name}: {node.attr}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optuna"):
                found |= {f"{path.name}: {part}" for part in str(node.module).split(".") if part.startswith("_")}
    assert found <= {"optuna.py: _replace"}, found
