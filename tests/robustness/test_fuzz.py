"""Every kind of file that rankopt reads, damaged at random: a result or one clear line, no raw error, no hang."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import struct
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from alembic.script import ScriptDirectory
from optuna.trial import TrialState, create_trial

import rankopt
from rankopt.candidates.cache import Cache, FactorStore
from rankopt.candidates.latency_table import Conditions, read_table
from rankopt.candidates.lazy import _Record
from rankopt.candidates.prepare import time_task
from rankopt.candidates.search_space import load_space
from rankopt.core.errors import RankoptError
from rankopt.core.progress import silent
from rankopt.core.records import Task
from rankopt.core.run_folder import read_result, report_damage
from rankopt.decompositions.plan import read_plan, rebuild
from rankopt.experiments import cases
from rankopt.experiments.config import read_study
from rankopt.experiments.digits import DigitsNet
from rankopt.experiments.experiment import read_settings, same_settings
from rankopt.experiments.tuning import TuningStudy
from rankopt.report import benchmark as benchmark_report
from rankopt.report import cases as cases_report
from rankopt.report import hyperparameters
from rankopt.report.training import lines
from rankopt.search import benchmark
from rankopt.search.storage.local import check_folder, create_study, read_trials
from rankopt.search.summary import summary
from rankopt.strategies.policy import Policy, load_policy, save_policy
from rankopt.training import checkpoint
from tests.helpers.latency import SPACE, use_modelled_energy, use_modelled_times

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "studies" / "results"
SECONDS = 20  # of the processor: a reader that takes longer hangs
TOKEN = re.compile(rb'"[^"\n]*"|-?\d[\d.e+-]*|true|false|null|[\[\]{},:=\n]')
HOSTILE = [
    *(b"1.5 -1 0 1e999 NaN nan -Infinity true null [] {} [[1]] [true] {} [{}] 1979-05-27 x , ] }".split()),
    *(b'"" "x" "../../x" "\\u001b[2J" "=1+1" "\\ud800" {"a":1} {a=1} [{a=1}] "a\\nb"'.split()),
    *(b"9" * n for n in (18, 19, 30, 5000)),
    *(b"[" * n + b"]" * n for n in (20, 40, 100_000)),
    b'"' + b"y" * 40_000 + b'"',
    b"\xff\xfe",
    b"\x00",
]


def damaged(good: bytes, chance: random.Random) -> bytes:
    """The content with one to three tokens replaced, removed or moved, or with bytes changed."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if chance.random() < 0.15:
            at = chance.randrange(len(good))
            good = good[:at] + chance.randbytes(chance.randrange(4)) + good[at + chance.randrange(4) :]
            continue
        tokens = [m.span() for m in TOKEN.finditer(good)] or [(0, len(good))]
        start, end = chance.choice(tokens)
        other = slice(*chance.choice(tokens))
        new = chance.choice((b"", good[other], chance.choice(HOSTILE), chance.choice(HOSTILE), chance.choice(HOSTILE)))
        good = good[:start] + new + good[end:]
    return good


def damaged_bytes(good: bytes, chance: random.Random) -> bytes:
    """A binary file, cut off or with some bytes changed."""
    content = bytearray(good)
    if chance.random() < 0.1:
        return bytes(content[: chance.randrange(len(content))])
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


