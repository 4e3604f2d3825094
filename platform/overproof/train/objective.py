"""What training minimises. An objective turns a model and a batch into a loss; trainers know nothing else of it.

Shapes: B rows, P predictions in a row, V outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from overproof.models.base import Prediction
from overproof.models.hf_directory import Batch

Predict = Callable[[nn.Module, Batch], Prediction]  # a task's


class Objective(Protocol):
    """Distillation, fine-tuning and classification are objectives, not trainers."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, nats per prediction, and further scalars worth a curve."""


@dataclass(frozen=True)
class CrossEntropy:
    """The labels' negative log-likelihood, averaged over the predictions that count."""

    predict: Predict

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        prediction = self.predict(model, batch)
        return masked_mean(nll(prediction), prediction.mask_BP), {}


def nll(prediction: Prediction) -> Tensor:
    """Negative log-likelihood of every target, nats, fp32: (B, P)."""
    logits_NV = prediction.logits_BPV.float().flatten(0, 1)
    targets_N = prediction.targets_BP.flatten()
    return cross_entropy(logits_NV, targets_N, reduction="none").view_as(prediction.targets_BP)


def masked_mean(values_BP: Tensor, mask_BP: Tensor) -> Tensor:
    """Mean of the values whose mask is set, each times its mask; see ``Prediction``."""
    return (values_BP * mask_BP).sum() / (mask_BP > 0).sum()
