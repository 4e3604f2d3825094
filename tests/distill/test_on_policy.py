"""Students that learn from what they wrote: a function of the step, the same through the shared pool as without."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from distill_world import SEED, TEACHERS, World, capture, recipe_of
from test_student_init import student
from test_sweep import STUDENTS, SWEEP, job_of

from overproof import pipeline
from overproof.artifacts import Artifact
from overproof.config import OnPolicy
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Columns
from overproof.distill.on_policy import TeacherScorer, is_on_policy_step, sample_continuations
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.trial_job import TrialJob
from overproof.errors import InputError
from overproof.models.hf_directory import build_model, load_model

SMALL = {"kind": "llama", "hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 2}
ASKED = {"k": 4, "prompt_tokens": 6, "new_tokens": 9, "rows": 2 * SWEEP["batch_size"], "wait_s": 60.0}  # type: ignore[operator]
STEPS = 8


@pytest.fixture(scope="module")
def text_cache(text_world: World) -> Artifact:
    return capture(text_world, None)


def writers(**changes: Any) -> dict[str, Any]:
    one = {**student(SMALL, temperature=2.0, on_policy=0.5), **changes}
    students = [{**one, "name": "one"}, {**one, "name": "two", "divergence": "reverse_kl"}]
    settings = {"steps": STEPS, "validate_every": 3, "validation_rows": 8, "warmup_steps": 1}
    return {**SWEEP, **settings, "students": students, "on_policy": ASKED}


def scorer(world: World, k: int = 4, apart_id: int | None = None) -> TeacherScorer:
    settings = OnPolicy.model_validate({**ASKED, "k": k})
    return TeacherScorer(world.artifacts["train"].local() / "model", settings, (1.0, 2.0), 1, apart_id)


def test_steps_are_spread_evenly() -> None:
    assert [is_on_policy_step(step, 0.5) for step in range(6)] == [False, True] * 3
    for share in (0.0, 0.1, 0.3, 1 / 3, 0.5, 0.9, 1.0):
        flags = [is_on_policy_step(step, share) for step in range(300)]
        for done in range(301):
            assert abs(sum(flags[:done]) - done * share) < 1


def test_what_is_written_is_a_function_of_weights_seed_and_step(text_world: World) -> None:
    model = build_model(TEACHERS["text"], Manifest.read(text_world.root), 4)
    prompts = torch.arange(12).view(3, 4)
    before = torch.get_rng_state()
    found = sample_continuations(model, prompts, 7, seed=1, step=5)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert found.shape == (3, 11)
    assert torch.equal(found[:, :4], prompts)
    torch.manual_seed(77)
    assert torch.equal(sample_continuations(model, prompts, 7, seed=1, step=5), found)
    for other in ({"seed": 2, "step": 5}, {"seed": 1, "step": 6}):
        assert not torch.equal(sample_continuations(model, prompts, 7, **other), found)


def test_what_is_written_follows_the_students_distribution(text_world: World) -> None:
    model = load_model(text_world.artifacts["train"].local() / "model")
    prompt = torch.tensor([[9, 11, 13]])
    drawn = sample_continuations(model, prompt.expand(4000, -1), 1, seed=0, step=0)[:, -1]
    with torch.no_grad():
        p = model(prompt, use_cache=False).logits[0, -1].softmax(-1)
    found = torch.bincount(drawn, minlength=len(p)) / len(drawn)
    spread = (p * (1 - p) / len(drawn)).sqrt()
    assert p.max() < 0.9
    assert ((found - p).abs() <= 5 * spread + 1 / len(drawn)).all()


def test_no_answer_depends_on_what_else_is_asked(text_world: World) -> None:
    one, rng = scorer(text_world), np.random.default_rng(0)
    rows, others = rng.integers(1, 320, (16, 15)), rng.integers(1, 320, (30, 15))
    alone = one.score(rows)
    assert {name: value.shape for name, value in alone.items()} == {
        "indices": (16, 9, 4), "logprobs": (16, 9, 4), "logsumexp": (16, 9, 1)}  # fmt: skip
    for before in (1, 7, 16, 30):
        together = one.score(np.concatenate([others[:before], rows, others]))
        for name, value in alone.items():
            assert np.array_equal(together[name][before : before + 16], value)  # to the last bit
    with torch.no_grad():
        logits = one.model(input_ids=torch.from_numpy(rows[:, :-1]), use_cache=False).logits[:, 5:]
    expected = logits.log_softmax(-1).gather(-1, torch.from_numpy(alone["indices"]))
    np.testing.assert_allclose(alone["logprobs"], expected.numpy(), rtol=1e-5, atol=1e-5)
    expected = (logits.log_softmax(-1) / 2).logsumexp(-1)
    np.testing.assert_allclose(alone["logsumexp"][..., 0], expected.numpy(), rtol=1e-5)


class RecordingScorer:
    """A scorer, and the tokens that it was asked about."""

    def __init__(self, scorer: TeacherScorer) -> None:
        self.scorer, self.requests = scorer, list[np.ndarray]()

    def score(self, tokens_BS: np.ndarray) -> Columns:
        self.requests.append(tokens_BS)
        return self.scorer.score(tokens_BS)


def begun(world: World, cached: Artifact, name: str, **changes: Any) -> TrialJob:
    return job_of(world.context("sweep", cached=cached, sweep=writers(**changes)), name)


def steps(run: StudentTrainer) -> list[dict[str, float]]:
    rows = list[dict[str, float]]()
    while not rows or rows[-1]["step"] < STEPS:
        rows += run.run_to_validation().curve
    return rows


def test_the_loss_is_the_divergence_of_what_was_written(text_world: World, text_cache: Artifact) -> None:
    everything = RecordingScorer(scorer(text_world, k=320))
    run = StudentTrainer(begun(text_world, text_cache, "one", on_policy=1.0), everything)
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    row = run.run_to_validation().curve[0]
    tokens = torch.from_numpy(everything.requests[0])
    start = build_model(run.job.student.model, run.manifest, SEED)  # type: ignore[arg-type]
    start.load_state_dict(state)
    assert torch.equal(sample_continuations(start, tokens[:, :6], 9, SEED, 0), tokens)
    with torch.no_grad():
        log_p, log_q = (
            (model(tokens[:, :-1], use_cache=False).logits[:, 5:].double() / 2).log_softmax(-1)
            for model in (start, everything.scorer.model)
        )
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean() * 4  # T squared
    assert row["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert row["on_policy"] == 1
    first = next(run.train.steps(run.order, 16, 0, 1))
    assert np.array_equal(everything.requests[0][:, :6], first["tokens"][:, :6])


def test_a_student_that_writes_goes_on_to_the_last_bit(text_world: World, text_cache: Artifact) -> None:
    recording = RecordingScorer(scorer(text_world))
    job = begun(text_world, text_cache, "one", relations={"heads": 2, "weight": 0.1})
    whole = steps(
        StudentTrainer(
            dataclasses.replace(job, checkpoints=begun(text_world, text_cache, "one").checkpoints), recording
        )
    )
    assert [row["step"] for row in whole if row.get("on_policy")] == [2, 4, 6, 8]
    assert len(recording.requests) == 4
    first = StudentTrainer(job, recording)
    first.run_to_validation()
    first.checkpoint_writer.wait()
    second = StudentTrainer(job, scorer(text_world))
    assert second.resumed_step == 3
    assert steps(second) == whole
    alone = StudentTrainer(dataclasses.replace(job, distilled=False, name="control", checkpoints=begun(
        text_world, text_cache, "one").checkpoints))  # fmt: skip
    assert not any("on_policy" in row for row in steps(alone))


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(InputError, match="student one has a share on_policy; expected a section on_policy"):
        recipe_of("text", sweep={**writers(), "on_policy": None})
    with pytest.raises(InputError, match=r"6 \+ new_tokens 200 = 206 is more than a row of sequence_length 128"):
        recipe_of("text", sweep={**writers(), "on_policy": {**ASKED, "new_tokens": 200}})
    with pytest.raises(InputError, match=r"models of image_classification write no rows"):
        recipe_of("digits", sweep={**SWEEP, "students": STUDENTS, "on_policy": ASKED})


def test_how_many_teachers_score_changes_no_fingerprint() -> None:
    stage = next(stage for stage in pipeline.STAGES if stage.name == "sweep")
    sections = [
        stage.part(recipe_of("text", sweep={**writers(), "on_policy": {**ASKED, **changes}}))
        for changes in ({}, {"actors": 3, "wait_s": 1.0, "cpus_per_actor": 2}, {"rows": 64})
    ]
    assert sections[0] == sections[1] != sections[2]
