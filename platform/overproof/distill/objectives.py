"""Objectives of distillation: from cached outputs, from a live teacher, and from what the student wrote itself.

Shapes: B rows, P predictions in a row, V outputs, K kept, D drawn, S = K + D, L temperatures of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overproof.config import AttentionRelationLoss, HiddenStateLoss
from overproof.distill.feature_losses import capture_layers, relation_loss, state_loss
from overproof.distill.losses import Divergence, LossTerms, distillation_loss
from overproof.distill.sampled_loss import importance_weights, sampled_distillation_loss
from overproof.models.base import Prediction
from overproof.models.hf_directory import Batch
from overproof.tasks.base import Task
from overproof.train.objective import Objective, Predict

TEACHER_LOGITS = "teacher_logits"  # of a teacher that sees the batch: (B, P, V)


@dataclass(frozen=True)
class DistillObjective:
    """``weight * T^2 * divergence + (1 - weight) * cross-entropy``, see ``losses.distillation_loss``."""

    predict: Predict
    temperature: float
    teacher_weight: float
    temperatures: tuple[float, ...]  # of the cache, ascending
    divergence: Divergence

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the predictions that count, in nats, and its two terms."""
        terms = self.terms(self.predict(model, batch), batch)
        return terms.loss, {"divergence": terms.divergence, "cross_entropy": terms.cross_entropy}

    def terms(self, prediction: Prediction, batch: Batch) -> LossTerms:
        """By the batch: logits of a live teacher, or cached targets, with or without draws, or of every output."""
        common = (self.temperature, self.teacher_weight)
        given = (prediction.logits_BPV, prediction.targets_BP, prediction.mask_BP)
        if TEACHER_LOGITS in batch:
            return distillation_loss(*given, None, batch[TEACHER_LOGITS] / self.temperature, *common, self.divergence)
        indices_BPK, kept_BPK = batch.get("teacher_indices"), self._soften(batch, "logprobs", self.temperature)
        if indices_BPK is None or "teacher_drawn" not in batch:
            return distillation_loss(*given, indices_BPK, kept_BPK, *common, self.divergence)
        drawn_BPD, column, drawn_BPDL = batch["teacher_drawn"], self.temperatures.index(self.temperature), None
        if len(self.temperatures) > 1:
            drawn_BPDL = torch.stack([self._soften(batch, "drawn_logprobs", t) for t in self.temperatures], -1)
        importance_BPS = importance_weights(kept_BPK, batch["teacher_tail"], drawn_BPD.shape[-1], drawn_BPDL, column)
        indices_BPS = torch.cat([indices_BPK, drawn_BPD], -1)
        return sampled_distillation_loss(
            *given, indices_BPS, importance_BPS, batch["teacher_entropy"][..., column], *common
        )

    def _soften(self, batch: Batch, name: str, temperature: float) -> Tensor:
        """Log-probabilities at a temperature."""
        logprobs_BPK = batch[f"teacher_{name}"]
        if temperature == 1:
            return logprobs_BPK
        column = [t for t in self.temperatures if t != 1].index(temperature)
        return logprobs_BPK / temperature - batch["teacher_logsumexp"][..., column, None]


ON_POLICY = "on_policy"  # column of batches that the student wrote


@dataclass(frozen=True)
class OnPolicyObjective:
    """Another objective; but of rows that the student wrote, the divergence alone (arXiv 2306.13649).

    Of these the batch holds the teacher's scores of the last G tokens, those that were generated.
    """

    inner: Objective
    generated: DistillObjective

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the predictions that count, or over the generated tokens; nats."""
        if ON_POLICY not in batch:
            return self.inner.loss(model, batch)
        row, count = self.generated.predict(model, batch), batch["teacher_logprobs"].shape[1]
        generated = Prediction(row.logits_BPV[:, -count:], row.targets_BP[:, -count:], row.mask_BP[:, -count:])
        terms = self.generated.terms(generated, batch)
        return terms.loss, {"divergence": terms.divergence, "on_policy": torch.ones_like(terms.loss)}


@dataclass(frozen=True)
class LiveTeacherObjective:
    """Another objective, with a live teacher on the same rows; ``use_logits`` adds its logits to the batch.

    ``relations`` and ``states`` draw the student's last layer to one of the teacher's; ``projection`` takes the
    student's states to the teacher's width.
    """

    task: Task
    teacher: PreTrainedModel
    inner: Objective
    use_logits: bool
    relations: AttentionRelationLoss | None = None
    states: HiddenStateLoss | None = None
    projection: nn.Linear | None = None

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The inner loss plus the weighted feature losses, each also a scalar of its own."""
        assert isinstance(model, PreTrainedModel)
        features = [feature for feature in (self.relations, self.states) if feature]
        teacher_layers = {layer_index(self.teacher, feature.teacher_layer) for feature in features}
        with (
            torch.no_grad(),
            capture_layers(self.teacher, teacher_layers) as teacher_outputs,
        ):
            logits_BPV = self.task.predict(self.teacher, batch).logits_BPV
        with capture_layers(model, {layer_index(model)} if features else ()) as student_outputs:
            if self.use_logits and ON_POLICY not in batch:
                batch = batch | {TEACHER_LOGITS: logits_BPV}
            loss, scalars = self.inner.loss(model, batch)
        if not features:
            return loss, scalars
        student = student_outputs[layer_index(model)]
        segments_BP = self.task.segments(batch, student.states)
        if self.relations:
            teacher = teacher_outputs[layer_index(self.teacher, self.relations.teacher_layer)]
            feature_loss = relation_loss(student, teacher, self.relations.heads, segments_BP)
            loss, scalars = loss + self.relations.weight * feature_loss, scalars | {"relations": feature_loss.detach()}
        if self.states:
            assert self.projection is not None
            teacher = teacher_outputs[layer_index(self.teacher, self.states.teacher_layer)]
            feature_loss = state_loss(self.projection(student.states), teacher.states, segments_BP > 0)
            loss, scalars = loss + self.states.weight * feature_loss, scalars | {"states": feature_loss.detach()}
        return loss, scalars


def layer_index(model: PreTrainedModel, layer: int | None = None) -> int:
    """The layer's number, or the last one's."""
    return int(model.config.num_hidden_layers) - 1 if layer is None else layer
