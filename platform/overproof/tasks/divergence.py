"""How far the probabilities of a compressed file are from the teacher's: the Kullback-Leibler divergence, in nats, with
both files in the engine that serves. It tells of all outputs, where quality tells of the right one.

Shapes: B rows, S tokens, P places, V outputs, D numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from overproof.config import Evaluate
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.engines.base import ArrayEngine, EngineSettings, LogitsReader
from overproof.engines.probe import Say
from overproof.registry import ENGINES
from overproof.tasks.array_evaluation import flat
from overproof.tasks.base import DIVERGENCE, Metric, spread_units
from overproof.tasks.text_evaluation import TestDocuments, open_logits, test_rows

if TYPE_CHECKING:
    from overproof.export.base import Format

TOKENS = 1024  # of test rows, about, that both files read
ROWS = 256  # of arrays

Floats = NDArray[np.float32]


def of_distributions(teacher_BV: Floats, found_BV: Floats) -> Floats:
    """Of each row (B), from log-probabilities."""
    nats_B: Floats = (np.exp(teacher_BV) * (teacher_BV - found_BV)).sum(1)
    return nats_B


def of_labels(teacher_BV: Floats, found_BV: Floats) -> Floats:
    """Of each row (B), the sum over V outputs that are each there or not, from log-probabilities of being there."""
    there_BV, absent_BV = np.exp(teacher_BV), -np.expm1(teacher_BV)
    tiny = np.finfo(np.float32).tiny
    absent_nats_BV = np.log(np.maximum(absent_BV, tiny)) - np.log(np.maximum(-np.expm1(found_BV), tiny))
    nats_B: Floats = (there_BV * (teacher_BV - found_BV) + absent_BV * absent_nats_BV).sum(1)
    return nats_B


def array_divergence(
    file: Path, teacher: Path, root: Path, settings: Evaluate, engine: str, column: str,
    divergences: Callable[[Floats, Floats], Floats], say: Say,
) -> dict[str, Metric]:  # fmt: skip
    """Of rows of one array each, asked one at a time; ``divergences`` is of_distributions or of_labels."""
    shards = Shards(root, "test", Manifest.read(root).batch_columns)
    rows_BD = flat(shards.take(spread_units(np.arange(shards.rows), ROWS))[column])
    found = list[Floats]()
    for path in (teacher, file):
        say(f"probabilities of {path.name}")
        loaded = ENGINES[engine].load(path, EngineSettings(threads=settings.threads))
        assert isinstance(loaded, ArrayEngine)
        with closing(loaded):
            found.append(np.concatenate([loaded.logprobs(row_D[None]) for row_D in rows_BD]))
    nats_B = divergences(*found)
    return {DIVERGENCE: Metric(value=float(nats_B.mean()), unit="nats", n=len(nats_B))}


def text_divergence(
    file: Path, teacher: LogitsReader, root: Path, settings: Evaluate, engine: str, format: Format,
    counted: str | None, say: Say,
) -> dict[str, Metric]:  # fmt: skip
    """Of every prediction that counts in some test rows, which the file and the teacher read side by side; the latter
    is closed then.
    """
    documents, positions = TestDocuments.of(root, settings.max_documents), Manifest.read(root).positions
    most = max(1, round(TOKENS / float(documents.lengths.mean())))
    picked = spread_units(documents.sample_ids, most)
    total, places = 0.0, 0
    with ExitStack() as opened:
        opened.enter_context(closing(teacher))
        own = opened.enter_context(closing(open_logits(file, positions, settings, engine, format)))
        for number, (tokens_S, counts_P) in enumerate(test_rows(Shards(root, "test"), picked, counted), start=1):
            say(f"probabilities beside the teacher's, row {number} of {len(picked)}")
            read = (reader.batches(tokens_S[:-1]) for reader in (teacher, own))
            nats_P = np.concatenate(list(_row_divergences(*read)))
            total += float(nats_P[counts_P].sum())
            places += int(counts_P.sum())
    return {DIVERGENCE: Metric(value=total / places, unit="nats", n=places)} if places else {}


def _row_divergences(teacher: Iterator[Floats], found: Iterator[Floats]) -> Iterator[NDArray[Any]]:
    for teacher_PV, found_PV in zip(teacher, found, strict=True):
        yield of_distributions(_log_softmax(teacher_PV), _log_softmax(found_PV))


def _log_softmax(logits_PV: Floats) -> Floats:
    shifted_PV = logits_PV - logits_PV.max(1, keepdims=True)
    log_sums_P = np.log(np.exp(shifted_PV).sum(1, dtype=np.float64))
    result_PV: Floats = (shifted_PV - log_sums_P[:, None]).astype(np.float32)
    return result_PV
