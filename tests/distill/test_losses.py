"""The distillation loss against a dense reference in double precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overproof.config import TopK
from overproof.distill.losses import Divergence, LossTerms, distillation_loss
from overproof.distill.objectives import DistillObjective
from overproof.distill.target_encoder import encode_targets
from overproof.models.hf_directory import Batch
from overproof.registry import TASKS
from overproof.train import cross_entropy

ROWS, PLACES, OUTPUTS = 2, 3, 12
FORWARD = Divergence()
PREDICT = TASKS["language_modeling"].predict

cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "spread": st.floats(0.1, 20),
        "temperature": st.sampled_from([0.5, 1.0, 2.0, 4.0]),
        "weight": st.floats(0, 1),
        "k": st.integers(1, OUTPUTS),
        "measure": st.builds(
            Divergence, st.sampled_from(["forward_kl", "reverse_kl", "jsd"]), st.sampled_from([0.1, 0.5, 0.9])
        ),
    }
)


def draw(seed: int, spread: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher logits, labels, and a mask with at least one prediction that counts."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(ROWS, PLACES, OUTPUTS, generator=generator, dtype=torch.float64) * spread
    teacher = torch.randn(ROWS, PLACES, OUTPUTS, generator=generator, dtype=torch.float64) * spread
    targets = torch.randint(0, OUTPUTS, (ROWS, PLACES), generator=generator)
    mask = torch.rand(ROWS, PLACES, generator=generator) < 0.7
    mask[0, 0] = True
    return student, teacher, targets, mask


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def between(log_q: Tensor, log_p: Tensor, measure: Divergence) -> Tensor:
    """The divergence as its definition has it."""
    if measure.kind == "forward_kl":
        return kl(log_q, log_p)
    if measure.kind == "reverse_kl":
        return kl(log_p, log_q)
    beta = measure.beta
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def dense(
    student: Tensor, teacher: Tensor, targets: Tensor, mask: Tensor, temperature: float, weight: float,
    measure: Divergence = FORWARD,
) -> Tensor:  # fmt: skip
    p, q = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
    far = between(q, p, measure) * temperature**2
    ce = torch.logsumexp(student, -1) - student.gather(-1, targets[..., None])[..., 0]
    return (weight * far + (1 - weight) * ce)[mask].mean()


def buckets(
    student: Tensor, teacher: Tensor, targets: Tensor, mask: Tensor, temperature: float, weight: float, k: int,
    measure: Divergence = FORWARD,
) -> Tensor:  # fmt: skip
    """Both distributions summed into k + 1 buckets, then the dense divergence."""
    p, q = (torch.softmax(x / temperature, -1) for x in (student, teacher))
    top, rest = teacher.sort(-1, descending=True).indices.split([k, OUTPUTS - k], -1)
    grouped = [torch.cat([x.gather(-1, top), x.gather(-1, rest).sum(-1, keepdim=True)], -1) for x in (p, q)]
    p, q = (x[..., : k if k == OUTPUTS else k + 1] for x in grouped)
    far = between(q.log(), p.log(), measure) * temperature**2
    ce = torch.logsumexp(student, -1) - student.gather(-1, targets[..., None])[..., 0]
    return (weight * far + (1 - weight) * ce)[mask].mean()


def ours(
    student: Tensor, teacher: Tensor, targets: Tensor, mask: Tensor, temperature: float, weight: float, k: int,
    measure: Divergence = FORWARD,
) -> LossTerms:  # fmt: skip
    top, indices = torch.log_softmax(teacher / temperature, -1).topk(k, -1)
    return distillation_loss(student, targets, mask, indices, top, temperature, weight, measure)


@given(cases)
@settings(max_examples=60)
def test_all_outputs_kept_is_the_dense_divergence(case: dict[str, Any]) -> None:
    student, teacher, targets, mask = draw(case["seed"], case["spread"])
    common = (targets, mask, case["temperature"], case["weight"])
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = dense(a, teacher, *common, case["measure"])
    found = ours(b, teacher, *common, OUTPUTS, case["measure"]).loss
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-9)
    c = student.clone().requires_grad_()
    logits = teacher / case["temperature"]
    every = distillation_loss(c, targets, mask, None, logits, case["temperature"], case["weight"], case["measure"])
    every.loss.backward()
    torch.testing.assert_close(every.loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(c.grad, a.grad, rtol=1e-9, atol=1e-9)


@given(cases)
@settings(max_examples=60)
def test_value_and_gradient_are_those_of_the_buckets(case: dict[str, Any]) -> None:
    least = {"forward_kl": 4.0, "reverse_kl": 1.0, "jsd": 4.0}[case["measure"].kind]  # 1 - sum(q) is log(q)'s own there
    student, teacher, targets, mask = draw(case["seed"], min(case["spread"], least))
    common = (targets, mask, case["temperature"], case["weight"], case["k"], case["measure"])
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = buckets(a, teacher, *common)
    found = ours(b, teacher, *common).loss
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-8)


@given(cases)
@settings(max_examples=60)
def test_merging_outputs_only_lowers_the_divergence(case: dict[str, Any]) -> None:
    student, teacher, targets, mask = draw(case["seed"], case["spread"])
    common = (targets, mask, case["temperature"], 1.0)
    coarse = ours(student, teacher, *common, case["k"], case["measure"]).divergence
    full = dense(student, teacher, *common, case["measure"])
    # The rest is 1 minus the sum of the kept: where it is small its logarithm has that rounding, which log q enters by.
    rounding = 0.0
    if case["measure"].kind != "forward_kl" and case["k"] < OUTPUTS:
        q = torch.softmax(teacher / case["temperature"], -1).sort(-1).values[..., : OUTPUTS - case["k"]].sum(-1)
        eps = torch.finfo(q.dtype).eps
        rounding = float(torch.where(q > eps, OUTPUTS * eps / q, 0.0).max()) * case["temperature"] ** 2
    assert -1e-9 - rounding <= float(coarse) <= float(full) * (1 + 1e-9) + 1e-9 + rounding


@given(cases)
@settings(max_examples=30)
def test_a_student_equal_to_the_teacher_has_nothing_to_learn(case: dict[str, Any]) -> None:
    _, teacher, targets, mask = draw(case["seed"], case["spread"])
    student = teacher.clone().requires_grad_()
    terms = ours(student, teacher, targets, mask, case["temperature"], 1.0, case["k"], case["measure"])
    terms.loss.backward()
    assert float(terms.divergence) == pytest.approx(0, abs=1e-9)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-9


@given(cases)
@settings(max_examples=60)
def test_from_the_cache_in_single_precision_all_stays_finite_and_close(case: dict[str, Any]) -> None:
    student, teacher, targets, mask = (
        x.float() if x.is_floating_point() else x for x in draw(case["seed"], case["spread"])
    )
    temperatures = sorted({1.0, case["temperature"]})
    columns = encode_targets(teacher, targets, TopK(k=case["k"]), temperatures)
    batch = {"teacher_logprobs": columns["logprobs"].half().float()}
    batch |= {"teacher_logsumexp": columns["logsumexp"]} if "logsumexp" in columns else {}
    cached = softened(batch, tuple(temperatures), case["temperature"])
    student.requires_grad_()
    measure = case["measure"]
    terms = distillation_loss(
        student, targets, mask, columns["indices"], cached, case["temperature"], case["weight"], measure
    )
    terms.loss.backward()
    assert torch.isfinite(torch.stack([*terms])).all()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    if measure.kind == "reverse_kl":  # asks for the logarithm of masses that half precision does not hold
        return
    expected = ours(
        student.detach().double(), teacher.double(), targets, mask, case["temperature"], 1.0, case["k"], measure
    )
    # Half precision rounds a log-probability by one part in 2048.
    tolerance = 2e-3 * (1 + case["spread"]) ** 2 * max(1.0, case["temperature"])
    assert float(terms.divergence) == pytest.approx(float(expected.divergence), rel=2e-2, abs=tolerance)


@pytest.mark.parametrize("k", [1, 3, OUTPUTS])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distributions_beyond_the_range_of_exp(k: int, temperature: float) -> None:
    """A sure teacher, a student sure of something else, and masses that underflow: finite, and it still teaches."""
    teacher = torch.full((1, 2, OUTPUTS), -1e4)
    teacher[..., 0] = 1e4
    student = torch.full((1, 2, OUTPUTS), -300.0)
    student[..., 1] = 300.0
    student.requires_grad_()
    targets = torch.zeros(1, 2, dtype=torch.int64)
    terms = ours(student, teacher, targets, torch.ones(1, 2, dtype=torch.bool), temperature, 0.5, k)
    terms.loss.backward()
    assert torch.isfinite(torch.stack([*terms])).all()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert (student.grad[..., 0] < 0).all()
    assert (student.grad[..., 1] > 0).all()


def test_outputs_the_teacher_rules_out_contribute_nothing() -> None:
    teacher = torch.zeros(1, 1, OUTPUTS, dtype=torch.float64)
    teacher[..., 6:] = -torch.inf
    student = torch.randn(1, 1, OUTPUTS, dtype=torch.float64, requires_grad=True)
    mask, targets = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    terms = ours(student, teacher, targets, mask, 1.0, 1.0, OUTPUTS)
    terms.loss.backward()
    p = torch.log_softmax(student.detach(), -1)[0, 0, :6]
    assert float(terms.divergence) == pytest.approx(float((math.log(1 / 6) - p).mean()))
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_masked_predictions_change_neither_loss_nor_gradient(temperature: float) -> None:
    student, teacher, targets, _ = draw(3, 2.0)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    results = []
    for noise in (0.0, 50.0):
        moved = (student + noise * ~mask[..., None]).requires_grad_()
        other = torch.where(mask, targets, (targets + int(noise)) % OUTPUTS)
        terms = ours(moved, teacher + noise * torch.rand(OUTPUTS) * ~mask[..., None], other, mask, temperature, 0.5, 4)
        terms.loss.backward()
        assert moved.grad is not None
        assert (moved.grad[~mask] == 0).all()
        results.append((terms.loss.detach(), moved.grad[mask]))
    torch.testing.assert_close(results[0], results[1])


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, targets, mask = draw(5, 3.0)
    results = []
    for size in (1, 2 * OUTPUTS * 8, 1 << 20):
        monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", size)
        moved = student.clone().requires_grad_()
        terms = ours(moved, teacher, targets, mask, 2.0, 0.5, 4)
        (3 * terms.loss).backward()
        assert moved.grad is not None
        results.append(torch.cat([torch.stack([*terms]).detach(), moved.grad.flatten()]))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def softened(batch: Batch, temperatures: tuple[float, ...], temperature: float) -> Tensor:
    objective = DistillObjective(PREDICT, temperature, 1.0, temperatures, Divergence())
    return objective._soften(batch, "logprobs", temperature)


def test_softening_recovers_the_teacher_at_a_temperature() -> None:
    _, teacher, _, _ = draw(7, 3.0)
    temperatures = [0.5, 1.0, 3.0]
    kept = encode_targets(teacher, torch.zeros(teacher.shape[:2], dtype=torch.int64), TopK(k=4), temperatures)
    batch = {f"teacher_{name}": values for name, values in kept.items()}
    for temperature in temperatures:
        expected = torch.log_softmax(teacher / temperature, -1).gather(-1, kept["indices"])
        found = softened(batch, tuple(temperatures), temperature)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
