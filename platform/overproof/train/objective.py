"""What training minimises. An objective turns a model and a batch into a loss; trainers know nothing else of it.

Shapes: B rows, P predictions in a row, N of a batch that count, V outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from overproof.models.base import Prediction
from overproof.models.hf_directory import Batch
from overproof.train.cross_entropy import mean_cross_entropy

CHUNK_LOGITS = 1 << 24  # numbers whose log-softmax is held at once: 64 MiB
Predict = Callable[[nn.Module, Batch], Prediction]  # a task's


class Objective(Protocol):
    """Distillation, fine-tuning and classification are objectives, not trainers."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, nats per prediction, and further scalars worth a curve."""


@dataclass(frozen=True)
class CrossEntropy:
    """The labels' negative log-likelihood, averaged over the predictions that count.

    ``counted`` is a column of these, (B, P), by which the output layer is spared the others: in a conversation they are
    many, and the layer is a large part of a small model with a large vocabulary.
    """

    predict: Predict
    counted: str | None = None

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.counted is None:
            prediction = self.predict(model, batch)
        else:
            counted_BP = batch[self.counted] > 0
            with outputs_at(model, counted_BP):
                found = self.predict(model, batch)
            logits_1NV, targets_1N, mask_1N = (
                found.logits_BPV[None], found.targets_BP[counted_BP][None], found.mask_BP[counted_BP][None],
            )  # fmt: skip
            prediction = Prediction(logits_1NV, targets_1N, mask_1N)
        return mean_cross_entropy(prediction.logits_BPV, prediction.targets_BP, prediction.mask_BP), {}


@contextmanager
def outputs_at(model: Any, places_BP: Tensor) -> Iterator[None]:
    """Within the block a causal model of transformers, or an engine around it, gives the logits of these places alone:
    (N, V). By a hook of its output layer, which torch.compile would not heed.
    """

    def at_places(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        return (given[0][places_BP],)

    hook = model.get_output_embeddings().register_forward_pre_hook(at_places)
    try:
        yield
    finally:
        hook.remove()


def nll(prediction: Prediction) -> Tensor:
    """Negative log-likelihood of every target, nats, fp32: (B, P). A few rows at a time, for use without gradients."""
    logits_BPV, targets_BP = prediction.logits_BPV, prediction.targets_BP
    rows = max(1, CHUNK_LOGITS // logits_BPV[0].numel())
    parts = zip(torch.split(logits_BPV, rows), torch.split(targets_BP, rows), strict=True)
    return torch.cat([_nll(part_BPV, part_BP) for part_BPV, part_BP in parts])


def _nll(logits_BPV: Tensor, targets_BP: Tensor) -> Tensor:
    logits_NV = logits_BPV.float().flatten(0, 1)
    return cross_entropy(logits_NV, targets_BP.flatten(), reduction="none").view_as(targets_BP)
