"""Quality of one exported file on the test split, unit by unit. One process.

Text goes through torch over the file's own weights, dequantised, since llama.cpp reports no log-probabilities of a
prompt; the parity probe says how far the engine is from that. Images go through the serving engine itself, one at
a time, as a lone request does: int8 activations share one scale for a batch.

Shapes: B rows, S tokens, P predictions, V outputs, U units, N predictions of all units in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from overproof.data.manifest import DOCUMENTS
from overproof.data.parquet_reader import Shards
from overproof.engines.onnx_runtime import OnnxClassifier
from overproof.errors import InputError
from overproof.export.gguf import read_gguf
from overproof.files import file_sha256
from overproof.models import hf_directory

BATCH_LOGITS = 1 << 23  # numbers in one batch's logits
WINDOW = 8  # batches sorted by length together, so that short rows are not padded to long ones


@dataclass(frozen=True)
class FileScores:
    """One export on every unit of the test split, the units in ascending order of their ids.

    ``choices_N`` holds the first choice of each prediction, unit after unit; unit u has ``predictions[u]`` of them.
    """

    sha256: str  # of the file that was scored
    units: NDArray[np.int64]
    quality: NDArray[np.float64]  # nats (text) or 1 for a right answer (images)
    size: NDArray[np.int64]  # bytes (text) or 1 (images)
    predictions: NDArray[np.int64]
    choices_N: NDArray[np.int32]


def agreements(scores: FileScores, teacher: FileScores) -> NDArray[np.int64]:
    """Of each unit's predictions, how many have the teacher's first choice."""
    starts = np.cumsum(scores.predictions) - scores.predictions
    return np.add.reduceat((scores.choices_N == teacher.choices_N).astype(np.int64), starts)


def spread_units(units: NDArray[np.int64], most: int | None) -> NDArray[np.int64]:
    """All units, or ``most`` of them evenly spread."""
    if most is None or most >= len(units):
        return units
    return units[np.linspace(0, len(units) - 1, most).round().astype(np.int64)]


@dataclass(frozen=True)
class TestDocuments:
    """The rows of the chosen test documents, document after document."""

    documents: NDArray[np.int64]  # ascending
    sample_ids: NDArray[np.int64]
    places: NDArray[np.int64]  # of each row's document in ``documents``
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, root: Path, most: int | None) -> TestDocuments:
        """Of a prepared text data set."""
        shards = Shards(root, "test", columns=("document", "length"))
        if shards.rows == 0:
            raise InputError(f"{root}: the test split is empty; expected at least one document: add data")
        columns = shards.take(np.arange(shards.rows))
        found = columns["document"].astype(np.int64)
        documents = spread_units(np.unique(found), most)
        ids = np.flatnonzero(np.isin(found, documents))
        ids = ids[np.argsort(found[ids], kind="stable")]
        places = np.searchsorted(documents, found[ids])
        return cls(documents, ids, places, columns["length"][ids].astype(np.int64))


def score_text(file: Path, root: Path, most: int | None) -> FileScores:
    """Nats and first choices of a GGUF file on ``most`` documents of the test split of the data set at ``root``."""
    rows, model = TestDocuments.of(root, most), read_gguf(file)
    ends = np.cumsum(rows.lengths)
    nats = np.zeros(len(rows.documents))
    choices_N = np.empty(int(ends[-1]), np.int32)
    for here, nats_BP, choices_BP in _forward(model, Shards(root, "test"), rows):
        for row, nats_P, choices_P in zip(here, nats_BP, choices_BP, strict=True):
            length = int(rows.lengths[row])
            nats[rows.places[row]] += nats_P[:length].sum()
            choices_N[ends[row] - length : ends[row]] = choices_P[:length]
    predictions = np.bincount(rows.places, rows.lengths).astype(np.int64)
    return FileScores(
        file_sha256(file), rows.documents, nats, _size_bytes(root, rows.documents), predictions, choices_N
    )


def _forward(
    model: nn.Module, shards: Shards, rows: TestDocuments
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int32]]]:
    """Batches of (positions in ``rows``, nats_BP, choices_BP)."""
    manifest = shards.manifest
    size = max(1, BATCH_LOGITS // (manifest.positions * manifest.outputs))
    for start in range(0, len(rows.sample_ids), size * WINDOW):
        window = np.arange(start, min(start + size * WINDOW, len(rows.sample_ids)))
        window = window[np.argsort(rows.lengths[window], kind="stable")]
        columns = shards.take(rows.sample_ids[window])
        for first in range(0, len(window), size):
            part = slice(first, first + size)
            longest = int(columns["length"][part].max())
            cut = {"tokens": columns["tokens"][part, : longest + 1], "length": columns["length"][part]}
            with torch.inference_mode():
                prediction = hf_directory.forward(model, hf_directory.to_tensors(cut))
                logits_BPV = prediction.logits_BPV
                targets_BP = prediction.targets_BP
                nats_N = cross_entropy(logits_BPV.flatten(0, 1), targets_BP.flatten(), reduction="none")
                choices_BP = logits_BPV.argmax(-1)
            yield window[part], nats_N.view(targets_BP.shape).double().numpy(), choices_BP.to(torch.int32).numpy()


def _size_bytes(root: Path, documents: NDArray[np.int64]) -> NDArray[np.int64]:
    table = pq.read_table(root / DOCUMENTS, columns=["document", "size_bytes"])
    sizes: dict[Any, Any] = dict(zip(table["document"].to_pylist(), table["size_bytes"].to_pylist(), strict=True))
    return np.array([sizes[int(document)] for document in documents], np.int64)


def score_images(file: Path, root: Path, most: int | None) -> FileScores:
    """Right answers and first choices of an ONNX file on ``most`` images of the test split."""
    shards = Shards(root, "test")
    units = spread_units(np.arange(shards.rows), most)
    columns = shards.take(units)
    engine = OnnxClassifier(file, threads=1)
    choices_N = np.array([int(engine.classify(p[None]).argmax()) for p in columns["pixels"]], np.int32)
    engine.close()
    ones = np.ones(len(units), np.int64)
    return FileScores(
        file_sha256(file), units, (choices_N == columns["label"]).astype(np.float64), ones, ones, choices_N
    )
