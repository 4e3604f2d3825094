"""The distillation loss from some of the teacher's outputs and draws from the others: forward KL, without bias.

Shapes: B rows, P predictions in a row, C of the N = B * P, V outputs, K kept, D drawn, S = K + D, L temperatures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from overproof.distill.losses import LossTerms, loss_in_one_pass, prediction_weights
from overproof.train.cross_entropy import softmax_logsumexp


def importance_weights(kept_BPK: Tensor, tail_BP: Tensor, draws: int, drawn_BPDL: Tensor | None, column: int) -> Tensor:
    """What each output stands for at a temperature T, (B, P, S): in the mean, p_T for every one of the V.

    A kept one stands for itself; ``kept_BPK`` are log-probabilities at T. A drawn one stands for p_T / q times 1 / D
    of the mass ``tail_BP`` (its logarithm) that was drawn from. There q is the mean of the distributions at the L
    temperatures, ``drawn_BPDL`` their log-probabilities, None where they are the one from which was drawn.
    """
    each_BP1 = (tail_BP - math.log(draws)).exp()[..., None]
    if drawn_BPDL is None:
        drawn_BPD = each_BP1.expand(*tail_BP.shape, draws)
    else:
        log_q_BPD = torch.logsumexp(drawn_BPDL, -1) - math.log(drawn_BPDL.shape[-1])
        # A tail of nothing is drawn from as well, for nothing.
        drawn_BPD = torch.where(each_BP1 > 0, each_BP1 * (drawn_BPDL[..., column] - log_q_BPD).exp(), 0.0)
    return torch.cat([kept_BPK.exp(), drawn_BPD], -1)


def sampled_distillation_loss(
    logits_BPV: Tensor,
    targets_BP: Tensor,
    mask_BP: Tensor,
    indices_BPS: Tensor,
    importance_BPS: Tensor,
    entropy_BP: Tensor,
    temperature: float,
    teacher_weight: float,
) -> LossTerms:
    """As ``losses.distillation_loss`` with forward KL over all V outputs; loss and gradient are right in the mean.

    ``entropy_BP`` is the teacher's at T, nats. An output whose importance is 0 contributes nothing.
    """
    weight_N, targets_N1 = prediction_weights(mask_BP, logits_BPV.dtype), targets_BP.reshape(-1, 1)
    indices_NS, importance_NS, entropy_N = indices_BPS.flatten(0, 1), importance_BPS.flatten(0, 1), entropy_BP.flatten()

    def part(here: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        drawn = (indices_NS[here], importance_NS[here].to(weight_N.dtype), entropy_N[here].to(weight_N.dtype))
        return _chunk(logits_CV, targets_N1[here], weight_N[here], *drawn, temperature, teacher_weight)

    return loss_in_one_pass(logits_BPV, weight_N.dtype, part, temperature, teacher_weight)


def _chunk(
    logits_CV: Tensor,
    targets_C1: Tensor,
    weight_C: Tensor,
    indices_CS: Tensor,
    importance_CS: Tensor,
    entropy_C: Tensor,
    temperature: float,
    teacher_weight: float,
) -> tuple[Tensor, Tensor]:
    """The ``ChunkFunction`` of C predictions.

    The divergence is ``-sum(w_i * log p_i)`` less the entropy, with w the importances and p the student at T. Its
    gradient by the logits, ``(p * sum(w) - w) / T``, sums to 0 as that of forward KL does, whatever sum(w) is.
    """
    label_weight_C1 = ((1 - teacher_weight) * weight_C)[:, None]
    kl_weight_C1 = (teacher_weight * temperature * weight_C)[:, None]  # T^2, and 1 / T from the derivative
    softened_CV = logits_CV if temperature == 1 else logits_CV / temperature
    student_CV, logsumexp_C1 = softmax_logsumexp(softened_CV)
    surprise_CS = logsumexp_C1 - softened_CV.gather(1, indices_CS)
    divergence_C = torch.where(importance_CS > 0, importance_CS * surprise_CS, 0.0).sum(1) - entropy_C
    scale_C1 = importance_CS.sum(1, keepdim=True) * kl_weight_C1
    if temperature == 1:
        plain_logsumexp_C1 = logsumexp_C1
        gradient_CV = student_CV.mul_(scale_C1 + label_weight_C1)
    else:
        plain_CV, plain_logsumexp_C1 = softmax_logsumexp(logits_CV)
        gradient_CV = student_CV.mul_(scale_C1).addcmul_(plain_CV, label_weight_C1)
    gradient_CV.scatter_add_(1, indices_CS, -kl_weight_C1 * importance_CS)
    gradient_CV.scatter_add_(1, targets_C1, -label_weight_C1)
    cross_entropy_C = (plain_logsumexp_C1 - logits_CV.gather(1, targets_C1))[:, 0]
    return gradient_CV, torch.stack([divergence_C @ weight_C, cross_entropy_C @ weight_C])
