"""The distillation objective: what a student learns from the teacher's outputs, cached or live.

Shapes: B rows, P predictions in a row, V outputs, K kept, D drawn, S = K + D, L temperatures of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from overproof.distill.losses import Divergence, Terms, distillation
from overproof.distill.sampled import importance, sampled_distillation
from overproof.models import Batch, Prediction, forward

LOGITS = "teacher_logits"  # of a teacher that sees the batch: (B, P, V)


@dataclass(frozen=True)
class Distill:
    """``weight * T^2 * divergence + (1 - weight) * cross-entropy``, see ``losses.distillation``."""

    temperature: float
    teacher_weight: float
    temperatures: tuple[float, ...]  # of the cache, ascending
    divergence: Divergence

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the predictions that count, in nats, and its two terms."""
        terms = self.terms(forward(model, batch), batch)
        return terms.loss, {"divergence": terms.divergence, "cross_entropy": terms.cross_entropy}

    def terms(self, prediction: Prediction, batch: Batch) -> Terms:
        """By the columns there are: logits of a live teacher; what was drawn of it; no indices if all is kept."""
        common = (self.temperature, self.teacher_weight)
        given = (prediction.logits_BPV, prediction.targets_BP, prediction.mask_BP)
        if LOGITS in batch:
            return distillation(*given, None, batch[LOGITS] / self.temperature, *common, self.divergence)
        indices_BPK, kept_BPK = batch.get("teacher_indices"), self._soften(batch, "logprobs", self.temperature)
        if indices_BPK is None or "teacher_drawn" not in batch:
            return distillation(*given, indices_BPK, kept_BPK, *common, self.divergence)
        drawn_BPD, column, drawn_BPDL = batch["teacher_drawn"], self.temperatures.index(self.temperature), None
        if len(self.temperatures) > 1:
            drawn_BPDL = torch.stack([self._soften(batch, "drawn_logprobs", t) for t in self.temperatures], -1)
        importance_BPS = importance(kept_BPK, batch["teacher_tail"], drawn_BPD.shape[-1], drawn_BPDL, column)
        indices_BPS = torch.cat([indices_BPK, drawn_BPD], -1)
        return sampled_distillation(*given, indices_BPS, importance_BPS, batch["teacher_entropy"][..., column], *common)

    def _soften(self, batch: Batch, name: str, temperature: float) -> Tensor:
        """Log-probabilities at a temperature."""
        logprobs_BPK = batch[f"teacher_{name}"]
        if temperature == 1:
            return logprobs_BPK
        column = [t for t in self.temperatures if t != 1].index(temperature)
        return logprobs_BPK / temperature - batch["teacher_logsumexp"][..., column, None]
