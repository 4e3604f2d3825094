"""What students minimise beside a cache: what they wrote themselves, and what a live teacher shows.

Shapes: B rows, P predictions or places in a row, G generated tokens, D width of states, V outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overproof.distill.objective import LOGITS, Distill
from overproof.distill.relations import relation_loss, shown, state_loss
from overproof.models import Batch, Prediction, forward
from overproof.recipe import Relations, States
from overproof.train.objective import Objective

WRITTEN = "written"  # column of batches that the student wrote


@dataclass(frozen=True)
class Written:
    """Another objective; but of rows that the student wrote, the divergence alone (arXiv 2306.13649).

    Of these the batch holds what the teacher tells of the last G tokens, those that were generated.
    """

    inner: Objective
    judged: Distill

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the predictions that count, or over the generated tokens; nats."""
        if WRITTEN not in batch:
            return self.inner.loss(model, batch)
        whole, count = forward(model, batch), batch["teacher_logprobs"].shape[1]
        generated = Prediction(whole.logits_BPV[:, -count:], whole.targets_BP[:, -count:], whole.mask_BP[:, -count:])
        terms = self.judged.terms(generated, batch)
        return terms.loss, {"divergence": terms.divergence, "on_policy": torch.ones(())}


@dataclass(frozen=True)
class WithTeacher:
    """Another objective, while a live teacher looks at the same rows; ``outputs`` adds its logits to the batch.

    ``relations`` and ``states`` draw the student's last layer to one of the teacher's; ``projection`` takes the
    student's states to the teacher's width.
    """

    teacher: PreTrainedModel
    inner: Objective
    outputs: bool
    relations: Relations | None = None
    states: States | None = None
    projection: nn.Linear | None = None

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The inner loss and the weighted others; each is a scalar beside the inner ones."""
        assert isinstance(model, PreTrainedModel)
        asked = [part for part in (self.relations, self.states) if part]
        with torch.no_grad(), shown(self.teacher, {last(self.teacher, part.teacher_layer) for part in asked}) as theirs:
            logits_BPV = forward(self.teacher, batch).logits_BPV
        with shown(model, {last(model)} if asked else ()) as ours:
            seen = batch | {LOGITS: logits_BPV} if self.outputs and WRITTEN not in batch else batch
            loss, scalars = self.inner.loss(model, seen)
        if not asked:
            return loss, scalars
        student = ours[last(model)]
        mask_BP = _places(batch, student.states)
        if self.relations:
            teacher = theirs[last(self.teacher, self.relations.teacher_layer)]
            far = relation_loss(student, teacher, self.relations.heads, mask_BP)
            loss, scalars = loss + self.relations.weight * far, scalars | {"relations": far.detach()}
        if self.states:
            assert self.projection is not None
            teacher = theirs[last(self.teacher, self.states.teacher_layer)]
            far = state_loss(self.projection(student.states), teacher.states, mask_BP)
            loss, scalars = loss + self.states.weight * far, scalars | {"states": far.detach()}
        return loss, scalars


def last(model: PreTrainedModel, layer: int | None = None) -> int:
    """The layer's number, or the last one's."""
    return int(model.config.num_hidden_layers) - 1 if layer is None else layer


def _places(batch: Batch, states_BPD: Tensor) -> Tensor:
    """Which places hold something: (B, P)."""
    places_P = torch.arange(states_BPD.shape[1], device=states_BPD.device)
    if "tokens" in batch:
        return places_P < batch["length"][:, None]
    return torch.ones(states_BPD.shape[:2], dtype=torch.bool, device=states_BPD.device)
