"""What a student starts from, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_world import SEED, TEACHERS, World, recipe_of
from test_sweep import NARROW, STUDENTS, SWEEP, job_of
from test_sweep_resume import to_end
from torch import nn

from overproof import pipeline
from overproof.artifacts import Artifact, Store
from overproof.cluster import recipe_checks
from overproof.config import Pretrained, Student, TeacherLayers
from overproof.data.manifest import TOKENIZER, Manifest
from overproof.distill.pruning import keep_layers
from overproof.distill.student_init import initial_student
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.student_validation import check_student
from overproof.distill.trial_job import CONTROL
from overproof.distill.tune_trial import InProcessTrainer
from overproof.errors import InputError
from overproof.models.base import shape_of
from overproof.models.hf_directory import (
    Batch,
    build_model,
    count_parameters,
    load_model,
    save_model,
    to_tensors,
)
from overproof.models.llama import Llama
from overproof.models.sizes import model_size, student_size
from overproof.models.vit import Vit

DEEP: dict[str, Llama | Vit] = {kind: teacher.model_copy(update={"layers": 4}) for kind, teacher in TEACHERS.items()}


@pytest.fixture(params=["digits", "text"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(f"{request.param}_world")
    return found


def some_rows(world: World) -> Batch:
    rng, manifest = np.random.default_rng(0), Manifest.read(world.root)
    if world.kind == "digits":
        return to_tensors({"pixels": rng.random((3, 1, 8, 8), np.float32), "label": np.arange(3)})
    tokens_BS = rng.integers(1, manifest.outputs, (3, manifest.positions + 1))
    return to_tensors({"tokens": tokens_BS, "length": np.full(3, manifest.positions)})


def student(model: dict[str, Any] | Pretrained | TeacherLayers, **changes: Any) -> dict[str, Any]:
    told = model if isinstance(model, dict) else model.model_dump(mode="json")
    return {**STUDENTS[0], "name": "begun", "model": told, **changes}


def test_layers_are_spaced_as_distilbert_has_them() -> None:
    assert TeacherLayers(layers=6).of(12) == (0, 2, 4, 7, 9, 11)
    assert TeacherLayers(layers=(1, 3)).of(4) == (1, 3)
    assert TeacherLayers(layers=1).of(5) == (0,)
    for teacher in range(2, 20):
        for count in range(2, teacher + 1):
            found = TeacherLayers(layers=count).of(teacher)
            gaps = np.diff(found)
            assert (found[0], found[-1], len(found)) == (0, teacher - 1, count)
            assert gaps.min() >= 1
            assert gaps.max() - gaps.min() <= 1


def test_layers_that_the_teacher_lacks_are_refused() -> None:
    for layers, found in ((3, "3"), ([0, 2], r"\[0, 2\]")):
        with pytest.raises(InputError, match=rf"sweep\.students\.0\.model\.layers {found}: the teacher has 2"):
            recipe_of("digits", sweep={"students": [student({"kind": "teacher_layers", "layers": layers})]})
    for unordered in ([1, 0], [0, 0], []):
        with pytest.raises(InputError, match=r"ascending order"):
            TeacherLayers.parse({"layers": unordered})


def test_the_layers_that_stay_are_the_teachers(world: World) -> None:
    whole = build_model(DEEP[world.kind], Manifest.read(world.root), 5).eval()
    batch = some_rows(world)
    both = keep_layers(whole, (0, 2)).eval()
    found, same = (
        world.predict(both, batch).logits_BPV,
        world.predict(keep_layers(whole, range(4)).eval(), batch).logits_BPV,
    )
    assert torch.equal(same, world.predict(whole, batch).logits_BPV)
    whole.base_model.layers = nn.ModuleList(whole.base_model.layers[index] for index in (0, 2))
    assert torch.equal(found, world.predict(whole, batch).logits_BPV)
    assert both.config.num_hidden_layers == 2
    assert [layer.layer_idx for name, layer in both.named_modules() if name.endswith("self_attn")] in ([], [0, 1])


def test_a_student_of_layers_is_as_large_as_the_plan_says(world: World, tmp_path: Path) -> None:
    manifest, deep = Manifest.read(world.root), DEEP[world.kind]
    model = build_model(deep, manifest, 0)
    save_model(model, model.config, tmp_path / "deep")
    for layers in (TeacherLayers(layers=3), TeacherLayers(layers=(1, 3))):
        made = count_parameters(keep_layers(model, layers.of(4)))
        for teacher in (deep, Pretrained(path=str(tmp_path / "deep"))):
            found = student_size(layers, teacher, shape_of(manifest))
            assert (found.parameters, found.layers) == (made, layers.count)
    whole = model_size(deep, shape_of(manifest)).parameters
    [warning] = recipe_checks.warn_not_smaller({"less": whole - 1, "same": whole}, whole)
    assert (warning.about, warning.state) == ("student same", "warning")


def test_the_control_starts_from_the_same_weights(digits_world: World, digits_cache: Artifact) -> None:
    begun = student(TeacherLayers(layers=1))
    context = digits_world.context("sweep", cached=digits_cache, sweep={**SWEEP, "students": [begun]})
    teacher = load_model(digits_world.artifacts["train"].local() / "model").state_dict()
    job = job_of(context, "begun")
    taught, alone = (
        StudentTrainer(job),
        StudentTrainer(dataclasses.replace(job_of(context, "begun"), name=CONTROL, distilled=False)),
    )
    for run in (taught, alone):
        for name, value in run.model.state_dict().items():
            assert torch.equal(value, teacher[name])
    first = taught.run_to_validation().curve[0], alone.run_to_validation().curve[0]
    assert first[0]["cross_entropy"] == pytest.approx(first[1]["loss"], rel=1e-6)
    taught.checkpoint_writer.wait()
    second = StudentTrainer(job)
    assert second.resumed_step == 7
    assert to_end(second) == to_end(StudentTrainer(job_of(context, "begun")))


def test_a_directory_is_taken_as_it_is(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(world.root)
    model = build_model(DEEP[world.kind], manifest, 8)
    save_model(model, model.config, tmp_path / "pruned", world.root / TOKENIZER if world.kind == "text" else None)
    monkeypatch.chdir(tmp_path)
    context = world.context("sweep", cached=world.artifacts["prepare"], sweep={
        "students": [student(Pretrained(path="pruned"), temperature=2.0)]})  # fmt: skip
    job = job_of(context, "begun")
    assert job.student.model == Pretrained(path=str(tmp_path / "pruned"))
    check_student(job.student, job.prepared, job.trained)
    found = initial_student(job.student.model, manifest, SEED, tmp_path)
    assert found.training
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_a_student_with_dropout_goes_on_to_the_last_bit(
    digits_world: World, digits_cache: Artifact, tmp_path: Path
) -> None:
    model = build_model(DEEP["digits"], Manifest.read(digits_world.root), 8)
    model.config.hidden_dropout_prob = 0.2
    save_model(model, model.config, tmp_path / "dropping")
    begun = student(Pretrained(path=str(tmp_path / "dropping")))
    context = digits_world.context("sweep", cached=digits_cache, sweep={**SWEEP, "students": [begun]})
    job, whole = job_of(context, "begun"), to_end(StudentTrainer(job_of(context, "begun")))
    first = StudentTrainer(job)
    first.run_to_validation()
    first.checkpoint_writer.wait()
    torch.manual_seed(99)
    second = StudentTrainer(job)
    assert second.model.vit.layers[0].dropout.p == 0.2
    assert second.resumed_step == 7
    assert to_end(second) == whole


def test_a_directory_that_does_not_fit_is_refused(text_world: World, digits_world: World, tmp_path: Path) -> None:
    manifest = Manifest.read(text_world.root)
    prepared, trained = (text_world.artifacts[stage] for stage in ("prepare", "train"))

    def refusal(path: Path) -> str:
        with pytest.raises(InputError) as refused:
            check_student(Student.model_validate(student(Pretrained(path=str(path)))), prepared, trained)
        return str(refused.value)

    assert refusal(tmp_path / "none").startswith("student begun: ")
    assert "a vit with 10 outputs; the data is for language_modeling" in refusal(
        digits_world.artifacts["train"].local() / "model"
    )
    small = build_model(TEACHERS["text"], manifest.model_copy(update={"outputs": 300}), 0)
    save_model(small, small.config, tmp_path / "small", text_world.root / TOKENIZER)
    assert "a llama with 300 outputs; the data is for language_modeling and needs 320" in refusal(tmp_path / "small")
    model = build_model(TEACHERS["text"], manifest, 0)
    save_model(model, model.config, tmp_path / "mute")
    assert "mute: no such file in it as tokenizer.json" in refusal(tmp_path / "mute")
    (tmp_path / "mute" / TOKENIZER).write_text("{}")
    assert "not a tokenizer.json" in refusal(tmp_path / "mute")


def test_files_that_a_student_starts_from_are_part_of_the_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"a": 1}))
    recipe = recipe_of(
        "digits", sweep={"students": [student(Pretrained(path=str(folder))), {**STUDENTS[0], "model": NARROW}]}
    )

    def prints() -> dict[str, str]:
        steps = pipeline.resolve_stages(recipe, Store(str(tmp_path / "store")), "sweep")
        return {step.stage.name: step.fingerprint for step in steps}

    before = prints()
    assert prints() == before
    (folder / "config.json").write_text(json.dumps({"a": 12}))
    after = prints()
    assert after.pop("sweep") != before.pop("sweep")
    assert after == before
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="pruned: no such folder"):
        prints()


def test_the_next_student_of_a_process_finds_the_memory_of_the_last(
    digits_world: World, digits_cache: Artifact
) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP)
    trainer = InProcessTrainer()
    trainer.start(job_of(context, "wide"))
    trainer.run_to_validation()
    assert trainer.student is not None
    last = weakref.ref(trainer.student.model)
    trainer.student.checkpoint_writer.wait()  # whose thread holds the model while it writes
    trainer.start(job_of(context, "narrow"))
    assert last() is None
