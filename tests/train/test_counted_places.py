"""A loss over some places of a row is the same whether the output layer reads all of them or those alone."""

from __future__ import annotations

import pytest
import torch
from test_lora import DECODERS, tiny

from overproof.registry import TASKS
from overproof.train.objective import CrossEntropy, outputs_at

CHAT = TASKS["chat"]


def conversations() -> dict[str, torch.Tensor]:
    """Two rows of two conversations each, of whose predictions 7 and 4 count."""
    torch.manual_seed(3)
    answer_BP = torch.zeros(2, 16, dtype=torch.uint8)
    answer_BP[0, 3:7] = answer_BP[0, 12:15] = answer_BP[1, 9:13] = 1
    position_BP = torch.tensor([[*range(9), *range(7)], [*range(5), *range(11)]])
    scale_B = torch.full((2,), 2 / int(answer_BP.sum()))
    return {"tokens": torch.randint(0, 300, (2, 17)), "position": position_BP, "answer": answer_BP, "scale": scale_B}


@pytest.mark.parametrize("kind", DECODERS)
def test_the_output_layer_may_read_the_places_that_count_alone(kind: str) -> None:
    model, batch = tiny(kind), conversations()
    found = []
    for counted in (None, CHAT.counted):
        loss, _ = CrossEntropy(CHAT.predict, counted).loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    (every, gradients), (alone, others) = found
    torch.testing.assert_close(alone, every, rtol=1e-6, atol=0)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


def test_other_outputs_are_not_computed_and_the_model_is_left_as_it_was() -> None:
    model, batch = tiny("llama"), conversations()
    places_BP = batch["answer"] > 0
    with torch.no_grad():
        whole_BPV = CHAT.predict(model, batch).logits_BPV
        with outputs_at(model, places_BP):
            logits_NV = CHAT.predict(model, batch).logits_BPV
        again_BPV = CHAT.predict(model, batch).logits_BPV
    assert logits_NV.shape == (11, whole_BPV.shape[-1])
    torch.testing.assert_close(logits_NV, whole_BPV[places_BP])
    assert torch.equal(again_BPV, whole_BPV)
