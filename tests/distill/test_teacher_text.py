"""Text that the teacher writes once: a function of seed and row, read by students in place of the rows."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_world import SEED, VOCABULARY, WRITING, World, capture, finish, jobs, recipe_of, writer
from test_student_init import student
from test_sweep import STUDENTS, SWEEP, job_of
from test_target_cache import rewrite

from overproof import pipeline
from overproof.artifacts import Artifact, Store, compute_fingerprint
from overproof.cluster.placement import resource_requests
from overproof.config import Recipe
from overproof.config import load_recipe as load_recipe
from overproof.data.manifest import Manifest
from overproof.data.order import uniforms
from overproof.data.parquet_reader import Shards
from overproof.distill import target_encoder
from overproof.distill.cache_checks import check_rows, check_text
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep import check_cache, sweep
from overproof.distill.target_cache import TargetCache
from overproof.distill.teacher_stages import generate_text
from overproof.distill.teacher_text import GENERATION_KEY, TeacherText, TextIndex
from overproof.distill.text_worker import generate, sample_token
from overproof.distill.trial_job import TrialJob
from overproof.errors import InputError
from overproof.models.hf_directory import load_model, save_model
from overproof.stage_context import Notice, ProgressEvent, TaskProgress

SMALL = {"kind": "llama", "hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 2}
ALONE = student(SMALL, name="alone", teacher_weight=0.0, text="teacher")  # pure sequence-level distillation
WORDS = student(SMALL, name="words", teacher_weight=0.5, text="teacher")  # word by word, on the teacher's text
PLAIN = student(SMALL, name="plain", teacher_weight=0.0)
LISTED = {"kind": "choice", "values": [0, 1]}
STEPS = 12
QUICK = {**SWEEP, "steps": STEPS, "validate_every": 6, "validation_rows": 8, "warmup_steps": 1}
DIGITS = Path(__file__).parents[2] / "jobs/recipes/digits.yaml"


@pytest.fixture(scope="module")
def written(text_world: World) -> Artifact:
    return finish(writer(text_world, None))


@pytest.fixture(scope="module")
def text_cache(text_world: World, written: Artifact) -> Artifact:
    return capture(text_world, None, written)


def with_text(*students: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Sections of a recipe whose students read what the teacher wrote."""
    return {"generate": {**WRITING, **changes}, "sweep": {**QUICK, "students": list(students)}}


def tokens_of(world: World, ids: np.ndarray) -> np.ndarray:
    found: np.ndarray = Shards(world.root, "train", ("tokens",)).take(ids)["tokens"]
    return found


def test_what_is_written_is_a_function_of_seed_and_row_whatever_the_batch(text_world: World) -> None:
    one, ids = writer(text_world, None), np.arange(24)
    whole = one.compute(ids)["tokens"]
    assert whole.shape == (24, 17)
    np.testing.assert_array_equal(whole[:, :5], tokens_of(text_world, ids)[:, :5])
    assert (whole[:, 5:] != tokens_of(text_world, ids)[:, 5:]).any(1).all()
    order = np.random.default_rng(0).permutation(24)
    np.testing.assert_array_equal(one.compute(order)["tokens"], whole[order])
    np.testing.assert_array_equal(one.compute(np.array([90, 7, 55]))["tokens"][1], whole[7])
    np.testing.assert_array_equal(writer(text_world, None, batch_size=5).compute(ids[:5])["tokens"], whole[:5])
    again = writer(text_world, None, seed=SEED + 1).compute(ids)["tokens"]
    assert (again != whole)[:, 5:].any(1).all()


def test_the_numbers_behind_it_are_of_the_row_alone_and_no_others_draws() -> None:
    whole = uniforms(7, GENERATION_KEY, np.arange(100), 16)
    np.testing.assert_array_equal(whole[[90, 3], :4], uniforms(7, GENERATION_KEY, np.array([90, 3]), 4))
    assert len(np.unique(whole)) == whole.size
    assert 0 <= whole.min() < 1e-3 < 1 - 1e-3 < whole.max() < 1
    assert not np.isin(whole, uniforms(7, target_encoder.DRAW_KEY, np.arange(100), 16)).any()


def test_at_temperature_0_it_is_the_likeliest_of_a_run_without_the_cache_of_keys(text_world: World) -> None:
    one, ids = writer(text_world, None, temperature=0.0), np.arange(24)
    tokens = torch.from_numpy(one.compute(ids)["tokens"].astype(np.int64))
    with torch.no_grad():
        logits = one.model(input_ids=tokens[:, :-1], use_cache=False).logits
    assert torch.equal(logits.argmax(-1)[:, 4:], tokens[:, 5:])
    assert len(tokens[:, 5:].unique()) > 20


