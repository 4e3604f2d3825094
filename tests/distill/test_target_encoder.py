"""What is kept of a teacher, against its definition in double precision."""

from __future__ import annotations

import pytest
import torch

from overproof.config import Dense, Sampled, Scheme, TopK
from overproof.distill.target_encoder import encode_targets
from overproof.train import cross_entropy

TEMPERATURES = (0.5, 1.0, 3.0)
LOGITS = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)) * 8
LABELS = torch.randint(0, 40, (2, 3), generator=torch.Generator().manual_seed(1))


SAMPLED = Sampled(k=3, draws=7)
CHANCE = torch.rand(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("scheme", [TopK(k=1), TopK(k=5), TopK(k=40), SAMPLED, Dense()])
def test_every_scheme_keeps_the_labels_and_what_softens_the_teacher(scheme: Scheme) -> None:
    found = encode_targets(LOGITS, LABELS, scheme, TEMPERATURES, CHANCE)
    logprobs = torch.log_softmax(LOGITS.double(), -1)
    label = logprobs.gather(-1, LABELS[..., None])[..., 0]
    torch.testing.assert_close(found["label_logprob"].double(), label, rtol=1e-5, atol=1e-5)
    expected = torch.stack([torch.logsumexp(logprobs / t, -1) for t in TEMPERATURES if t != 1], -1)
    torch.testing.assert_close(found["logsumexp"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_top_k_keeps_what_defines_the_teacher(k: int) -> None:
    found = encode_targets(LOGITS, LABELS, TopK(k=k), TEMPERATURES)
    logprobs = torch.log_softmax(LOGITS.double(), -1)
    top, indices = logprobs.topk(k, -1)
    rest = logprobs.scatter(-1, indices, -torch.inf).logsumexp(-1)
    assert torch.equal(found["indices"], indices)
    torch.testing.assert_close(found["logprobs"].double(), top, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["tail"].double(), rest, rtol=1e-5, atol=1e-5)
    assert torch.isinf(found["tail"]).all() == (k == 40)


def test_dense_keeps_all() -> None:
    found = encode_targets(LOGITS, LABELS, Dense(), TEMPERATURES)
    torch.testing.assert_close(found["logprobs"], torch.log_softmax(LOGITS, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperatures", [(1.0,), TEMPERATURES])
def test_draws_are_those_of_the_mean_distribution(temperatures: tuple[float, ...]) -> None:
    chance = CHANCE.clone()
    chance[0, :2] = torch.tensor([0.0, 1 - 2**-53])
    found = encode_targets(LOGITS, LABELS, SAMPLED, temperatures, chance)
    logprobs = torch.log_softmax(LOGITS.double(), -1)
    top, indices = logprobs.topk(SAMPLED.k, -1)
    assert torch.equal(found["indices"], indices)
    torch.testing.assert_close(found["logprobs"].double(), top, rtol=1e-5, atol=1e-5)
    each = torch.stack([torch.softmax(LOGITS.double() / t, -1) for t in temperatures], -1)
    entropy = torch.special.entr(each).sum(-2)
    torch.testing.assert_close(found["entropy"].double(), entropy, rtol=1e-4, atol=1e-5)
    rest = each.mean(-1).scatter(-1, indices, 0.0)
    torch.testing.assert_close(found["tail"].double(), rest.sum(-1).log(), rtol=1e-4, atol=1e-4)
    assert not (found["drawn"][..., None] == indices[..., None, :]).any()
    counts = torch.zeros_like(rest).scatter_add(-1, found["drawn"], torch.ones_like(found["drawn"], dtype=rest.dtype))
    expected = rest / rest.sum(-1, keepdim=True) * SAMPLED.draws
    assert ((counts - expected).abs() < 1 + 1e-4).all()  # never more than one time more or less
    cuts = (torch.arange(SAMPLED.draws) + chance[..., None]) / SAMPLED.draws * rest.sum(-1, keepdim=True)
    same = torch.searchsorted(rest.cumsum(-1), cuts, right=True).clamp(max=39) == found["drawn"]
    assert same.double().mean() > 0.99  # single precision may decide a cut at an edge otherwise
    if len(temperatures) == 1:
        assert "drawn_logprobs" not in found
    else:
        drawn = logprobs.gather(-1, found["drawn"])
        torch.testing.assert_close(found["drawn_logprobs"].double(), drawn, rtol=1e-5, atol=1e-5)


def test_an_output_without_probability_is_never_drawn() -> None:
    logits = torch.full((1, 1, 7), -torch.inf)
    logits[..., [2, 4, 5]] = torch.tensor([0.0, 0.0, 1.0])
    for chance in (0.0, 0.5, 1 - 2**-53):
        given = torch.full((1, 1), chance, dtype=torch.float64)
        found = encode_targets(logits, torch.full((1, 1), 2), Sampled(k=1, draws=101), (1.0, 2.0), given)
        assert found["indices"].tolist() == [[[5]]]
        outputs, counts = found["drawn"].unique(return_counts=True)
        assert outputs.tolist() == [2, 4]
        assert sorted(counts.tolist()) == [50, 51]


@pytest.mark.parametrize("scheme", [TopK(k=5), SAMPLED, Dense()])
def test_chunks_do_not_change_what_is_kept(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_targets(LOGITS, LABELS, scheme, TEMPERATURES, CHANCE)
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 1)
    for name, values in encode_targets(LOGITS, LABELS, scheme, TEMPERATURES, CHANCE).items():
        assert torch.equal(values, whole[name])
