"""The distillation loss: divergence from the teacher's top k and one bucket for the rest, plus cross-entropy.

Shapes: B rows, P predictions in a row, C of the N = B * P, V outputs, K kept by the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from overproof.train.cross_entropy import logit_chunks, softmax_logsumexp

MIN_LOGPROB = -1e5  # of the teacher, where its own is infinitely small


# Of the predictions in a slice, whose logits are given: the gradient of their share of the loss by these logits, and
# their weighted sums of the divergence, not yet times T^2, and of the cross-entropy.
ChunkFunction = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


class LossTerms(NamedTuple):
    """Scalars; only ``loss`` has a gradient."""

    loss: Tensor
    divergence: Tensor  # times T^2, nats per prediction
    cross_entropy: Tensor  # nats per prediction


@dataclass(frozen=True)
class Divergence:
    """How far a student's distribution p is from the teacher's q, in nats.

    ``forward_kl`` is KL(q || p), which covers all that the teacher does; ``reverse_kl`` is KL(p || q), which keeps to
    what it does most (arXiv 2306.08543); ``jsd`` is beta * KL(q || m) + (1 - beta) * KL(p || m) with
    m = beta * q + (1 - beta) * p (arXiv 2306.13649).
    """

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = 0.5

    def parts(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Of each outcome: its part of the divergence, and p times the derivative by p, up to a constant times p."""
        p, q = log_p.exp(), log_q.exp()
        if self.kind == "forward_kl":
            return torch.where(q > 0, q * (log_q - log_p), 0.0), -q
        log_q = log_q.clamp(min=MIN_LOGPROB)
        if self.kind == "reverse_kl":
            part = torch.where(p > 0, p * (log_p - log_q), 0.0)
            return part, part
        log_m = torch.logaddexp(log_q + math.log(self.beta), log_p + math.log(1 - self.beta))
        part = (1 - self.beta) * torch.where(p > 0, p * (log_p - log_m), 0.0)
        return self.beta * q * (log_q - log_m) + part, part


