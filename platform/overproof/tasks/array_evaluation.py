"""Models that take one array a row on the test split: quality, speed, memory and parity, all in the engine.

Rows are asked one at a time, as a lone request is: int8 activations share one scale for a batch. Parity is held against
what the file means, run operator by operator and integers included, so only float rounding remains.

Shapes: B rows, D numbers in a row, V outputs, U test units, P predictions of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from overproof.config import Evaluate
from overproof.data.manifest import CLUSTER, Manifest
from overproof.data.parquet_reader import Columns, Shards
from overproof.engines import probe
from overproof.engines.base import ArrayEngine, EngineSettings
from overproof.engines.probe import Say
from overproof.engines.probe_messages import ArrayRequest
from overproof.files import file_sha256
from overproof.registry import ENGINES
from overproof.tasks.base import FileScores, Metric, ScoringTime, Tell, UnitColumns, cost_metrics, spread_units
from overproof.tasks.class_metrics import class_columns

TIMED_AT_LEAST = 300  # a row is quick, and its latency is cheap to know well
TIMED_ROWS = 256  # asked in turn: rows of texts differ in length, and take as long


@dataclass(frozen=True)
class Judged:
    """Of each unit: what ``QualityMetric`` adds up, P choices, and what further metrics are made from."""

    total: NDArray[np.float64]
    choices_UP: NDArray[np.int32]
    columns: UnitColumns = field(default_factory=dict)
    size: NDArray[np.int64] | None = None  # what ``QualityMetric`` divides by; None for units of size 1


Judge = Callable[[NDArray[np.float32], Columns], Judged]  # of log-probabilities (U, V) and the columns of the rows


def array_units(root: Path, most: int | None) -> NDArray[np.int64]:
    """The test rows, which were permuted when they were split: all, or ``most`` evenly spread."""
    return spread_units(np.arange(Shards(root, "test").rows), most)


def row_clusters(root: Path, units: NDArray[np.int64]) -> NDArray[np.int64]:
    """See ``Task.clusters``: each row by itself, where near-copies were not looked for, or rows have no words."""
    if all(column.name != CLUSTER for column in Manifest.read(root).columns):
        return units
    return Shards(root, "test", (CLUSTER,)).take(units)[CLUSTER].astype(np.int64)


def score_arrays(
    file: Path, root: Path, units: NDArray[np.int64], engine: str, column: str, judge: Judge, tell: Tell,
    further: Sequence[str] = (), score_s: float | None = None,
) -> FileScores:  # fmt: skip
    """A file on these test rows, or the first that ``score_s`` seconds allow, in the engine that will serve it;
    ``judge`` gets ``further`` columns.
    """
    limit = ScoringTime(score_s)
    shards = Shards(root, "test", (*Manifest.read(root).batch_columns, *further))
    columns = shards.take(units)
    loaded = ENGINES[engine].load(file, EngineSettings())
    assert isinstance(loaded, ArrayEngine)
    logprobs = list[NDArray[np.float32]]()
    for row_D in flat(columns[column]):
        tell(len(logprobs))
        logprobs.append(loaded.logprobs(row_D[None]))
        if limit.is_over(len(logprobs)):
            break
    loaded.close()
    done = len(logprobs)
    judged = judge(np.concatenate(logprobs), {name: values[:done] for name, values in columns.items()})
    ones = np.ones(done, np.int64)
    size, predictions = ones if judged.size is None else judged.size, ones * judged.choices_UP.shape[1]
    choices_N = judged.choices_UP.ravel()
    return FileScores(file_sha256(file), units[:done], judged.total, size, predictions, choices_N, judged.columns)


def first_choices(logprobs_UV: NDArray[np.float32], columns: Columns) -> Judged:
    """A ``Judge``: 1 for a right answer, by the column ``label``."""
    choices_U = logprobs_UV.argmax(1).astype(np.int32)
    right_U = (choices_U == columns["label"]).astype(np.float64)
    return Judged(right_U, choices_U[:, None], class_columns(logprobs_UV, columns["label"]))


def measure_arrays(
    file: Path, root: Path, settings: Evaluate, engine: str, column: str,
    reference: Callable[[NDArray[np.float32]], NDArray[np.float32]], speed: str, unit: str, say: Say,
) -> dict[str, Metric]:  # fmt: skip
    """Speed, memory and parity of an engine on test rows; ``speed`` names the metric of ``unit`` a second."""
    shards = Shards(root, "test")
    rows_BD, timed_BD = (
        flat(shards.take(spread_units(np.arange(shards.rows), count))[column])
        for count in (settings.probe_prompts, TIMED_ROWS)
    )
    request = ArrayRequest(
        engine=engine,
        file=str(file),
        threads=settings.threads,
        rows=_plain(rows_BD),
        timed_rows=_plain(timed_BD),
        timed_requests=max(settings.timed_requests, TIMED_AT_LEAST),
        probe_s=settings.probe_s,
        narrow=settings.narrow,
        fewest_requests=settings.fewest_requests,
    )
    answer = probe.probe_arrays(request, say)
    expected = []
    for number, row_D in enumerate(rows_BD, start=1):  # one at a time, as they were asked
        say(f"parity, row {number} of {len(rows_BD)}")
        expected.append(reference(row_D[None]))
    reference_BV = np.concatenate(expected)
    nats = array_parity_nats(reference_BV, np.array(answer.logprobs, np.float32))
    return cost_metrics(answer, request.timed_requests, settings.confidence) | {
        speed: Metric(value=1 / median(answer.latency_s), unit=f"{unit}/s", n=len(answer.latency_s)),
        "parity_nats": Metric(value=nats, unit="nats", n=len(rows_BD)),
    }


def _plain(rows_BD: NDArray[np.float32]) -> list[list[float | None]]:
    return [[None if math.isnan(x) else x for x in row] for row in rows_BD.tolist()]


def array_parity_nats(reference_BV: NDArray[np.float32], engine_BV: NDArray[np.float32]) -> float:
    """The largest difference of any output's log-probability, in nats."""
    return float(np.abs(reference_BV - engine_BV).max())


def flat(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows with their numbers one after the other: (B, D)."""
    return values.reshape(len(values), -1)