@contextmanager
def no_hang():
    """Context: an error after SECONDS of the processor, however busy the machine is."""

    def stop(number, frame):
        raise AssertionError(f"still at work after {SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _study(path):
    read_study(path)


def _table(path):
    read_table(path, Conditions())


def _portable(path):
    """A table of another machine, with what is asked for: nothing is measured here."""
    cache = path.parent / "cache"
    time_task(_small_task(), SPACE, Conditions(table=str(path)), cache, silent, metrics=("latency", "energy"))


def _plan(path):
    rebuild(DigitsNet(), read_plan(path.parent)[0])


def _weights(path):
    """With the checksum that whoever changed them would write into the plan."""
    plan = json.loads((path.parent.parent / "good/plan.json").read_bytes())
    plan["weights"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "plan.json").write_text(json.dumps(plan))
    for strict in (True, False):
        rankopt.load(_small_model(), path.parent, strict=strict)


def _settings(path):
    if (settings := read_settings(path.parent)) is not None:
        same_settings(settings, settings)


def _training(path):
    """Two more steps."""
    finetune_small(path.parent, resume=True)


def _tuning(folder: Path) -> TuningStudy:
    study = read_study(ROOT / "studies/digits_hyperparameters.toml")
    return TuningStudy(study, Task(DigitsNet(), torch.rand(1, 1, 8, 8), [], score=float), folder)


def _searches(path):
    with _tuning(path.parent).open() as searches:
        list(hyperparameters._rows(searches))
        if searches.finished():
            searches.experiment(searches.best().params)


def _result(path):
    with report_damage(path.parent):
        info = read_result(path.parent)
        text = "\n".join([summary(info), *lines(info)])
    assert "\x1b" not in text


def _benchmark(path):
    data = benchmark.read(path)
    benchmark_report.text(data)
    benchmark_report.markdown(data)
    list(benchmark_report._rows(data))


def _cases(path):
    cases_report.table(list(cases.read_rows(path.parent).values()))


def _trials(path):
    for row in read_trials(path.parent):
        assert row["state"] in {"finished", "failed", "stopped"}


def _entry(path):
    for kind in (dict[str, tuple[tuple[float, float], ...]], _Record):
        Cache(path.parent).read_json("entry", kind)


def _fits(path):
    cache = Cache(path.parent)
    cache.read_metadata("entry", "fits", list[tuple[tuple[int, ...], float]])
    cache.read_metadata("entry", "errors", list[float | None])
    cache.read_tensors("entry", ["0.0", "rows"])
    cache.read_tensors("entry")
    FactorStore(cache)["entry/0"]


def _few_cells() -> bytes:
    data = json.loads((RESULTS / "benchmark_digits/benchmark.json").read_bytes())
    data["settings"]["strategies"] = kept = ["knapsack", "optuna"]
    data |= {key: [row for row in data[key] if row["strategy"] in kept] for key in ("cells", "scores")}
    for cell in data["cells"]:
        cell["trials"] = cell["trials"][:2]
    return json.dumps(data).encode()


def _few_times() -> bytes:
    data = json.loads((ROOT / "search_spaces/hardware/xeon-1-thread.json").read_bytes())
    data["layers"] = {k: dict(list(v.items())[:3]) for k, v in list(data["layers"].items())[:4]}
    return json.dumps(data).encode()


def _own_study(folder: Path) -> bytes:
    from rankopt.core.problem import Problem
    from rankopt.core.records import Cost, Layer, Trial
    from rankopt.search.storage.local import Store

    problem = Problem.__new__(Problem)
    object.__setattr__(problem, "layers", (Layer("a", "Linear", (4, 4)), Layer("b", "Linear", (4, 4))))
    object.__setattr__(problem, "frontiers", ((1, 2, 3), (1, 2, 3)))
    store = Store(folder, problem, {"seed": 0}, resume=False)
    for number in range(4):
        state = ("finished", "finished", "failed", "stopped")[number]
        objective = 0.5 if state == "finished" else None
        store.add(Trial(number, (number % 3, 1), state, Cost(1, 2, 3), objective, rungs=(0.25,)), number + 1)
    store.close()
    return (folder / "study.db").read_bytes()


def _own_entry(folder: Path) -> bytes:
    cache = Cache(folder)
    tensors = {"0.0": torch.rand(3), "0.1": torch.rand(2, 2), "1.0": torch.rand(4)}
    cache.write_tensors("entry", tensors, {"fits": json.dumps([((2,), 0.5), ((3,), 0.25)])})
    return cache.path("entry", "safetensors").read_bytes()


def _own_curve(folder: Path) -> bytes:
    cache = Cache(folder)
    cache.write_json("entry", {"layer": [[0.5, 0.25], [0.75, 0.5]]})
    return cache.path("entry", "json").read_bytes()


def _own_table(folder: Path) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        use_modelled_times(patch)
        use_modelled_energy(patch)
        time_task(_small_task(), SPACE, Conditions(), folder, silent, folder / "table.json", ("latency", "energy"))
    return (folder / "table.json").read_bytes()


def _small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))


def _small_task() -> Task:
    return Task(_small_model().eval(), torch.rand(1, 8), [torch.rand(4, 8)])


def _own_weights(folder: Path) -> bytes:
    space = rankopt.SearchSpace(families=("svd_out",), points=2)
    small = rankopt.compress(_small_model().eval(), [torch.rand(16, 8)], {"params": 0.8}, space=space).model
    rankopt.save(small, folder)
    return (folder / "model.safetensors").read_bytes()


def finetune_small(folder: Path, resume: bool = False) -> None:
    """Two steps of a training with all that a checkpoint may hold."""
    data = [(torch.ones(4, 8), torch.zeros(4, dtype=torch.long))] * 4
    task = Task(
        _small_model(),
        data[0][0],
        [data[0][0]],
        score=lambda model: 0.5,
        train=data,
        loss=torch.nn.functional.cross_entropy,
    )
    recipe = rankopt.Recipe(epochs=2, optimizer="adamw", ema=0.9, best=True, precision="auto", distill=0.5)
    count = itertools.count()
    with suppress(KeyboardInterrupt):
        rankopt.finetune(
            _small_model(), task, recipe, folder=folder, resume=resume, stop=lambda: next(count) == (1 if resume else 4)
        )


