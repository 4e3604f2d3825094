"""The loss from one pass is torch's, and so is its gradient, in every number format and over several chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from overproof.train.cross_entropy import CHUNK_BYTES, logit_chunks, mean_cross_entropy

ROWS, PREDICTIONS, OUTPUTS = 3, 50, 5_000


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    logits_BPV = (8 * torch.randn(ROWS, PREDICTIONS, OUTPUTS)).to(dtype).requires_grad_()
    weights_BP = torch.rand(ROWS, PREDICTIONS) + 0.5
    mask_BP = torch.where(torch.rand(ROWS, PREDICTIONS) < 0.3, 0.0, weights_BP)
    return logits_BPV, torch.randint(0, OUTPUTS, (ROWS, PREDICTIONS)), mask_BP


def plain(logits_BPV: Tensor, targets_BP: Tensor, mask_BP: Tensor) -> Tensor:
    nll_BP = -logits_BPV.double().log_softmax(-1).gather(-1, targets_BP[..., None])[..., 0]
    return (nll_BP * mask_BP).sum() / (mask_BP > 0).sum()


@pytest.mark.parametrize("scale", [1.0, 2.0**14])  # as fp16 scales its losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_torchs(dtype: torch.dtype, scale: float) -> None:
    logits_BPV, targets_BP, mask_BP = given(dtype)
    assert len(list(logit_chunks(logits_BPV.flatten(0, 1)))) > 1
    loss = mean_cross_entropy(logits_BPV, targets_BP, mask_BP)
    (scale * loss).backward()
    assert loss.dtype == torch.float32
    wide_BPV = logits_BPV.detach().double().requires_grad_()
    expected = plain(wide_BPV, targets_BP, mask_BP)
    (scale * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    found, wanted = logits_BPV.grad, wide_BPV.grad
    assert found is not None
    assert wanted is not None
    assert found.dtype == dtype
    # Rounded twice: as the gradient of a sum, and as that of a mean.
    info = torch.finfo(dtype)
    smallest = max(info.smallest_normal, info.smallest_normal * scale / int((mask_BP > 0).sum()))
    torch.testing.assert_close(found.double(), wanted, rtol=2 * info.eps + 1e-5, atol=smallest)


def test_a_mask_of_flags_and_no_more_than_a_chunk_at_once() -> None:
    logits_BPV, targets_BP, mask_BP = given(torch.float32)
    loss = mean_cross_entropy(logits_BPV, targets_BP, mask_BP > 0)
    torch.testing.assert_close(loss.double(), plain(logits_BPV, targets_BP, (mask_BP > 0).double()), rtol=1e-6, atol=0)
    chunks = list(logit_chunks(logits_BPV.flatten(0, 1)))
    assert max((c.stop - c.start) * OUTPUTS * 4 for c in chunks) <= CHUNK_BYTES["cpu"]
    assert (chunks[0].start, chunks[-1].stop >= ROWS * PREDICTIONS) == (0, True)


def test_nothing_that_counts_is_no_number() -> None:
    logits_BPV, targets_BP, mask_BP = given(torch.float32)
    assert mean_cross_entropy(logits_BPV, targets_BP, torch.zeros_like(mask_BP)).isnan()