def test_what_is_drawn_follows_the_teachers_distribution(text_world: World) -> None:
    """The first token, and the second after the commonest first; every output within five standard deviations."""
    model, rows, temperature = load_model(text_world.artifacts["train"].local() / "model"), 8000, 0.7
    prompt = torch.tensor([[9, 11, 13]])
    found = generate(
        model, prompt.expand(rows, -1), torch.from_numpy(uniforms(0, GENERATION_KEY, np.arange(rows), 2)), temperature
    )
    first = found[:, 3].mode().values
    for seen, drawn in ((found[:1, :3], found[:, 3]), (torch.cat([prompt, first.view(1, 1)], 1),
                                                       found[found[:, 3] == first, 4])):  # fmt: skip
        with torch.no_grad():
            p = (model(seen, use_cache=False).logits[0, -1].double() / temperature).softmax(-1)
        share = torch.bincount(drawn, minlength=VOCABULARY) / len(drawn)
        spread = (p * (1 - p) / len(drawn)).sqrt()
        assert len(drawn) > 500
        assert p.max() < 0.95
        assert ((share - p).abs() <= 5 * spread + 1 / len(drawn)).all()


def test_an_output_that_cannot_be_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0]]).expand(3, -1)
    drawn = sample_token(logits, torch.tensor([[0.0], [0.5], [1 - 2.0**-53]], dtype=torch.float64), 1.0)
    assert drawn.flatten().tolist() == [1, 3, 3]


def test_a_teacher_that_is_not_finite_is_reported(text_world: World, tmp_path: Path) -> None:
    model = load_model(text_world.artifacts["train"].local() / "model")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    draft = text_world.draft("train")
    save_model(model, model.config, Path(draft.uri) / "model", text_world.root / "tokenizer.json")
    broken = dataclasses.replace(text_world, artifacts=text_world.artifacts | {"train": draft.commit({}, 0)})
    (report,) = writer(broken, None)({"file": np.array([0])})
    assert "not finite while it writes; train it again" in str(report["fault"][0])


@pytest.mark.trial
@pytest.mark.usefixtures("ray_cluster")
def test_the_stage_writes_no_finished_file_of_a_killed_attempt_again(text_world: World, written: Artifact) -> None:
    """What such an attempt leaves, on a real cluster; drivers are really killed among the trials."""
    events: list[ProgressEvent] = []
    context = text_world.context("generate", events.append, **with_text(ALONE, actors=1))
    earlier = writer(text_world, None)
    earlier.job = dataclasses.replace(earlier.job, draft=context.draft)
    list(earlier({"file": np.array([1])}))
    unfinished = earlier({"file": np.array([0])})
    next(unfinished)
    (file,) = Path(earlier.job.draft.uri).glob("*.parquet")
    before = file.stat().st_mtime_ns
    metrics = generate_text(context)
    folder = Path(context.draft.uri)
    assert events[0] == Notice("1 of 3 files were captured before")
    assert events[1] == TaskProgress("generate", 32, 96, "starting 1 teachers")
    assert isinstance(events[-1], TaskProgress)
    assert events[-1].note.endswith(" tokens/s")
    assert (folder / file.name).stat().st_mtime_ns == before
    assert (metrics["rows"], metrics["tokens"], metrics["actors"]) == (96, 96 * 12, 1)
    assert sorted(path.name for path in folder.iterdir()) == [f"0000{n}.parquet" for n in range(3)] + ["text.json"]
    ids = np.arange(96)
    np.testing.assert_array_equal(
        TeacherText(folder).take(ids)["tokens"], TeacherText(written.local()).take(ids)["tokens"]
    )


def test_the_cache_is_of_the_text_and_is_checked_against_it(
    text_world: World, written: Artifact, text_cache: Artifact
) -> None:
    ids = Manifest.read(text_world.root).order(SEED).rows_at(0, 40)
    text = TeacherText(written.local()).take(ids)["tokens"]
    found = TargetCache(text_cache.local(), ("tokens", "logprobs", "indices")).take(ids)
    np.testing.assert_array_equal(found["tokens"], text)
    model = load_model(text_world.artifacts["train"].local() / "model")
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(text[:, :-1].astype(np.int64)), use_cache=False).logits
    top = logits.log_softmax(-1).gather(-1, torch.from_numpy(found["indices"].astype(np.int64)))
    np.testing.assert_allclose(found["logprobs"], top.numpy(), rtol=1e-3, atol=4e-3)
    check_rows(text_cache.local(), text_world.root, ids, written.local())
    with pytest.raises(InputError, match="from other tokens than the prepared data holds"):
        check_rows(text_cache.local(), text_world.root, ids)
    with pytest.raises(InputError, match="from other tokens than the teacher's text holds"):
        check_rows(capture(text_world, 40).local(), text_world.root, ids, written.local())


