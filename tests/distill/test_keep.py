"""What is kept of a teacher, against its definition in double precision."""

from __future__ import annotations

import pytest
import torch

from overproof.distill import losses
from overproof.distill.keep import keep
from overproof.recipe import Dense, Sampled, Scheme, TopK

TEMPERATURES = (0.5, 1.0, 3.0)
LOGITS = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)) * 8
LABELS = torch.randint(0, 40, (2, 3), generator=torch.Generator().manual_seed(1))


def uniform(draws: int, rows: int = 2) -> torch.Tensor:
    return torch.rand(rows, 3, draws, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("scheme", [TopK(k=1), TopK(k=5), TopK(k=40), Sampled(draws=7), Dense()])
def test_every_scheme_keeps_the_labels_and_what_softens_the_teacher(scheme: Scheme) -> None:
    found = keep(LOGITS, LABELS, scheme, TEMPERATURES, uniform(7))
    logprobs = torch.log_softmax(LOGITS.double(), -1)
    label = logprobs.gather(-1, LABELS[..., None])[..., 0]
    torch.testing.assert_close(found["label_logprob"].double(), label, rtol=1e-5, atol=1e-5)
    expected = torch.stack([torch.logsumexp(LOGITS.double() / t, -1) for t in TEMPERATURES], -1)
    torch.testing.assert_close(found["logsumexp"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_top_k_keeps_what_defines_the_teacher(k: int) -> None:
    found = keep(LOGITS, LABELS, TopK(k=k), TEMPERATURES)
    logprobs = torch.log_softmax(LOGITS.double(), -1)
    top, indices = logprobs.topk(k, -1)
    rest = logprobs.scatter(-1, indices, -torch.inf).logsumexp(-1)
    assert torch.equal(found["indices"], indices)
    torch.testing.assert_close(found["logprobs"].double(), top, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["tail"].double(), rest, rtol=1e-5, atol=1e-5)
    assert torch.isinf(found["tail"]).all() == (k == 40)


def test_dense_keeps_all() -> None:
    found = keep(LOGITS, LABELS, Dense(), TEMPERATURES)
    torch.testing.assert_close(found["logprobs"], torch.log_softmax(LOGITS, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperatures", [(1.0,), TEMPERATURES])
def test_draws_are_those_of_the_mean_distribution(temperatures: tuple[float, ...]) -> None:
    chance = uniform(50)
    chance[0, 0, :2] = torch.tensor([0.0, 1 - 2**-53])
    found = keep(LOGITS, LABELS, Sampled(draws=50), temperatures, chance)
    q = torch.stack([torch.softmax(LOGITS.double() / t, -1) for t in temperatures]).mean(0)
    for row in range(2):
        for place in range(3):
            drawn = torch.searchsorted(q[row, place].cumsum(0), chance[row, place], right=True).clamp(max=39)
            outputs, counts = drawn.unique(return_counts=True)
            size, slots = len(outputs), {name: found[name][row, place] for name in ("indices", "counts", "logprobs")}
            assert torch.equal(slots["indices"][:size], outputs)  # ascending, each once, then the slots left over
            assert torch.equal(slots["counts"][:size], counts)
            assert not slots["counts"][size:].any()
            assert not slots["logprobs"][size:].any()
            expected = torch.log_softmax(LOGITS[row, place], -1)[outputs]
            torch.testing.assert_close(slots["logprobs"][:size], expected, rtol=1e-5, atol=1e-5)


def test_an_output_without_probability_is_never_drawn() -> None:
    logits = torch.full((1, 1, 6), -torch.inf)
    logits[..., 2] = 0.0
    logits[..., 4] = 0.0
    chance = torch.linspace(0, 1 - 2**-53, 101, dtype=torch.float64).view(1, 1, -1)
    found = keep(logits, torch.full((1, 1), 2), Sampled(draws=101), (1.0, 2.0), chance)
    assert found["indices"][0, 0, :2].tolist() == [2, 4]
    assert sorted(found["counts"][0, 0, :3].tolist()) == [0, 50, 51]


@pytest.mark.parametrize("scheme", [TopK(k=5), Sampled(draws=7), Dense()])
def test_chunks_do_not_change_what_is_kept(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keep(LOGITS, LABELS, scheme, TEMPERATURES, uniform(7))
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 1)
    for name, values in keep(LOGITS, LABELS, scheme, TEMPERATURES, uniform(7)).items():
        assert torch.equal(values, whole[name])
