"""A few outputs and draws from the others teach, in the mean, what all would: measured against dense forward KL."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import PREDICT, dense, draw, ours
from torch import Tensor

from overproof.config import Dense, Sampled, Scheme, TopK
from overproof.data.order import uniforms
from overproof.distill.losses import Divergence, LossTerms
from overproof.distill.objectives import DistillObjective
from overproof.distill.sampled_loss import sampled_distillation_loss
from overproof.distill.target_codec import TargetLayout
from overproof.distill.target_encoder import DRAW_KEY, encode_targets
from overproof.models.base import Prediction
from overproof.models.hf_directory import Batch
from overproof.train import cross_entropy

OUTPUTS, REPEATS = 12, 40_000
SAMPLED = Sampled(k=2, draws=3)
SIGMAS = 5.0
ROUNDING = 5e-4  # of the likeliest outputs, which are not drawn: half precision
SWEPT = (0.5, 1.0, 2.0)


def cached(teacher: Tensor, targets: Tensor, scheme: Scheme, temperatures: tuple[float, ...], seed: int = 0) -> Batch:
    """The columns a student learns from, through the bytes of a cache file."""
    rows, positions, outputs = teacher.shape
    layout = TargetLayout(scheme, "tokens", positions, outputs, len(temperatures))
    uniform = torch.from_numpy(uniforms(seed, DRAW_KEY, np.arange(rows), positions))
    kept = {n: v.numpy() for n, v in encode_targets(teacher, targets, scheme, temperatures, uniform).items()}
    unread = {"sample_id": np.arange(rows), "mask": np.ones((rows, positions), bool)}
    flat = layout.encode(unread | kept)
    return {f"teacher_{name}": torch.from_numpy(layout.decode(name, flat[name])) for name in layout.loss_columns}


def learn(
    student: Tensor, targets: Tensor, mask: Tensor, batch: Batch, objective: DistillObjective
) -> tuple[LossTerms, Tensor]:
    student = student.clone().requires_grad_()
    ints = {name: values.long() if not values.is_floating_point() else values for name, values in batch.items()}
    terms = objective.terms(Prediction(student, targets, mask), ints)
    terms.loss.backward()
    assert student.grad is not None
    return terms, student.grad


def gradients(student: Tensor, teacher: Tensor, temperatures: tuple[float, ...], temperature: float) -> Tensor:
    """Of REPEATS captures with different draws, one a row: the gradient of each by the student's logits."""
    many = [x.double().expand(REPEATS, 1, OUTPUTS) for x in (student, teacher)]
    targets, mask = torch.zeros(REPEATS, 1, dtype=torch.int64), torch.ones(REPEATS, 1, dtype=torch.bool)
    batch = cached(many[1].float(), targets, SAMPLED, temperatures)
    objective = DistillObjective(PREDICT, temperature, 1.0, temperatures, Divergence())
    return learn(many[0], targets, mask, batch, objective)[1][:, 0] * REPEATS  # not their mean's share


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(OUTPUTS, generator=generator) * 1.5, torch.randn(OUTPUTS, generator=generator) * 1.5


def at(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits.double() / temperature, -1)


