"""Cross-entropy of large vocabularies: the loss and its gradient from one pass over a few rows of logits at a time.

torch keeps a log-softmax as large as the logits, in fp32, and of 16-bit logits an fp32 copy too; then come the
gradients of all of them. Here the only thing as large as the logits is their gradient, in their own format; and where
they are large, not even that: the output layer is a part of the loss, which goes through both a few rows at a time, as
Liger does in a kernel (arXiv 2410.10989).

Shapes: B rows, P predictions in a row, C of the N = B * P, V outputs, H numbers of a hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from overproof.models.zero_memory import output_chunk_rows

CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}  # of logits at a time


def mean_cross_entropy(logits_BPV: Tensor, targets_BP: Tensor, mask_BP: Tensor) -> Tensor:
    """The mean over the predictions whose mask is set, each times its mask; see ``Prediction``. Nats, fp32."""
    given = (logits_BPV.flatten(0, 1), targets_BP.reshape(-1, 1), mask_BP.flatten().float())
    loss: Tensor = _CrossEntropy.apply(*given)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Backward may run once. Until then the gradient is that of the sum, lest fp16 round a mean's to 0."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N1: Tensor, mask_N: Tensor) -> Tensor:
        gradient_NV = torch.empty_like(logits_NV)
        total = _sum_and_gradient(logits_NV, targets_N1, mask_N[:, None], gradient_NV)
        counted = (mask_N > 0).sum()
        ctx.save_for_backward(gradient_NV, counted)
        return total / counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradient_NV, counted = ctx.saved_tensors
        return gradient_NV.mul_(scale / counted), None, None


def linear_cross_entropy(hidden_NH: Tensor, output_VH: Tensor, targets_BP: Tensor, mask_BP: Tensor) -> Tensor:
    """``mean_cross_entropy`` of ``hidden_NH @ output_VH.T``, which never exists whole. The gradient of ``output_VH`` is
    summed in fp32 over the parts.
    """
    given = (hidden_NH, output_VH, targets_BP.reshape(-1, 1), mask_BP.flatten().float())
    loss: Tensor = _LinearCrossEntropy.apply(*given)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """As ``_CrossEntropy``."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, output_VH: Tensor, targets_N1: Tensor, mask_N: Tensor) -> Tensor:
        learns = ctx.needs_input_grad[1]
        hidden_gradient_NH, total = torch.empty_like(hidden_NH), mask_N.new_zeros(())
        output_gradient_VH = torch.zeros_like(output_VH, dtype=torch.float32) if learns else None
        rows = output_chunk_rows(hidden_NH.device.type, len(output_VH), hidden_NH.element_size())
        logits_RV = hidden_NH.new_empty(min(rows, len(hidden_NH)), len(output_VH))
        for start in range(0, len(hidden_NH), rows):
            here = slice(start, start + rows)
            hidden_CH, targets_C1, mask_C = hidden_NH[here], targets_N1[here], mask_N[here]
            logits_CV = torch.mm(hidden_CH, output_VH.T, out=logits_RV[: len(hidden_CH)])
            total += _sum_and_gradient(logits_CV, targets_C1, mask_C[:, None], logits_CV)  # in their place
            torch.mm(logits_CV, output_VH, out=hidden_gradient_NH[here])
            if output_gradient_VH is None:
                continue
            if output_VH.dtype == torch.float32:
                output_gradient_VH.addmm_(logits_CV.T, hidden_CH)
            else:
                output_gradient_VH += logits_CV.T @ hidden_CH
        counted = (mask_N > 0).sum()
        ctx.save_for_backward(hidden_gradient_NH, output_gradient_VH, counted)
        ctx.dtype = output_VH.dtype
        return total / counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient_NH, output_gradient_VH, counted = ctx.saved_tensors
        scale = scale / counted
        learnt = None if output_gradient_VH is None else output_gradient_VH.mul_(scale).to(ctx.dtype)
        return hidden_gradient_NH.mul_(scale), learnt, None, None


def _sum_and_gradient(logits_NV: Tensor, targets_N1: Tensor, mask_N1: Tensor, gradient_NV: Tensor) -> Tensor:
    """The sum of the losses; its gradient by the logits is written to ``gradient_NV``, which may be the logits."""
    total = mask_N1.new_zeros(())
    for here in logit_chunks(logits_NV):
        logits_CV, targets_C1, mask_C1 = logits_NV[here].float(), targets_N1[here], mask_N1[here]
        p_CV, logsumexp_C1 = softmax_logsumexp(logits_CV)
        total += (mask_C1 * (logsumexp_C1 - logits_CV.gather(1, targets_C1))).sum()
        gradient_NV[here] = p_CV.mul_(mask_C1).scatter_add_(1, targets_C1, -mask_C1)
    return total


def logit_chunks(logits_NV: Tensor) -> Iterator[slice]:
    """Rows of logits that are best worked on at once: on a CPU every pass after the first hits the cache."""
    rows = max(1, CHUNK_BYTES[logits_NV.device.type] // (logits_NV.shape[1] * logits_NV.element_size()))
    return (slice(start, start + rows) for start in range(0, len(logits_NV), rows))


def softmax_logsumexp(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and logsumexp from one exponentiation: the largest probability is exp(largest logit - logsumexp)."""
    p_CV = torch.softmax(logits_CV, 1)
    return p_CV, logits_CV.amax(1, keepdim=True) - p_CV.amax(1, keepdim=True).log()
