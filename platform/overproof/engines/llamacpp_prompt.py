"""What a GGUF file says of the tokens of a prompt, in llama.cpp, whose server reports only what it generates.

Shapes: P places of a batch, each of which predicts the next token; V entries of the vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from overproof.config.base import KvCache
from overproof.engines.base import PromptScore
from overproof.engines.llamacpp_logits import LlamaCppLogits
from overproof.engines.prompt_limits import require_wanted

LEAST_ROOM = 512  # tokens


class LlamaCppPrompts:
    """Reads texts of ``positions`` tokens at most, one at a time, from the beginning each.

    The server lends its weights to nobody: the file is loaded again at the first call, which maps it into memory (what
    llama.cpp repacks for its kernels is there twice), beside keys and values for the longest text so far.
    """

    def __init__(
        self, path: Path, positions: int, threads: int, pieces: Sequence[bytes], kv_cache: KvCache = "f16"
    ) -> None:
        self._path, self._positions, self._threads, self._pieces = path, positions, threads, pieces
        self._kv_cache = kv_cache
        self._lock = threading.Lock()
        self._logits: LlamaCppLogits | None = None
        self._longest = 0

    def score(
        self, ids: Sequence[int], top: int, cancelled: threading.Event | None, first: int = 1
    ) -> list[PromptScore]:
        """The score of every token from the ``first`` of interest on, with the ``top`` likeliest at its place.

        Raises:
            InputError: llama.cpp cannot load the file a second time.
            Cancelled: it was cancelled; looked at before each batch.
        """
        tokens, scores = np.array(ids, np.int64), list[PromptScore]()
        wanted_S = np.arange(1, len(tokens)) >= first
        with self._lock:
            require_wanted(cancelled)
            for logits_PV in self._logits_for(len(tokens)).batches(tokens[:-1], wanted_S):
                scores += self._scores(logits_PV, tokens[first + len(scores) :][: len(logits_PV)], top)
                require_wanted(cancelled)
        return scores

    def _logits_for(self, length: int) -> LlamaCppLogits:
        """The model, with room for so many tokens."""
        if self._logits is None or length > self._longest:
            if self._logits is not None:
                self._logits.close()
                self._logits = None
            self._longest = min(self._positions, max(LEAST_ROOM, 1 << (length - 1).bit_length()))
            self._logits = LlamaCppLogits(self._path, self._longest, self._threads, self._kv_cache)
        return self._logits

    def close(self) -> None:
        """Free the model."""
        with self._lock:
            if self._logits is not None:
                self._logits.close()
            self._logits = None

    def _scores(self, logits_PV: NDArray[np.float32], targets_P: NDArray[np.int64], top: int) -> list[PromptScore]:
        found = list[PromptScore]()
        for logits_V, target in zip(logits_PV, targets_P, strict=True):  # row by row, which stays in a core's cache
            largest = logits_V.max()
            total = float(largest) + float(np.log(np.exp(logits_V - largest).sum(dtype=np.float64)))
            likeliest = ((int(id_), self._pieces[id_], float(logits_V[id_]) - total) for id_ in _largest(logits_V, top))
            found.append(PromptScore(float(logits_V[target]) - total, tuple(likeliest)))
        return found


def _largest(logits_V: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The places of the largest ones, in order; the first of equals."""
    if count == 0:
        return np.empty(0, np.int64)
    least = np.partition(logits_V, -count)[-count]
    candidates = np.flatnonzero(logits_V >= least)
    return candidates[np.argsort(-logits_V[candidates], kind="stable")][:count]