def dense_gradient(student: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    student = student.double().clone().requires_grad_()
    ((log_q.exp() * (log_q - at(student, temperature))).sum() * temperature**2).backward()
    assert student.grad is not None
    return student.grad


@pytest.mark.parametrize(("temperatures", "temperature"), [((1.0,), 1.0), (SWEPT, 0.5), (SWEPT, 1.0), (SWEPT, 2.0)])
def test_the_mean_gradient_is_that_of_every_output(temperatures: tuple[float, ...], temperature: float) -> None:
    """Within five standard errors in every coordinate; the top k alone, made to sum to 1, is off by far more."""
    student, teacher = pair()
    log_q = at(teacher, temperature)
    found, exact = gradients(student, teacher, temperatures, temperature), dense_gradient(student, log_q, temperature)
    error = found.std(0) / math.sqrt(REPEATS)
    drawn = log_q.argsort(descending=True)[SAMPLED.k :]
    assert (error[drawn] > 0).all()
    assert ((found.mean(0) - exact).abs() < SIGMAS * error + ROUNDING).all()
    top, indices = log_q.topk(SAMPLED.k + SAMPLED.draws)
    naive = torch.full_like(log_q, -1e3).scatter(0, indices, torch.log_softmax(top, -1))
    assert ((dense_gradient(student, naive, temperature) - exact).abs() > 2 * SIGMAS * error).any()


def test_more_captures_are_closer() -> None:
    """The error of the mean of n captures falls as 1 / sqrt(n): nothing is left that more draws do not mend."""
    student, teacher = pair()
    found, exact = gradients(student, teacher, (1.0, 2.0), 2.0), dense_gradient(student, at(teacher, 2.0), 2.0)
    size = {
        n: (found[: REPEATS // n * n].view(-1, n, OUTPUTS).mean(1) - exact).square().mean().sqrt() for n in (1, 100)
    }
    assert float(size[1] / size[100]) == pytest.approx(10, rel=0.1)


def test_the_likeliest_outputs_are_kept_and_the_draws_spread() -> None:
    """The squared error is far below that of as many independent draws, which is (1 - sum(q^2)) / S."""
    student, teacher = pair()
    q = at(teacher, 1.0).exp()
    found, exact = gradients(student, teacher, (1.0,), 1.0), dense_gradient(student, at(teacher, 1.0), 1.0)
    apart = float((1 - q.square().sum()) / (SAMPLED.k + SAMPLED.draws))
    assert float((found - exact).square().sum(1).mean()) < apart / 3


def test_the_value_is_the_divergence_in_the_mean() -> None:
    student, teacher = pair()
    for temperature in (1.0, 2.0):
        values = []
        for seed in range(50):
            many = teacher.expand(200, 1, OUTPUTS)
            targets, mask = torch.zeros(200, 1, dtype=torch.int64), torch.ones(200, 1, dtype=torch.bool)
            batch = cached(many, targets, SAMPLED, (1.0, 2.0), seed)
            objective = DistillObjective(PREDICT, temperature, 1.0, (1.0, 2.0), Divergence())
            values.append(
                float(learn(student.double().expand(200, 1, OUTPUTS), targets, mask, batch, objective)[0].divergence)
            )
        p, q = at(student, temperature), at(teacher, temperature)
        exact = float((q.exp() * (q - p)).sum()) * temperature**2
        assert abs(np.mean(values) - exact) < SIGMAS * np.std(values, ddof=1) / math.sqrt(len(values))


@given(st.integers(0, 2**31), st.floats(0.1, 5), st.sampled_from([0.5, 1.0, 2.0]), st.floats(0, 1))
@settings(max_examples=60)
def test_value_and_gradient_are_those_of_the_drawn_outputs(
    seed: int, spread: float, temperature: float, weight: float
) -> None:
    """Against autograd, labels mixed in; importance 0 hides whatever a slot holds."""
    student, teacher, targets, mask = draw(seed, spread)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, OUTPUTS, (*mask.shape, 5), generator=generator)
    importance = torch.rand(*mask.shape, 5, generator=generator, dtype=torch.float64)
    importance[..., 3:] = 0
    entropy = torch.special.entr(torch.softmax(teacher / temperature, -1)).sum(-1)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    p = torch.log_softmax(a / temperature, -1).gather(-1, indices)
    ce = torch.logsumexp(a, -1) - a.gather(-1, targets[..., None])[..., 0]
    far = (-(importance * p).sum(-1) - entropy) * temperature**2
    expected = (weight * far + (1 - weight) * ce)[mask].mean()
    found = sampled_distillation_loss(b, targets, mask, indices, importance, entropy, temperature, weight).loss
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", [TopK(k=OUTPUTS), Dense()])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_of_all_outputs_teaches_as_the_teacher_itself(scheme: Scheme, kind: str, temperature: float) -> None:
    """To the rounding of log-probabilities in half precision."""
    measure = Divergence(kind)  # type: ignore[arg-type]
    student, teacher, targets, mask = draw(11, 1.0)
    batch = cached(teacher.float(), targets, scheme, (1.0, 2.0))
    terms, gradient = learn(
        student, targets, mask, batch, DistillObjective(PREDICT, temperature, 0.7, (1.0, 2.0), measure)
    )
    expected = student.clone().requires_grad_()
    loss = dense(expected, teacher, targets, mask, temperature, 0.7, measure)
    loss.backward()
    torch.testing.assert_close(terms.loss, loss, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(gradient, expected.grad, rtol=2e-3, atol=2e-3)


def test_a_sure_teacher_is_sampled_without_error() -> None:
    """Nothing is left to draw from: the loss is that of the top 1, and finite beyond the range of exp."""
    teacher = torch.full((1, 2, OUTPUTS), -1e3)
    teacher[..., 0] = 1e3
    student = torch.full((1, 2, OUTPUTS), -300.0)
    student[..., 1] = 300.0
    targets, mask = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
    batch = cached(teacher, targets, Sampled(k=1, draws=4), (1.0, 2.0))
    terms, gradient = learn(
        student, targets, mask, batch, DistillObjective(PREDICT, 2.0, 0.5, (1.0, 2.0), Divergence())
    )
    expected = ours(student, teacher, targets, mask, 2.0, 0.5, OUTPUTS)
    torch.testing.assert_close(terms.loss, expected.loss)
    assert torch.isfinite(gradient).all()
    assert (gradient[..., 0] < 0).all()
    assert (gradient[..., 1] > 0).all()


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, targets, mask = draw(5, 3.0)
    batch = cached(teacher.float(), targets, Sampled(k=1, draws=4), (1.0, 2.0))
    results = []
    for size in (1, 1 << 20):
        monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", size)
        terms, gradient = learn(
            student, targets, mask, batch, DistillObjective(PREDICT, 2.0, 0.5, (1.0, 2.0), Divergence())
        )
        results.append(torch.cat([torch.stack([*terms]).detach(), gradient.flatten()]))
    torch.testing.assert_close(results[0], results[1])
