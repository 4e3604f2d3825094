"""Students, writers and scorers in bf16, on a CPU: near what they are in fp32, and as sure of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_world import World, jobs, recipe_of, writer
from test_feature_losses import RELATIONS, STATES, begun
from test_on_policy import ASKED
from test_sweep import NARROW, STUDENTS, SWEEP

from overproof.artifacts import Artifact
from overproof.config import OnPolicy
from overproof.distill.on_policy import TeacherScorer
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep_tracker import SweepTracker
from overproof.distill.trial_job import MAX_DEATHS, TrialJob
from overproof.distill.tune_trial import InProcessTrainer
from overproof.errors import InputError
from overproof.stage_context import no_progress


def in_bf16(job: TrialJob) -> TrialJob:
    return TrialJob(**vars(job) | {"settings": job.settings.model_copy(update={"precision": "bf16"})})


def test_a_student_in_bf16_follows_one_in_fp32_and_goes_on_to_the_last_bit(
    digits_world: World, digits_cache: Artifact
) -> None:
    """With a teacher beside it, whose features it learns from: both compute alike, and weights stay whole."""
    asked: dict[str, Any] = {**RELATIONS, **STATES, "teacher": "live"}
    job = in_bf16(begun(digits_world, digits_cache, NARROW, **asked))
    plain = StudentTrainer(begun(digits_world, digits_cache, NARROW, **asked)).run_to_validation()
    first = StudentTrainer(job)
    found = first.run_to_validation()
    assert found.validation_loss != plain.validation_loss
    assert found.validation_loss == pytest.approx(plain.validation_loss, rel=0.02)
    for name in ("loss", "relations", "states"):
        values, expected = ([row[name] for row in segment.curve if name in row] for segment in (found, plain))
        assert values == pytest.approx(expected, rel=0.05)
    teacher = first.spec.teacher
    assert teacher is not None
    assert any(weight.dtype == torch.bfloat16 for weight in teacher.parameters())
    assert {weight.dtype for weight in first.engine.trained.parameters()} == {torch.float32}
    first.checkpoint_writer.wait()
    second = StudentTrainer(job)
    assert second.resumed_step == found.steps
    assert second.run_to_validation() == found
    assert second.run_to_validation() == first.run_to_validation()


def test_scores_and_text_in_bf16(text_world: World) -> None:
    rows = np.random.default_rng(0).integers(1, 320, (16, 15))
    teacher = text_world.artifacts["train"].local() / "model"
    plain, half = (
        TeacherScorer(teacher, OnPolicy.model_validate(ASKED | {"precision": precision}), (1.0,), threads=1).score(rows)
        for precision in ("fp32", "bf16")
    )
    assert 0 < np.abs(plain["logprobs"] - half["logprobs"]).max() < 0.1
    ids = np.arange(24)
    one = writer(text_world, None, precision="bf16")
    assert one.index.identity.precision == "bf16"
    np.testing.assert_array_equal(one.compute(ids[::-1])["tokens"], one.compute(ids)["tokens"][::-1])


def test_a_gpu_that_torch_does_not_find_is_why_a_trial_failed(
    digits_world: World, digits_cache: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before its first step: nothing of it is known but the reason."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = begun(digits_world, digits_cache, NARROW)
    trial = InProcessTrainer()
    trial.start(TrialJob(**vars(job) | {"settings": job.settings.model_copy(update={"gpus_per_trial": 0.5})}))
    tracker = SweepTracker(no_progress, job.settings.steps, 1, MAX_DEATHS, tmp_path)
    tracker.record_result(trial.run_to_validation())
    assert "0.5 GPUs are reserved here, and torch" in tracker.failures[job.name]


def test_a_group_says_its_own_precision(digits_world: World) -> None:
    group = {"workers": 2, "precision": "bf16"}
    with pytest.raises(InputError, match=r"precision is 'tf32', of students that one process trains; .*group\.precis"):
        recipe_of("digits", sweep={**SWEEP, "precision": "tf32", "group": group})
    (job,) = jobs(digits_world.context("sweep", sweep={**SWEEP, "students": STUDENTS[:1], "group": group}))
    assert job.settings.live_precision == "bf16"
