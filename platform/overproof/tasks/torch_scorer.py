"""What a language model says of given rows of tokens, in torch: for files whose engine tells nothing of given texts.

Shapes: B rows, S tokens of a row, P places in it (each predicts the token after it), V outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from overproof.engines.base import PlaceScores
from overproof.models.compute import CPU

WINDOW = 8  # batches sorted by length together, so that short rows are not padded to long ones


class TorchScorer:
    """See ``TextScorer``."""

    def __init__(self, model: nn.Module, batch_rows: int, device: torch.device = CPU) -> None:
        """A causal language model of transformers, in evaluation mode and on this device, that reads so many rows at
        once.
        """
        self._model, self._batch_rows, self._device = model, batch_rows, device

    def score(self, rows: Iterable[NDArray[Any]]) -> Iterator[PlaceScores]:
        remaining = iter(rows)
        while window := list(islice(remaining, self._batch_rows * WINDOW)):
            by_length = sorted(range(len(window)), key=lambda i: len(window[i]))
            found: dict[int, PlaceScores] = {}
            for first in range(0, len(window), self._batch_rows):
                batch = by_length[first : first + self._batch_rows]
                found |= zip(batch, self._score_batch([window[i] for i in batch]), strict=True)
            yield from (found[i] for i in range(len(window)))

    def _score_batch(self, rows: Sequence[NDArray[Any]]) -> Iterator[PlaceScores]:
        tokens_BS = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for tokens_S, row_S in zip(tokens_BS, rows, strict=True):
            tokens_S[: len(row_S)] = row_S
        ids_BS = torch.from_numpy(tokens_BS).to(self._device)
        with torch.inference_mode():
            logprobs_BPV = self._model(input_ids=ids_BS[:, :-1], use_cache=False).logits.log_softmax(-1)
            targets_BP = logprobs_BPV.gather(-1, ids_BS[:, 1:, None])[..., 0].double().cpu()
            largest_BP, choices_BP = (found.cpu() for found in logprobs_BPV.max(-1))
        for i, row_S in enumerate(rows):
            places = slice(0, len(row_S) - 1)
            yield PlaceScores(
                -targets_BP[i, places].numpy(),
                choices_BP[i, places].to(torch.int32).numpy(),
                -largest_BP[i, places].double().numpy(),
            )

    def close(self) -> None:
        del self._model


class TorchLogits:
    """See ``LogitsReader``."""

    def __init__(self, model: nn.Module) -> None:
        """A causal language model of transformers, in evaluation mode, on the CPU."""
        self._model = model

    def batches(self, tokens_S: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
        with torch.inference_mode():
            logits_SV = self._model(
                input_ids=torch.from_numpy(tokens_S.astype(np.int64))[None], use_cache=False
            ).logits[0]
        yield logits_SV.float().numpy()

    def close(self) -> None:
        del self._model
