"""The content of result.json, key by key: what `Result.info` holds and `read_result` returns.

`ResultInfo` is the whole record; the other classes are its entries. Costs are integers, scores and shares are fractions
(0.5 is 50 %), times are seconds unless a key says milliseconds, and latencies are integer nanoseconds. All intervals
are 95 % intervals, written as [low, high]. Keys marked `NotRequired` are absent where they do not apply; those that
earlier versions did not write are marked so as well, because their files are still read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads the one of typing only from Python 3.12 on

Metric = Literal["params", "macs", "bytes", "latency", "memory", "disk", "energy"]
"""What a budget may limit; `rankopt.core.records.Cost` defines each."""


Part = Literal["validation", "test"]
"""The data that a score is measured on."""


Which = Literal["dense", "compressed"]
"""The model before and after."""


PARTS: tuple[Part, ...] = ("validation", "test")


Bounds = Sequence[float]
"""A 95 % interval, [low, high]."""


# --- budget and cost ---------------------------------------------------------------------------------


class BudgetEntry(TypedDict):
    """One limit of the budget.

    Attributes:
        requested: The value asked for: a fraction of the dense model if it is at most 1, else an absolute number.
        target: The limit in absolute numbers. After a check by measurement this is the limit that was asked for, not
            the tightened one that the search ran with.
        achieved: What the compressed model has, counted (latency, energy: measured, if the device is here) after it was
            rebuilt.
        dense: What the dense model has.
    """

    requested: float
    target: int
    achieved: int
    dense: int


class CostEntry(TypedDict):
    """The cost of a whole model.

    Attributes:
        params: Elements of unique parameters.
        macs: Multiply-accumulates for one example.
        bytes: Parameters and buffers as stored, in bytes.
        latency: Nanoseconds of a forward pass; 0 without a latency budget.
        memory: Peak bytes of weights and activations that live at once; 0 without a budget on memory or disk.
        disk: Bytes of model.safetensors; 0 without a budget on memory or disk.
        energy: Nanojoules for one example; 0 without an energy budget.
    """

    params: int
    macs: int
    bytes: int
    latency: NotRequired[int]
    memory: NotRequired[int]
    disk: NotRequired[int]
    energy: NotRequired[int]


class CostsEntry(TypedDict):
    """The cost of both models.

    Attributes:
        dense: Cost of the dense model.
        compressed: Cost of the compressed model.
    """

    dense: CostEntry
    compressed: CostEntry


# --- scores ------------------------------------------------------------------------------------------


class ScoreEntry(TypedDict):
    """The scores of one model; None where the task has no such score.

    Attributes:
        validation: The task's `score`.
        test: The task's `test`, read once at the end.
    """

    validation: float | None
    test: float | None


class ScoresEntry(TypedDict):
    """The scores of both models.

    Attributes:
        dense: Scores of the dense model.
        compressed: Scores of the compressed model.
    """

    dense: ScoreEntry
    compressed: ScoreEntry


class ExamplesEntry(TypedDict):
    """How many examples a score averages over; None where the task does not say.

    Attributes:
        validation: `Task.examples`.
        test: `Task.test_examples`.
    """

    validation: int | None
    test: int | None


class IntervalEntry(TypedDict):
    """Wilson intervals of one model's scores; None without a score or a number of examples.

    Attributes:
        validation: Interval of the validation score.
        test: Interval of the test score.
    """

    validation: Bounds | None
    test: Bounds | None


class IntervalsEntry(TypedDict):
    """Wilson intervals of both models' scores.

    Attributes:
        dense: Intervals of the dense model.
        compressed: Intervals of the compressed model.
    """

    dense: IntervalEntry
    compressed: IntervalEntry


class ScoreRecord(TypedDict):
    """The three entries about scores, which are always written together.

    Attributes:
        score: Scores of both models.
        examples: Examples that these average over.
        intervals: Intervals that follow.
    """

    score: ScoresEntry
    examples: ExamplesEntry
    intervals: IntervalsEntry


# --- the search --------------------------------------------------------------------------------------


class TrialsEntry(TypedDict):
    """How many plans were proposed and evaluated.

    Attributes:
        asked: Proposals that the strategy made, repeated ones included.
        finished: Trials that gave an objective.
        failed: Trials that raised an error.
        stopped: Trials that were stopped at a low fidelity.
        distinct: Distinct plans among the trials.
        limit: Distinct plans that were to be evaluated; absent in files of earlier versions.
        outside: Trials evaluated before a latency check tightened the limit, whose plans lie outside the new one.
        interrupted: Whether the search was stopped before all its trials were done.
    """

    asked: int
    finished: int
    failed: int
    stopped: NotRequired[int]
    distinct: int
    limit: NotRequired[int]
    outside: NotRequired[int]
    interrupted: NotRequired[bool]


class ObjectiveEntry(TypedDict):
    """The objective of the chosen plan.

    Attributes:
        best: Measured objective (less is better); after `train` in a study, that of the trained model.
        dense: That of the dense model: 0 for the default objective. Absent in files of earlier versions.
        predicted: Predicted rise of the objective: the sum of the layers' losses. None if nothing was predicted.
        trial: Number of the chosen trial.
    """

    best: float
    dense: NotRequired[float]
    predicted: float | None
    trial: NotRequired[int]


class CorrelationEntry(TypedDict):
    """Spearman's rank correlation of two numbers over the trials.

    Attributes:
        n: Trials that have both numbers.
        spearman: The correlation; None if the verdict is "too few" or "constant".
        low: Lower end of its interval (Bonett and Wright 2000); None as above.
        high: Upper end of its interval; None as above.
        verdict: "good" (the whole interval is above 0.5), "unclear" (the correlation is, its interval is not), "poor"
            (the correlation is below 0.5), "too few" (under 10 trials) or "constant" (one number never varies).
    """

    n: int
    spearman: float | None
    low: float | None
    high: float | None
    verdict: Literal["good", "unclear", "poor", "too few", "constant"]


class ProxyEntry(TypedDict):
    """How well the cheap numbers of the search rank the expensive ones; None where a number is missing.

    Attributes:
        predicted_objective: Predicted losses against measured objectives.
        objective_score: Objectives against validation scores; 1 means that less objective is more score.
    """

    predicted_objective: CorrelationEntry | None
    objective_score: CorrelationEntry | None


class FidelityRow(TypedDict):
    """One fidelity below the full one.

    Attributes:
        name: For example "0.1 of the examples".
        measured: Trials measured at it.
        stopped: Numbers of the trials stopped after it.
        correlation: Rank correlation with the full objective over the trials that went on; None if none did.
        agreement: Share of the pairs of such trials that it ordered as the objective did; None without pairs.
    """

    name: str
    measured: int
    stopped: list[int]
    correlation: CorrelationEntry | None
    agreement: float | None


class FrontRow(TypedDict):
    """A trial on the front of a search with several objectives (option `objectives`).

    Attributes:
        trial: Number of the trial.
        objective: Its objective.
        params, macs, bytes, latency, memory, disk, energy: Its cost under the metrics that are objectives.
    """

    trial: int
    objective: float
    params: NotRequired[int]
    macs: NotRequired[int]
    bytes: NotRequired[int]
    latency: NotRequired[int]
    memory: NotRequired[int]
    disk: NotRequired[int]
    energy: NotRequired[int]


class TieEntry(TypedDict):
    """The chosen plan's validation score against the runner-up's, the next best trial by objective.

    Attributes:
        runner_up: Number of the runner-up's trial.
        score: Its validation score.
        low: Lower end of the interval of chosen − runner-up (Newcombe 1998, method 10).
        high: Upper end of that interval.
        verdict: "tie" (the interval holds 0), or the chosen plan is "better" or "worse".
        tied: How many of the other plans differ from the chosen one by no more than the noise.
        others: How many other plans have a score.
    """

    runner_up: int
    score: float
    low: float
    high: float
    verdict: Literal["tie", "better", "worse"]
    tied: int
    others: int


class ChangeEntry(TypedDict):
    """A step after the search that is kept only if it lowers the objective.

    Attributes:
        before: Objective before the step.
        after: Objective after it.
        kept: Whether the changed model was kept.
    """

    before: float
    after: float
    kept: bool


class ChangeRecord(TypedDict):
    """The two steps after the search; None if a step was not asked for, or changes nothing.

    Attributes:
        refinement: Refitting of the layers one after the other.
        batch_norm: Recalibration of batch norms.
    """

    refinement: ChangeEntry | None
    batch_norm: ChangeEntry | None


class TriedRow(TypedDict):
    """A distinct plan evaluated for `--max-drop`.

    Attributes:
        objective: Its objective.
        score: Its validation score.
        drop: Score of the dense model minus this score.
        target: The least budget that this plan is the exact allocation for.
        params, macs, bytes: Its cost, under the one metric that was minimised.
    """

    objective: float
    score: float
    drop: float
    target: int
    params: NotRequired[int]
    macs: NotRequired[int]
    bytes: NotRequired[int]


class QuestionEntry(TypedDict):
    """What `--max-drop` asked, and its answer.

    Attributes:
        minimize: The metric that was minimised.
        max_drop: The largest loss of validation score allowed.
        step: Relative size of the steps between budgets.
        evaluations: Plans evaluated to find the answer.
        dense_score: Validation score of the dense model.
        target: The budget found.
        drop: Validation score lost by the plan found.
        score: Its validation score.
        interval: Interval of the drop; None if the task does not give its number of examples.
        tried: Every plan evaluated, smallest first.
    """

    minimize: Metric
    max_drop: float
    step: float
    evaluations: int
    dense_score: float
    target: int
    drop: float
    score: float
    interval: Bounds | None
    tried: list[TriedRow]


class RoundEntry(TypedDict):
    """A round of multi-stage compression.

    Attributes:
        round: Its number, from 1.
        budget: Limit of each budgeted metric in this round.
        objective: Objective of the plan that the round chose.
        objective_after_training: Objective after the round's training, which is kept only if it helps.
    """

    round: int
    budget: dict[str, int]
    objective: float
    objective_after_training: float | None


# --- measurements ------------------------------------------------------------------------------------


class MillisecondsEntry(TypedDict):
    """Time of a forward pass on the machine of the search.

    Attributes:
        examples: Examples of the pass; absent in files of earlier versions, where it is 1.
        dense: Median milliseconds of the dense model.
        compressed: Median milliseconds of the compressed model.
        ratio: The 95 % interval of the median ratio of the compressed model's time to the dense one's; absent in files
            of earlier versions.
        repeats: Passes of each model, in turns.
        threads: Threads used.
    """

    examples: NotRequired[int]
    dense: float
    compressed: float
    ratio: NotRequired[Bounds]
    repeats: int
    threads: int


class EnergyEntry(TypedDict):
    """Energy of one inference of one example; None where the machine has no readable counter.

    Attributes:
        dense: Joules of the dense model.
        compressed: Joules of the compressed model.
        dense_grams: Grams of CO₂ equivalents of the dense model.
        compressed_grams: Grams of CO₂ equivalents of the compressed model.
        source: The counter that was read, or why there is none.
    """

    dense: float | None
    compressed: float | None
    dense_grams: float | None
    compressed_grams: float | None
    source: str


class MeasuredEntry(TypedDict):
    """What a budget on something measured came to: how layers were measured and, if the device is here, the check.

    Nanoseconds of a forward pass, or nanojoules for one example. All from `target` on is absent without a check.

    Attributes:
        conditions: Device, batch, threads and runtime, as `--latency-on` takes them.
        machine: The machine that the layers were measured on.
        foreign: Whether the table comes from another machine, so that nothing was measured here.
        slope: How often a candidate's own cost counts in the whole model.
        residual: Worst error of that fit, as a share of the dense model's cost.
        plans: Whole models that the fit rests on.
        interpolation: Typical relative error of costs between measured ranks; None if none was interpolated.
        none_faster: Layers that no candidate makes cheaper; they stay dense.
        attempts: Searches that were checked; 0 without a check.
        target: The limit asked for.
        predicted: What the plan predicted.
        dense: Median of the dense model during the check.
        low: Lower end of the interval of the compressed model's median.
        high: Upper end of the interval.
        rounds: Samples of each model, taken in turns.
        met: Whether `high` is within the limit and no factorised layer takes more than dense.
    """

    conditions: str
    machine: str
    foreign: bool
    slope: float
    residual: float
    plans: int
    interpolation: float | None
    none_faster: list[str]
    attempts: int
    target: NotRequired[int]
    predicted: NotRequired[int]
    dense: NotRequired[int]
    low: NotRequired[int]
    high: NotRequired[int]
    rounds: NotRequired[int]
    met: NotRequired[bool]


class LayerLatency(TypedDict):
    """One factorised layer, timed beside its dense original.

    Attributes:
        dense: Nanoseconds of the dense layer.
        latency: Nanoseconds of the factorised layer.
    """

    dense: int
    latency: int


class LatencyEntry(MeasuredEntry):
    """What a latency budget came to.

    Attributes:
        latency: Median of the compressed model. For a budget given as a fraction: the ratio to the dense model, times
            the dense model's latency in the table.
        layers: Timing of every factorised layer, by name.
    """

    latency: NotRequired[int]
    layers: NotRequired[dict[str, LayerLatency]]


class LayerEnergy(TypedDict):
    """One factorised layer, measured beside its dense original.

    Attributes:
        dense: Nanojoules of the dense layer.
        energy: Nanojoules of the factorised layer.
    """

    dense: int
    energy: int


class EnergyBudgetEntry(MeasuredEntry):
    """What an energy budget came to.

    Attributes:
        energy: Median of the compressed model. For a budget given as a fraction: the ratio to the dense model, times
            the dense model's energy in the table.
        layers: Energy of every factorised layer, by name.
    """

    energy: NotRequired[int]
    layers: NotRequired[dict[str, LayerEnergy]]


MEASURED_KEYS: dict[Metric, Literal["latency", "energy_budget"]] = {"latency": "latency", "energy": "energy_budget"}
"""Metric -> key of result.json that says what the budget on it came to."""


# --- layers ------------------------------------------------------------------------------------------


class LayerRow(TypedDict):
    """What the plan decided for one layer.

    Attributes:
        name: Name of the module in the model.
        kind: Class of the layer, such as "Conv2d".
        shape: Shape of its weight.
        method: Decomposition family, or "dense".
        rank: Rank of the decomposition; empty if dense.
        params: Parameters of the layer in the compressed model.
        macs: Multiply-accumulates of the layer in the compressed model.
        error: Relative error of the layer's output; 0 is exact, 1 is no better than a layer of zeros.
        reason: Why the layer got this candidate.
        form: "factorised", "reconstructed" or "dense".
        precision: What its weights are stored in; "same" as in the dense model.
        dense_params: Parameters of the dense layer.
        dense_macs: Multiply-accumulates of the dense layer.
    """

    name: str
    kind: str
    shape: list[int]
    method: str
    rank: list[int]
    params: int
    macs: int
    error: float
    reason: str
    form: NotRequired[str]
    precision: NotRequired[str]
    dense_params: int
    dense_macs: int


class FrontierPoint(TypedDict):
    """A candidate of a layer that no other beats in both cost and loss.

    Attributes:
        method: Decomposition family, or "dense".
        rank: Its rank.
        cost: What the layer costs with it.
        loss: Predicted rise of the objective.
        form: As in `LayerRow`.
        precision: As in `LayerRow`.
    """

    method: str
    rank: list[int]
    cost: int
    loss: float
    form: str
    precision: str


class FrontiersFile(TypedDict):
    """The whole of frontiers.json.

    Attributes:
        metric: The metric of the costs: the budget's first.
        layers: Layer name -> its candidates, cheapest first. Of a model of many layers only some of each.
    """

    metric: Metric
    layers: dict[str, list[FrontierPoint]]


# --- training ----------------------------------------------------------------------------------------


class EpochRow(TypedDict):
    """One epoch of a training.

    Attributes:
        epoch: Epochs done, may end in a fraction.
        loss: Mean training loss over the epoch.
        score: Validation score after it; None if the task has none.
    """

    epoch: float
    loss: float
    score: float | None


class ExecutionEntry(TypedDict):
    """How the steps of a training were computed.

    Attributes:
        device: The device, as "cuda:0 (NVIDIA H200)".
        precision: "float32", "tf32" or "bfloat16".
        channels_last: Whether 4-dimensional tensors were in the channels-last memory format.
        graphs: How many CUDA graphs were recorded, one for each shape of batches.
        not_recorded: Why steps were launched kernel by kernel on a GPU; empty if they were recorded.
        milliseconds: If precision was "auto": choice -> milliseconds of a step, of those that were tried.
        steps_per_second: Steps a second, validation included.
    """

    device: str
    precision: str
    channels_last: bool
    graphs: int
    not_recorded: str
    milliseconds: dict[str, float]
    steps_per_second: float


class FinetuneInfo(TypedDict):
    """How a training went: `info` of what `rankopt.finetune` returns.

    Attributes:
        recipe: The settings, as the fields of `rankopt.Recipe`.
        labels: Whether labels were learnt from; False if only predictions were.
        before: Validation score before the training.
        epochs: One row for each epoch.
        losses: Points (step, loss) by stage, "layerwise" and "whole"; each is the mean since the point before.
        seconds: Duration of the training.
        execution: How the steps were computed; absent in results of earlier versions.
    """

    recipe: dict[str, Any]
    labels: NotRequired[bool]
    before: float | None
    epochs: list[EpochRow]
    losses: dict[str, list[list[float]]]
    seconds: float
    execution: NotRequired[ExecutionEntry]


class TrainingSource(TypedDict):
    """Where a training started.

    Attributes:
        run: The run folder of the search, or "the search".
        from_scratch: Whether the factors were drawn at random instead of taken from the search.
        teacher: Name of the task whose model's predictions were learnt; None for the dense model's.
    """

    run: str
    from_scratch: bool
    teacher: str | None


class TrainingEntry(FinetuneInfo, TrainingSource):
    """The training of a search's result.

    Attributes:
        test_before: Test score before the training; None from scratch or without a test.
        batch_norms: How many batch norms the model has; absent in files of earlier versions.
    """

    test_before: float | None
    batch_norms: NotRequired[int]


# --- what was fitted -----------------------------------------------------------------------------------


class DroppedRow(TypedDict):
    """A family of which nothing was fitted to the end on a layer.

    Attributes:
        layer: Name of the layer.
        family: Name of the decomposition.
        behind: By how much more than `bound` a plan loses, as predicted, if it uses the family's best candidate on
            this layer, by the error that this is likely to reach; None where another family's candidates are better
            at any cost.
    """

    layer: str
    family: str
    behind: float | None


class FittingEntry(TypedDict):
    """Which candidates were fitted to the end for a budget, and on which evidence others were not.

    Attributes:
        candidates: Fits that the search space allows.
        first: Those made with few steps that no other candidate had beaten by then.
        final: Fits to the end for this budget.
        rounds: How often candidates were chosen and fitted.
        settled: Whether a further round would have fitted nothing.
        bound: A lower bound of the predicted losses of all plans, by the errors that fits are likely to reach.
        gain: By what share of it fitting everything could lower the least predicted loss, by these errors.
        dropped: Families of which nothing was fitted to the end, by layer.
    """

    candidates: int
    first: int
    final: int
    rounds: int
    settled: bool
    bound: float
    gain: float
    dropped: list[DroppedRow]


# --- the whole ---------------------------------------------------------------------------------------


class AsFastEntry(TypedDict):
    """What a second search found, within the same budget and for a model that is not slower than dense, both fused.

    Attributes:
        conditions: Conditions of the times, as `latency_on` takes them.
        refused: Why there is no such model; absent if there is one, as are the other keys if there is none.
        failed: Why the search did not end; then all others but the conditions are absent.
        run: Where it is within the run folder.
        cost: Cost of its model.
        score: Scores of its model.
        ratio: Its time as a share of the dense model's.
        interval: Its 95 % interval.
        reconstructed: Layers that it stores as factors and runs as one dense operation.
    """

    conditions: str
    refused: NotRequired[str]
    failed: NotRequired[str]
    run: NotRequired[str]
    cost: NotRequired[CostEntry]
    score: NotRequired[ScoreEntry]
    ratio: NotRequired[float]
    interval: NotRequired[Bounds]
    reconstructed: NotRequired[int]


class EnvironmentEntry(TypedDict):
    """What a result was made with.

    Attributes:
        date: Date and time with the time zone, ISO 8601.
        rankopt: Version of rankopt.
        torch: Version of PyTorch.
        python: Version of Python.
        system: Operating system and architecture.
        device: The device of the model, as "cuda:0 (NVIDIA H100)".
        processor: Name of the CPU.
        cores: Cores that the process may use.
    """

    date: str
    rankopt: str
    torch: str
    python: str
    system: str
    device: str
    processor: str
    cores: int


class SearchMetadata(TypedDict):
    """What was searched, and with which settings.

    Attributes:
        task: Name of the task; may be empty.
        strategy: Name of the strategy.
        seed: Seed of the search.
        options: Options of the strategy, as text.
        question: What `--max-drop` asked, and its answer; absent otherwise.
        notes: Remarks of the strategy, by layer.
        warnings: What to know before trusting the result: sentences without a full stop.
    """

    task: str
    strategy: str
    seed: int
    options: NotRequired[dict[str, str]]
    question: NotRequired[QuestionEntry]
    notes: NotRequired[dict[str, str]]
    warnings: NotRequired[list[str]]


class ResultInfo(SearchMetadata):
    """The whole of result.json.

    Attributes:
        seconds: Seconds by stage of the run.
        family_seconds: Seconds of fitting by family, all workers together; empty if all fits came from the cache.
        forward_passes: Forward passes of all calibration examples that the sensitivities took; 0 if they came from the
            cache. Absent in results of earlier versions.
        environment: Versions, date and machine; absent in files of earlier versions.
        space: The search space, with the keys of its TOML file; absent in files of earlier versions.
        settings: Settings of the search that have no key of their own, by the names of `rankopt.compress`'s arguments;
            those at their default are left out. Absent in files of earlier versions.
        effort: The search space's effort: "quick", "normal" or "thorough"; absent in files of earlier versions.
        fitting: What was fitted for the budget, and why not more; absent if everything was.
        trials: How many plans were proposed and evaluated.
        budget: The limits, by metric.
        cost: Cost of both models.
        optimality_gap: Relative gap of the chosen plan's predicted loss to the least that any plan of the fitted
            candidates can have within the budget; None where a strategy trained the network.
        objective: Objective of the chosen plan.
        fidelities: One row for each fidelity below the full one.
        refinement: Refitting of the layers one after the other; None if not asked for.
        batch_norm: Recalibration of batch norms; None if not asked for, or if the model has none.
        score: Scores of both models.
        examples: Examples that scores average over.
        intervals: Intervals of the scores.
        proxy: How well predictions rank objectives, and objectives scores.
        front: The front of a search with a second objective; else empty.
        tie: The chosen plan against the runner-up; None if there is nothing to compare, or after a training.
        milliseconds: Time of a forward pass of one example on the machine of the search.
        batch_milliseconds: The same of a batch that fills the device; absent where one example does, where the model
            takes no larger batch, and in files of earlier versions.
        energy: Energy of an inference.
        latency: What a latency budget came to; absent without one.
        energy_budget: What an energy budget came to; absent without one.
        as_fast: What `as_fast` found; absent if it was not asked for.
        layers: One row for each layer, in the model's order.
        training: The training of the result; absent without one.
        rounds: The rounds of multi-stage compression so far; absent without them.
    """

    seconds: dict[str, float]
    family_seconds: dict[str, float]
    forward_passes: NotRequired[float]
    environment: NotRequired[EnvironmentEntry]
    space: NotRequired[dict[str, Any]]
    settings: NotRequired[dict[str, str]]
    effort: NotRequired[str]
    fitting: NotRequired[FittingEntry]
    trials: TrialsEntry
    budget: dict[Metric, BudgetEntry]
    cost: CostsEntry
    optimality_gap: float | None
    objective: ObjectiveEntry
    fidelities: NotRequired[list[FidelityRow]]
    refinement: NotRequired[ChangeEntry | None]
    batch_norm: NotRequired[ChangeEntry | None]
    score: ScoresEntry
    examples: NotRequired[ExamplesEntry]
    intervals: NotRequired[IntervalsEntry]
    proxy: NotRequired[ProxyEntry]
    front: NotRequired[list[FrontRow]]
    tie: NotRequired[TieEntry | None]
    milliseconds: MillisecondsEntry
    batch_milliseconds: NotRequired[MillisecondsEntry]
    energy: NotRequired[EnergyEntry]
    latency: NotRequired[LatencyEntry]
    energy_budget: NotRequired[EnergyBudgetEntry]
    as_fast: NotRequired[AsFastEntry]
    layers: list[LayerRow]
    training: NotRequired[TrainingEntry]
    rounds: NotRequired[list[RoundEntry]]


# --- trials ------------------------------------------------------------------------------------------


class TrialRow(TypedDict):
    """A trial of a run folder's study.db, as reports read it.

    Attributes:
        number: Its number, in the order in which trials ended.
        state: "finished", "failed" or "stopped" (at a low fidelity).
        objective: Measured objective; None unless it finished.
        rungs: Objective at each lower fidelity that was measured.
        score: Validation score; None unless it was measured.
        predicted: Predicted rise of the objective.
        seconds: Duration of the evaluation.
        error: Message of a failed trial.
        device: The device that it ran on; empty if that is not known.
        cost: Cost by metric, in the order of `rankopt.core.records.BUDGETS`.
    """

    number: int
    state: str
    objective: float | None
    rungs: list[float]
    score: float | None
    predicted: float | None
    seconds: float
    error: str | None
    device: str
    cost: list[int]