def distillation_loss(
    logits_BPV: Tensor,
    targets_BP: Tensor,
    mask_BP: Tensor,
    indices_BPK: Tensor | None,
    teacher_BPK: Tensor,
    temperature: float,
    teacher_weight: float,
    divergence: Divergence = Divergence(),
) -> LossTerms:
    """``teacher_weight * T^2 * divergence + (1 - teacher_weight) * cross-entropy`` (arXiv 1503.02531).

    The mean over the predictions that count. The divergence is over K + 1 buckets at temperature T: the K outputs
    kept of the teacher, and one that holds the rest of both distributions. It is a lower bound of the divergence over
    V outputs, and equal to it where K is V. ``teacher_BPK`` are log-probabilities at T and take no gradient. Without
    indices they are of every output in order, up to a constant.
    """
    weight_N, targets_N1 = prediction_weights(mask_BP, logits_BPV.dtype), targets_BP.reshape(-1, 1)
    indices_NK = None if indices_BPK is None else indices_BPK.flatten(0, 1)
    teacher_NK = teacher_BPK.flatten(0, 1)
    whole = teacher_BPK.shape[-1] == logits_BPV.shape[-1]

    def part(here: slice, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        return _chunk(
            logits_CV,
            targets_N1[here],
            weight_N[here],
            None if indices_NK is None else indices_NK[here],
            _normalise(teacher_NK[here].to(weight_N.dtype), whole),
            temperature,
            teacher_weight,
            divergence,
        )

    return loss_in_one_pass(logits_BPV, weight_N.dtype, part, temperature, teacher_weight)


def prediction_weights(mask_BP: Tensor, dtype: torch.dtype) -> Tensor:
    """Each prediction's share of the mean, (N), in the precision to work in: single at least."""
    counted_N = mask_BP.flatten().to(torch.promote_types(dtype, torch.float32))
    return counted_N / (counted_N > 0).sum().clamp(min=1)


def loss_in_one_pass(
    logits_BPV: Tensor, dtype: torch.dtype, part: ChunkFunction, temperature: float, teacher_weight: float
) -> LossTerms:
    """The loss and its gradient from one pass over the logits, which stay in the processor's cache."""
    logits_NV = logits_BPV.flatten(0, 1)
    return LossTerms(*_LossInOnePass.apply(logits_NV, dtype, part, temperature, teacher_weight))  # type: ignore[no-untyped-call]


class _LossInOnePass(torch.autograd.Function):
    """Backward may run once."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, dtype: torch.dtype, part: ChunkFunction, temperature: float, teacher_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient_NV = torch.empty_like(logits_NV)
        sums = torch.zeros(2, dtype=dtype, device=logits_NV.device)
        for here in logit_chunks(logits_NV):
            gradient_NV[here], terms = part(here, logits_NV[here].to(dtype))
            sums += terms
        divergence, cross_entropy = sums[0] * temperature**2, sums[1]
        ctx.save_for_backward(gradient_NV)
        ctx.mark_non_differentiable(divergence, cross_entropy)
        loss = teacher_weight * divergence + (1 - teacher_weight) * cross_entropy
        return loss, divergence, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.mul_(scale), None, None, None, None


def _normalise(teacher_CK: Tensor, whole: bool) -> Tensor:
    """Undo the rounding of cached values where they sum to more than 1, or ought to sum to 1."""
    excess_C1 = torch.logsumexp(teacher_CK, -1, keepdim=True)
    return teacher_CK - (excess_C1 if whole else excess_C1.clamp(min=0))


def _chunk(
    logits_CV: Tensor,
    targets_C1: Tensor,
    weight_C: Tensor,
    indices_CK: Tensor | None,
    teacher_CK: Tensor,
    temperature: float,
    teacher_weight: float,
    divergence: Divergence,
) -> tuple[Tensor, Tensor]:
    """The ``ChunkFunction`` of C predictions.

    With p the student's distribution at T over buckets and s_i = p_i * dD/dp_i, the gradient of the divergence D by a
    logit of bucket i is ``(s_i - p_i * sum(s)) / T``, shared in the bucket of the rest by each output's part of it (for
    the forward divergence ``(p_i - q_i) / T``). The mass p_rest is summed from its parts: 1 minus the mass of the K
    would round to 0 long before it is 0.
    """
    label_weight_C = (1 - teacher_weight) * weight_C
    kl_weight_C = teacher_weight * temperature * weight_C  # T^2, and 1 / T from the derivative
    softened_CV = logits_CV if temperature == 1 else logits_CV / temperature
    student_CV, logsumexp_C1 = softmax_logsumexp(softened_CV)
    if indices_CK is None:
        log_p_CK, p_CK = softened_CV - logsumexp_C1, student_CV
    else:
        log_p_CK = softened_CV.gather(1, indices_CK) - logsumexp_C1
        p_CK = student_CV.gather(1, indices_CK)
        student_CV.scatter_(1, indices_CK, 0.0)  # what is left is the rest
    parts_CK, slopes_CK = divergence.parts(log_p_CK, teacher_CK)
    divergence_C, slope_C, rest_scale_C = parts_CK.sum(1), slopes_CK.sum(1), torch.zeros_like(weight_C)
    if teacher_CK.shape[1] < logits_CV.shape[1]:
        least = torch.finfo(logits_CV.dtype)
        log_p_rest_C = student_CV.sum(1).clamp(min=least.tiny).log()
        log_q_rest_C = (1 - teacher_CK.exp().sum(1)).clamp(min=least.eps).log()
        part_C, rest_slope_C = divergence.parts(log_p_rest_C, log_q_rest_C)
        divergence_C, slope_C = divergence_C + part_C, slope_C + rest_slope_C
        rest_scale_C = rest_slope_C / log_p_rest_C.exp()
    rest_scale_C = (rest_scale_C - slope_C) * kl_weight_C
    top_CK = (slopes_CK - p_CK * slope_C[:, None]) * kl_weight_C[:, None]
    if indices_CK is None:
        plain_CV, plain_logsumexp_C1 = (p_CK, logsumexp_C1) if temperature == 1 else softmax_logsumexp(logits_CV)
        gradient_CV = top_CK.addcmul_(plain_CV, label_weight_C[:, None])
    elif temperature == 1:
        plain_logsumexp_C1 = logsumexp_C1
        gradient_CV = student_CV.mul_((rest_scale_C + label_weight_C)[:, None])
        gradient_CV.scatter_(1, indices_CK, top_CK.addcmul_(p_CK, label_weight_C[:, None]))
    else:
        plain_CV, plain_logsumexp_C1 = softmax_logsumexp(logits_CV)
        gradient_CV = student_CV.mul_(rest_scale_C[:, None]).scatter_(1, indices_CK, top_CK)
        gradient_CV.addcmul_(plain_CV, label_weight_C[:, None])
    gradient_CV.scatter_add_(1, targets_C1, -label_weight_C[:, None])
    cross_entropy_C = (plain_logsumexp_C1 - logits_CV.gather(1, targets_C1))[:, 0]
    return gradient_CV, torch.stack([divergence_C @ weight_C, cross_entropy_C @ weight_C])
