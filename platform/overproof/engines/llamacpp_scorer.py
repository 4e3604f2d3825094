"""What a GGUF file says of given rows of tokens, in llama.cpp: what it is judged by.

Shapes: S tokens of a row, P places in it (each predicts the token after it), V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overproof.config.base import KvCache
from overproof.engines.base import PlaceScores
from overproof.engines.llamacpp_logits import LlamaCppLogits

CHUNK_LOGITS = 1 << 18  # numbers that are worked on at a time: 1 MiB, which stays in a core's cache


class LlamaCppScorer:
    """See ``TextScorer``. A row is read by itself, as a lone request is, so its figures depend on no other row."""

    def __init__(self, path: Path, positions: int, threads: int, kv_cache: KvCache = "f16") -> None:
        """Load a file for rows of ``positions`` places at most.

        Raises:
            InputError: as ``LlamaCppLogits``.
        """
        self._logits = LlamaCppLogits(path, positions, threads, kv_cache)

    def score(self, rows: Iterable[NDArray[Any]]) -> Iterator[PlaceScores]:
        for tokens_S in rows:
            targets_P, parts, first = tokens_S[1:].astype(np.int64), list[PlaceScores](), 0
            for logits_PV in self._logits.batches(tokens_S[:-1]):
                parts.append(place_scores(logits_PV, targets_P[first : first + len(logits_PV)]))
                first += len(logits_PV)
            yield PlaceScores.joined(parts)

    def close(self) -> None:
        self._logits.close()


def place_scores(logits_PV: NDArray[np.float32], targets_P: NDArray[np.int64]) -> PlaceScores:
    """The scores of places from their logits, by a log-softmax over the vocabulary, some places at a time."""
    places, outputs = logits_PV.shape
    size = max(1, min(places, CHUNK_LOGITS // outputs))
    buffer_PV = np.empty((size, outputs), np.float32)
    choices_P = np.empty(places, np.int32)
    log_sums_P, lead_P = np.empty(places), np.empty(places)  # of exp(logit - largest); largest less target's
    for start in range(0, places, size):
        part = slice(start, min(start + size, places))
        chunk_PV, here = logits_PV[part], np.arange(part.stop - start)
        choices_P[part] = chunk_PV.argmax(1)
        largest_P = chunk_PV[here, choices_P[part]]
        powers_PV = np.subtract(chunk_PV, largest_P[:, None], out=buffer_PV[: len(here)])
        lead_P[part] = -powers_PV[here, targets_P[part]]
        log_sums_P[part] = np.log(np.exp(powers_PV, out=powers_PV).sum(1, dtype=np.float64))
    return PlaceScores(log_sums_P + lead_P, choices_P, log_sums_P)