def run_of(job: TrialJob) -> tuple[StudentTrainer, list[dict[str, float]]]:
    run, rows = StudentTrainer(job), list[dict[str, float]]()
    while not rows or rows[-1]["step"] < job.settings.steps:
        rows += run.run_to_validation().curve
    return run, rows


@pytest.mark.usefixtures("ray_cluster")
def test_students_learn_from_the_text_and_controls_from_the_data(
    text_world: World, written: Artifact, text_cache: Artifact
) -> None:
    context = text_world.context("sweep", cached=text_cache, written=written, **with_text(ALONE, WORDS))
    text = TeacherText(written.local())
    for name in ("alone", "words"):
        run = StudentTrainer(job_of(context, name))
        ids = run.order.step_rows(0, 16)
        first = next(run._batches())
        np.testing.assert_array_equal(first["tokens"], text.take(ids)["tokens"])
        assert ("teacher_logprobs" in first) == (name == "words")
    metrics = sweep(context)
    assert metrics["failed"] == 0
    folder = Path(context.draft.uri)
    curves = {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
              for path in (folder / "curves").glob("*.jsonl")}  # fmt: skip
    for name in ("alone", "words"):
        losses = [row["loss"] for row in curves[name] if "loss" in row]
        assert losses[-1] < 0.95 * losses[0]
    assert "divergence" in curves["words"][0]
    assert "divergence" not in curves["alone"][0]
    plain = text_world.context("sweep", sweep={**QUICK, "students": [PLAIN]})
    assert curves["control"] == run_of(job_of(plain, "plain"))[1]  # to the bit
    assert curves["alone"] != curves["control"]


def test_a_student_of_the_text_needs_no_cache_and_nor_does_its_sweep(text_world: World, written: Artifact) -> None:
    context = text_world.context("sweep", written=written, **with_text(ALONE))
    check_cache(context)
    (job,) = jobs(context)
    assert job.target_cache is None
    assert job.distilled
    _, rows = run_of(job)
    assert rows[-1]["step"] == STEPS