def _own_training(folder: Path) -> bytes:
    finetune_small(folder)
    return (folder / checkpoint.FILE).read_bytes()


def _own_searches(folder: Path) -> bytes:
    """One that finished, one that failed, and one whose process was killed."""
    with _tuning(folder).open() as searches:
        usual = searches.study_file.experiment.tunable()
        params = {h.name: h.to_optuna(usual[h.name]) for h in searches.study_file.hyperparameters}
        found = {
            "score": 0.5,
            "params": 300,
            "objective": 0.25,
            "seconds": 1.5,
            "dense": {"params": 1000, "score": 0.9},
        }
        for state, attributes in (("COMPLETE", found), ("FAIL", {"error": "no"}), ("RUNNING", {})):
            values = [0.5, 300.0] if state == "COMPLETE" else None
            kept = {"params": params, "distributions": searches.distributions, "user_attrs": attributes}
            searches.study.add_trial(create_trial(state=TrialState[state], values=values, **kept))
    return (folder / "hyperparameters.db").read_bytes()


def _own_policy(folder: Path) -> bytes:
    save_policy(Policy(), folder / "policy.safetensors")
    return (folder / "policy.safetensors").read_bytes()


def _own_settings(folder: Path) -> bytes:
    return json.dumps(read_study(ROOT / "studies/short.toml").cases[0].settings).encode()


TARGETS = {
    "search space": ("space.toml", lambda _: (ROOT / "search_spaces/thesis-cp.toml").read_bytes(), load_space),
    "study": ("study.toml", lambda _: (ROOT / "studies/digits_hyperparameters.toml").read_bytes(), _study),
    "cases of a study": ("study.toml", lambda _: (ROOT / "studies/short.toml").read_bytes(), _study),
    "hardware table": ("table.json", lambda _: _few_times(), _table),
    "plan": ("plan.json", lambda _: (RESULTS / "digits_hyperparameters/search-9/plan.json").read_bytes(), _plan),
    "result": (
        "result.json",
        lambda _: (RESULTS / "digits_hyperparameters/search-9/result.json").read_bytes(),
        _result,
    ),
    "benchmark": ("benchmark.json", lambda _: _few_cells(), _benchmark),
    "cases": ("cases.json", lambda _: (RESULTS / "short/cases.json").read_bytes(), _cases),
    "trials": ("study.db", _own_study, _trials),
    "searches": ("hyperparameters.db", _own_searches, _searches),
    "settings of a case": ("request.json", _own_settings, _settings),
    "texts in the cache": ("entry.json", _own_curve, _entry),
    "tensors in the cache": ("entry.safetensors", _own_entry, _fits),
    "checkpoint": (checkpoint.FILE, _own_training, _training),
    "weights": ("model.safetensors", _own_weights, _weights),
    "policy": ("policy.safetensors", _own_policy, load_policy),
    "table of another machine": ("table.json", _own_table, _portable),
}


