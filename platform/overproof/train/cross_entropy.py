"""Cross-entropy of large vocabularies: the loss and its gradient from one pass over a few rows of logits at a time.

torch keeps a log-softmax as large as the logits, in fp32, and of 16-bit logits an fp32 copy too; then come the
gradients of all of them. Here the only thing as large as the logits is their gradient, in their own format. (Liger,
arXiv 2410.10989, does the same in a kernel.)

Shapes: B rows, P predictions in a row, C of the N = B * P, V outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        gradient_NV, total = torch.empty_like(logits_NV), mask_N.new_zeros(())
        for here in logit_chunks(logits_NV):
            logits_CV, targets_C1, mask_C1 = logits_NV[here].float(), targets_N1[here], mask_N[here, None]
            p_CV, logsumexp_C1 = softmax_logsumexp(logits_CV)
            total += (mask_C1 * (logsumexp_C1 - logits_CV.gather(1, targets_C1))).sum()
            gradient_NV[here] = p_CV.mul_(mask_C1).scatter_add_(1, targets_C1, -mask_C1)
        counted = (mask_N > 0).sum()
        ctx.save_for_backward(gradient_NV, counted)
        return total / counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradient_NV, counted = ctx.saved_tensors
        return gradient_NV.mul_(scale / counted), None, None


def logit_chunks(logits_NV: Tensor) -> Iterator[slice]:
    """Rows of logits that are best worked on at once: on a CPU every pass after the first hits the cache."""
    rows = max(1, CHUNK_BYTES[logits_NV.device.type] // (logits_NV.shape[1] * logits_NV.element_size()))
    return (slice(start, start + rows) for start in range(0, len(logits_NV), rows))


def softmax_logsumexp(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and logsumexp from one exponentiation: the largest probability is exp(largest logit - logsumexp)."""
    p_CV = torch.softmax(logits_CV, 1)
    return p_CV, logits_CV.amax(1, keepdim=True) - p_CV.amax(1, keepdim=True).log()
