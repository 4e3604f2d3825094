"""The loss from one pass is torch's, and so is its gradient, in every number format and over several chunks."""

from __future__ import annotations

import pytest
import torch
from test_counted_places import CHAT, conversations
from test_lora import tiny
from torch import Tensor
from transformers import PreTrainedModel

from overproof.models import zero_memory
from overproof.train.cross_entropy import CHUNK_BYTES, linear_cross_entropy, logit_chunks, mean_cross_entropy
from overproof.train.objective import CrossEntropy

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


HIDDEN = 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [True, False])
def test_the_output_layer_in_parts_is_the_whole_one(
    dtype: torch.dtype, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_memory, "LEAST_CHUNK_ROWS", 40)
    monkeypatch.setitem(zero_memory.OUTPUT_CHUNK_BYTES, "cpu", 1)
    _, targets_BP, mask_BP = given(dtype)
    hidden_NH = torch.randn(ROWS * PREDICTIONS, HIDDEN).to(dtype).requires_grad_()
    output_VH = torch.randn(OUTPUTS, HIDDEN).to(dtype).requires_grad_(learns)
    loss = linear_cross_entropy(hidden_NH, output_VH, targets_BP, mask_BP)
    (3 * loss).backward()
    wide = [each.detach().double().requires_grad_() for each in (hidden_NH, output_VH)]
    expected = plain((wide[0] @ wide[1].T).unflatten(0, (ROWS, PREDICTIONS)), targets_BP, mask_BP)
    (3 * expected).backward()
    exact = dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6 if exact else 1e-2, atol=0)
    for found, wanted in zip((hidden_NH, output_VH), wide, strict=True):
        if not found.requires_grad:
            assert found.grad is None
            continue
        assert found.grad is not None
        assert wanted.grad is not None
        assert found.grad.dtype == dtype
        far = (found.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert float(far) < (1e-5 if exact else 2e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite", "gemma2"])
@pytest.mark.parametrize("counted", [None, "answer"])
def test_a_models_large_logits_are_never_whole(kind: str, counted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss and gradients, of all places or of those that count; where logits are scaled or capped, as ever."""
    batch, made = conversations(), list[torch.Size]()
    one = CrossEntropy(CHAT.predict, counted)

    def losses(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor | None]]:
        made.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: made.append(t.shape) or t, lambda t: t):
            loss, _ = one.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}

    whole, gradients = losses(tiny(kind))
    monkeypatch.setattr(zero_memory, "LEAST_CHUNK_ROWS", 5)
    monkeypatch.setitem(zero_memory.OUTPUT_CHUNK_BYTES, "cpu", 1)
    model = tiny(kind)
    found, others = losses(model)
    predictions = int((batch["answer"] > 0).sum()) if counted else batch["answer"].numel()
    assert ((predictions, model.config.vocab_size) in made) == (kind in ("granite", "gemma2"))
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-7)
    assert "forward" not in vars(model.get_output_embeddings())