@contextmanager
def known_migrations():
    """Context: Optuna's migrations, of which it asks for the last one at every start, are loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        real, known = ScriptDirectory.get_current_head, []

        def once(self):
            known[:] = known or [real(self)]
            return known[0]

        patch.setattr(ScriptDirectory, "get_current_head", once)
        yield


@known_migrations()
def fuzz(target: str, folder: Path, mutations: int, seed: int) -> None:
    name, make, read = TARGETS[target]
    source, place = folder / "good", folder / "place"
    source.mkdir()
    place.mkdir()
    good, path = make(source), place / name
    path.write_bytes(good)
    read(path)  # the whole file is fine
    chance = random.Random(f"{target} {seed}")
    for number in range(mutations):
        shutil.rmtree(place)
        place.mkdir()
        content = (damaged_bytes if name.endswith((".db", ".safetensors")) and number % 3 else damaged)(good, chance)
        path.write_bytes(content)
        try:
            with no_hang():
                read(path)
        except RankoptError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 1500, str(error)[:3000]
        except Exception as error:
            kept = Path(os.environ.get("FUZZ_KEEP", folder)) / f"{target.replace(' ', '-')}-{number}-{name}"
            kept.write_bytes(content)
            raise AssertionError(f"mutation {number} of {target}: {type(error).__name__}, kept as {kept}") from error


@pytest.mark.parametrize("target", TARGETS)
def test_damage_is_refused_in_one_line(target, tmp_path):
    fuzz(target, tmp_path, 60, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_much_damage_is_refused_in_one_line(target, tmp_path):
    fuzz(target, tmp_path, 10_000, seed=1)


# --- what chance does not find --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE trials RENAME TO old; CREATE VIEW trials AS WITH RECURSIVE r(trial_id) AS (SELECT 1 UNION ALL "
        "SELECT trial_id + 1 FROM r) SELECT trial_id, trial_id AS number, 1 AS study_id, 'COMPLETE' AS state, "
        "NULL AS datetime_start, NULL AS datetime_complete FROM r",
        "CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM trials; END",
        "ALTER TABLE trials ADD COLUMN more TEXT GENERATED ALWAYS AS (hex(zeroblob(100000000)))",
        "CREATE VIRTUAL TABLE f USING fts5(x)",
        "CREATE TABLE more (x, CHECK (length(hex(zeroblob(x))) > 0))",
    ],
)
def test_a_study_that_computes_is_refused(tmp_path, statement):
    create_study(tmp_path / "study.db", "rankopt", {})
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        connection.executescript(statement)
    for use in (read_trials, check_folder):
        with no_hang(), pytest.raises(RankoptError, match="no plain table or index"):
            use(tmp_path)


def test_a_journal_beside_a_study_does_not_delete_another_file(tmp_path):
    """SQLite plays a journal back that a killed writer left, and deletes the file that is named at its end."""
    run, private, magic = tmp_path / "run", tmp_path / "private", bytes.fromhex("d9d505f920a163d7")
    run.mkdir()
    private.write_text("secret")
    create_study(run / "study.db", "rankopt", {})
    name, size = os.fsencode(private), (run / "study.db").stat().st_size
    header = (magic + struct.pack(">5I", 0, 1, size // 4096, 512, 4096)).ljust(512, b"\0")
    end = struct.pack(">I", 2**30 // 4096 + 1) + name + struct.pack(">2I", len(name), sum(name)) + magic
    (run / "study.db-journal").write_bytes(header + end)
    for use in (read_trials, check_folder):
        with pytest.raises(RankoptError, match=r"study\.db-journal names another file"):
            use(run)
    assert private.read_text() == "secret"
    (run / "study.db-journal").write_bytes(header)  # as of a writer that was killed
    assert read_trials(run) == [] and not (run / "study.db-journal").exists()
    for end in ("-journal", "-wal", "-shm"):
        os.mkfifo(run / f"study.db{end}")
        with no_hang(), pytest.raises(RankoptError, match="no regular file"):
            read_trials(run)
        (run / f"study.db{end}").unlink()


def test_a_long_text_in_a_result_takes_no_time(tmp_path):
    info = json.loads((RESULTS / "digits_hyperparameters/search-9/result.json").read_bytes())
    info["warnings"] = ["word " * 40_000, "y" * 400_000]
    info["layers"][0]["reason"] = info["layers"][0]["name"] = "x" * 400_000
    (tmp_path / "result.json").write_text(json.dumps(info))
    with no_hang():
        assert len(summary(read_result(tmp_path))) < 50_000


def test_what_an_error_quotes_is_cut_off_and_escaped(tmp_path):
    """A number with many digits, a name with a line feed, an element type that safetensors does not know."""
    plan = TARGETS["plan"][1](None).replace(b'"method"', b'"' + b"y" * 40_000 + b'"', 1)
    times = json.loads(TARGETS["hardware table"][1](None))
    times["models"] = {"a\nb": {"dense": None}}
    header = json.dumps({"x": {"dtype": "a\nb", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(4)
    for name, content, read in (
        ("plan.json", plan, _plan),
        ("table.json", json.dumps(times).encode(), _table),
        ("checkpoint.safetensors", weights, checkpoint.load),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RankoptError) as refused:
            read(tmp_path / name)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 1500


def test_a_number_without_end_in_a_study_is_refused(tmp_path):
    """Optuna computes with the ends of a range as decimals."""
    good = (ROOT / "studies/digits_hyperparameters.toml").read_text()
    bad = good.replace("high = 0.25", "high = 1e999")
    assert bad != good
    (tmp_path / "study.toml").write_text(bad)
    with pytest.raises(RankoptError, match="no finite number"):
        _study(tmp_path / "study.toml")


def test_weights_that_are_no_file_are_refused(tmp_path):
    _own_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(RankoptError, match="no regular file"):
        rankopt.load(_small_model(), tmp_path)


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path):
    for name, read in (
        ("result.json", _result),
        ("plan.json", _plan),
        ("space.toml", load_space),
        ("study.toml", _study),
        ("benchmark.json", _benchmark),
        ("cases.json", _cases),
        ("table.json", _table),
        ("checkpoint.safetensors", checkpoint.load),
        ("policy.safetensors", load_policy),
    ):
        os.mkfifo(tmp_path / name)
        with pytest.raises(RankoptError, match="no regular file"):
            read(tmp_path / name)
