"""The distillation loss from outputs that were drawn from the teacher: forward KL, without bias.

Shapes: B rows, P predictions in a row, C of the N = B * P, V outputs, K slots of drawn outputs, L temperatures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from overproof.distill.losses import Terms, one_pass, softmax, weights


def importance(counts_BPK: Tensor, logprobs_BPKL: Tensor, column: int) -> Tensor:
    """What each drawn output stands for at a temperature: count / draws * p_T / q, whose mean is p_T.

    ``logprobs_BPKL`` are the teacher's at all L temperatures of the cache, and q is the mean of those distributions,
    from which `keep` draws. They do not sum to 1, unless L is 1: to make them would bias them.
    """
    log_q_BPK = torch.logsumexp(logprobs_BPKL, -1) - math.log(logprobs_BPKL.shape[-1])
    draws_BP1 = counts_BPK.sum(-1, keepdim=True)
    return counts_BPK / draws_BP1 * (logprobs_BPKL[..., column] - log_q_BPK).exp()


def sampled_distillation(
    logits_BPV: Tensor,
    targets_BP: Tensor,
    mask_BP: Tensor,
    indices_BPK: Tensor,
    teacher_BPK: Tensor,
    importance_BPK: Tensor,
    temperature: float,
    teacher_weight: float,
) -> Terms:
    """As ``losses.distillation`` with forward KL over all V outputs, whose loss and gradient are right in the mean.

    ``teacher_BPK`` are log-probabilities at T. A slot whose importance is 0 contributes nothing, whatever it holds.
    """
    weight_N, targets_N1 = weights(mask_BP, logits_BPV.dtype), targets_BP.reshape(-1, 1)
    indices_NK, teacher_NK = indices_BPK.flatten(0, 1), teacher_BPK.flatten(0, 1)
    importance_NK = importance_BPK.flatten(0, 1)

    def part(here: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        drawn = (indices_NK[here], teacher_NK[here].to(weight_N.dtype), importance_NK[here].to(weight_N.dtype))
        return _chunk(logits_CV, targets_N1[here], weight_N[here], *drawn, temperature, teacher_weight)

    return one_pass(logits_BPV, weight_N.dtype, part, temperature, teacher_weight)


def _chunk(
    logits_CV: Tensor,
    targets_C1: Tensor,
    weight_C: Tensor,
    indices_CK: Tensor,
    teacher_CK: Tensor,
    importance_CK: Tensor,
    temperature: float,
    teacher_weight: float,
) -> tuple[Tensor, Tensor]:
    """The ``Part`` of C predictions.

    The divergence is sum(w_i * (log q_i - log p_i)) with w the importances, q the teacher and p the student at T. Its
    gradient by the logits, ``(p * sum(w) - w) / T``, sums to 0 as that of forward KL does, whatever sum(w) is.
    """
    label_weight_C1 = ((1 - teacher_weight) * weight_C)[:, None]
    kl_weight_C1 = (teacher_weight * temperature * weight_C)[:, None]  # T^2, and 1 / T from the derivative
    softened_CV = logits_CV if temperature == 1 else logits_CV / temperature
    student_CV, logsumexp_C1 = softmax(softened_CV)
    apart_CK = teacher_CK - softened_CV.gather(1, indices_CK) + logsumexp_C1
    divergence_C = torch.where(importance_CK > 0, importance_CK * apart_CK, 0.0).sum(1)
    scale_C1 = importance_CK.sum(1, keepdim=True) * kl_weight_C1
    if temperature == 1:
        plain_logsumexp_C1 = logsumexp_C1
        gradient_CV = student_CV.mul_(scale_C1 + label_weight_C1)
    else:
        plain_CV, plain_logsumexp_C1 = softmax(logits_CV)
        gradient_CV = student_CV.mul_(scale_C1).addcmul_(plain_CV, label_weight_C1)
    gradient_CV.scatter_add_(1, indices_CK, -kl_weight_C1 * importance_CK)
    gradient_CV.scatter_add_(1, targets_C1, -label_weight_C1)
    cross_entropy_C = (plain_logsumexp_C1 - logits_CV.gather(1, targets_C1))[:, 0]
    return gradient_CV, torch.stack([divergence_C @ weight_C, cross_entropy_C @ weight_C])