def test_a_live_teacher_reads_the_text_too(text_world: World, written: Artifact) -> None:
    live = {**WORDS, "teacher": "live", "name": "live"}
    run = StudentTrainer(job_of(text_world.context("sweep", written=written, **with_text(live)), "live"))
    batch = next(run._batches())
    np.testing.assert_array_equal(
        batch["tokens"], TeacherText(written.local()).take(run.order.step_rows(0, 16))["tokens"]
    )
    assert "divergence" in run.run_to_validation().curve[0]
    silent = {**ALONE, "teacher": "live"}
    assert (
        StudentTrainer(job_of(text_world.context("sweep", written=written, **with_text(silent)), "alone")).spec.teacher
        is None
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.5}, r"text\.json: made with another temperature: 1\.0, expected 0\.5; run `generate` again"),
        ({"prompt_tokens": 6}, r"text\.json: made with another prompt \(tokens of a row\): 5, expected 6"),
    ],
)
def test_a_text_written_otherwise_is_refused(
    text_world: World, written: Artifact, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        sweep(text_world.context("sweep", written=written, **with_text(ALONE, **changes)))


def test_a_cache_of_the_data_or_of_another_text_is_refused(text_world: World, written: Artifact) -> None:
    other = finish(writer(text_world, None, temperature=0.0))
    for cached in (capture(text_world, None), capture(text_world, None, other)):
        with pytest.raises(InputError, match=r"cache\.json: made with another text of the teacher"):
            sweep(text_world.context("sweep", cached=cached, written=written, **with_text(WORDS)))


def test_text_that_goes_on_from_other_rows_is_caught(text_world: World, written: Artifact, tmp_path: Path) -> None:
    shutil.copytree(written.local(), tmp_path / "rolled")
    for file in TextIndex.read(written.local()).files:
        rewrite(written.local() / file.path, tmp_path / "rolled" / file.path,
                lambda columns: columns | {"tokens": np.roll(columns["tokens"], 1, 0)})  # fmt: skip
    ids = np.arange(40)
    check_text(TeacherText(written.local()), text_world.root, ids)
    with pytest.raises(InputError, match="row 0 does not begin with the 5 tokens of the prepared data"):
        check_text(TeacherText(tmp_path / "rolled"), text_world.root, ids)


def test_too_little_text_and_text_of_other_rows_is_refused(text_world: World) -> None:
    little = finish(writer(text_world, 40))
    with pytest.raises(InputError, match=r"are not in the teacher's text .*; raise generate\.rows, or set it to null"):
        sweep(text_world.context("sweep", written=little, **with_text(ALONE)))
    index = TextIndex.read(little.local())
    moved = tuple(file.model_copy(update={"groups": tuple(g + 1 for g in file.groups)}) for file in index.files)
    forged = index.model_copy(update={"files": moved})
    (little.local() / TextIndex.FILE).write_text(forged.model_dump_json())
    with pytest.raises(InputError, match=r"does not hold the rows that text\.json says; run `generate` again"):
        TeacherText(little.local()).take(np.array([index.files[0].groups[0] * 8 + 8]))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("digits", {"generate": WRITING}, r"generate: models of image_classification write no rows; expected no such"),
        ("text", {"sweep": {**QUICK, "students": [ALONE]}}, r"alone has text: teacher; expected a section generate"),
        ("text", with_text(PLAIN), r"generate: no student has text: teacher; give one that, or leave"),
        ("text", with_text(ALONE, prompt_tokens=128), r"prompt_tokens is 128; expected less than .*length 128"),
        ("text", with_text(ALONE, rows=100), r"12 x 16 = 192 rows, and generate\.rows is 100; raise generate\.rows"),
        ("text", with_text(ALONE, {**PLAIN, "teacher_weight": 0.5}),
         r"students\.1\.text is 'data'; with a section generate .*: expected text: teacher, or teacher: live"),
        ("text", with_text(WORDS, rows=200) | {"cache": {"rows": 300}}, r"cache\.rows is 300, and generate\.rows 200"),
        ("text", {**with_text(ALONE, PLAIN), "tune": {"space": {"teacher_weight": LISTED}}},
         r"students\.1\.text is 'data'"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_or_read_is_refused(kind: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipe_of(kind, **changes)


def test_students_of_the_data_may_stand_beside_those_of_the_text() -> None:
    live = {**PLAIN, "name": "live", "teacher_weight": 0.5, "teacher": "live"}
    recipe = recipe_of("text", **with_text(ALONE, PLAIN, live))
    assert [student.distilled for student in recipe.sweep.students] == [True, False, True]
    assert not recipe.reads_cache
    assert recipe_of("text", **with_text(WORDS, rows=200)).rows_cached == 200
    assert recipe_of("text", **with_text(WORDS)).rows_cached is None  # what is written: every row


def names(recipe: Recipe) -> list[str]:
    return [stage.name for stage in pipeline.stages_of(recipe)]


def test_stages_are_there_where_a_recipe_asks_for_them() -> None:
    digits = load_recipe(DIGITS)
    assert "generate" not in names(digits)
    assert names(recipe_of("text", **with_text(WORDS)))[:5] == ["prepare", "train", "generate", "cache", "sweep"]
    assert names(recipe_of("text", **with_text(ALONE)))[:4] == ["prepare", "train", "generate", "sweep"]
    live = {"students": [{**each, "teacher": "live"} for each in STUDENTS]}
    assert names(recipe_of("digits", sweep={**SWEEP, **live}))[:3] == ["prepare", "train", "sweep"]
    with pytest.raises(InputError, match=r"generate: the recipe has no such section; expected one of prep"):
        pipeline.stages_of(digits, "generate")
    with pytest.raises(InputError, match="cache: no student of the sweep reads it"):
        pipeline.stages_of(recipe_of("text", **with_text(ALONE)), "cache")


def test_a_stage_that_a_recipe_has_no_use_for_is_in_no_fingerprint() -> None:
    recipe = load_recipe(DIGITS)
    by_name = {stage.name: stage for stage in pipeline.STAGES}
    parents = dict[str, str]()
    for step in pipeline.resolve_stages(recipe, Store(recipe.store)):
        stage = by_name[step.stage.name]
        own = {name: parents[name] for name in stage.parents if name != "generate"}
        assert step.fingerprint == compute_fingerprint(stage.name, stage.format, stage.part(recipe), own)
        parents[stage.name] = step.fingerprint
    assert parents["cache"]


def test_how_many_teachers_write_changes_no_fingerprint() -> None:
    stage = next(stage for stage in pipeline.STAGES if stage.name == "generate")
    parts = [
        stage.part(recipe_of("text", **with_text(ALONE, **changes)))
        for changes in ({}, {"actors": 3, "cpus_per_actor": 2, "gpus_per_actor": 1}, {"temperature": 0.0})
    ]
    assert parts[0] == parts[1] != parts[2]


def test_writers_are_placed_like_the_caches_teachers() -> None:
    recipe = recipe_of("text", **with_text(ALONE, actors=3, cpus_per_actor=2))
    asked = {need.stage: need for need in resource_requests(recipe)}
    assert "cache" not in asked
    assert asked["generate"].cpus_of(3) == 7
    assert asked["generate"].why == "3 actors + 1 reader"
