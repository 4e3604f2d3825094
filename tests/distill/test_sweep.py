"""The sweep stage on a real cluster, and one student without it."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distill_world import World, capture, jobs, make
from hypothesis import given
from hypothesis import settings as settings_
from hypothesis import strategies as st

from overproof.artifacts import Artifact, Store
from overproof.cluster.placement import Capacity, NodeShape
from overproof.config import Asha, Median, NoStop, Optimization, Pbt, Sweep
from overproof.data.parquet_reader import Shards
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep import check_cache, pareto_students, sweep, train_students
from overproof.distill.sweep_state import SweepState
from overproof.distill.sweep_tracker import SweepTracker
from overproof.distill.target_cache import TargetIndex
from overproof.distill.trial_job import MAX_DEATHS, TrialJob, rung_steps
from overproof.distill.tune_search import trial_slots
from overproof.errors import InputError
from overproof.models.hf_directory import count_parameters, load_model
from overproof.stage_context import Notice, ProgressEvent, StageContext, TaskProgress, no_progress
from overproof.train.loop import validation_loss

STEPS, GRACE = 24, 8
NARROW = {"kind": "vit", "hidden_size": 8, "intermediate_size": 16, "layers": 1, "heads": 2}
WIDE = {"kind": "vit", "hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2}
STUDENTS = [
    {"name": "wide", "temperature": 2.0, "teacher_weight": 0.5, "model": WIDE},
    {"name": "twin", "temperature": 2.0, "teacher_weight": 0.5, "model": WIDE},
    {"name": "cold", "temperature": 0.5, "teacher_weight": 0.5, "model": WIDE, "divergence": "jsd"},
    {"name": "narrow", "temperature": 2.0, "teacher_weight": 0.5, "model": NARROW},
]
SWEEP = {
    "students": STUDENTS,
    "steps": STEPS,
    "batch_size": 16,
    "learning_rate": 2e-2,
    "warmup_steps": 4,
    "validate_every": 7,
    "validation_rows": 64,
    "concurrent_trials": 2,
}
TUNE = {"scheduler": {"kind": "asha", "grace_steps": GRACE}}


@dataclasses.dataclass(frozen=True)
class Swept:
    """A finished sweep."""

    context: StageContext
    folder: Path
    metrics: dict[str, Any]
    events: list[ProgressEvent]
    printed: str
    junk: set[str]

    @property
    def trials(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "trials.json").read_text())
        return found

    def curve(self, name: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "curves" / f"{name}.jsonl").read_text().splitlines()]


@contextmanager
def printing(into: Path) -> Iterator[None]:
    """Everything that goes to this process's standard output and error."""
    kept = os.dup(1), os.dup(2)
    with into.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)


@pytest.fixture(scope="module")
def swept(ray_cluster: str, digits_world: World, digits_cache: Artifact, tmp_path_factory: Any) -> Swept:
    events: list[ProgressEvent] = []
    output = tmp_path_factory.mktemp("printed") / "output"
    context = digits_world.context("sweep", events.append, digits_cache, sweep=SWEEP, tune=TUNE)
    before = scratch()
    with printing(output):
        metrics = sweep(context)
    return Swept(context, Path(context.draft.uri), metrics, events, output.read_text(), scratch() - before)


def scratch() -> set[str]:
    """What stages leave in the folder for temporary files."""
    return {path.name for path in Path(tempfile.gettempdir()).glob("overproof*")}


def test_every_student_is_accounted_for(swept: Swept) -> None:
    trials = {trial["name"]: trial for trial in swept.trials["trials"]}
    assert list(trials) == ["wide", "twin", "cold", "narrow"]
    finished = [trial for trial in trials.values() if trial["steps"] == STEPS]
    assert finished
    assert {trial["status"] for trial in finished} == {"finished"}
    assert all(trial["status"] == "stopped" for trial in trials.values() if trial["steps"] < STEPS)
    assert all(trial["steps"] in {8, 16, STEPS} for trial in trials.values())  # stopped at a rung
    winner = trials[swept.trials["winner"]]
    assert winner["validation_loss"] == min(trial["validation_loss"] for trial in finished)
    assert swept.metrics["winner"] == winner["name"] == swept.trials["kept"][0]
    assert swept.metrics["stopped_early"] == len(trials) - len(finished)
    assert trials["narrow"]["parameters"] < trials["wide"]["parameters"]


def test_the_model_code_is_imported_once_an_actor(swept: Swept) -> None:
    trials = swept.trials["trials"]
    assert len({trial["pid"] for trial in trials}) <= 2
    for pid in {trial["pid"] for trial in trials}:
        paid = [trial["import_seconds"] for trial in trials if trial["pid"] == pid]
        assert sum(seconds > 0 for seconds in paid) == 1
        assert sum(seconds == 0 for seconds in paid) == len(paid) - 1


def test_all_trials_read_the_same_rows(swept: Swept) -> None:
    wide, twin = swept.curve("wide"), swept.curve("twin")
    both = min(len(wide), len(twin))
    assert both >= GRACE
    assert wide[:both] == twin[:both]


def test_curves_have_every_step_and_validate_at_rungs(swept: Swept) -> None:
    winner = swept.curve(swept.trials["winner"])
    assert [row["step"] for row in winner if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in winner if "validation_loss" in row] == [7, 8, 14, 16, 21, 24]
    assert {"step", "loss", "learning_rate", "grad_norm"} <= set(winner[0])
    for trial in [*swept.trials["trials"], swept.trials["control"]]:
        assert swept.curve(trial["name"])[-1] == {"step": trial["steps"], "validation_loss": trial["validation_loss"]}


def test_the_control_differs_by_the_teacher_alone(swept: Swept, digits_world: World) -> None:
    control, name = swept.trials["control"], swept.trials["winner"]
    winner = next(trial for trial in swept.trials["trials"] if trial["name"] == name)
    assert control["parameters"] == winner["parameters"]
    assert (control["steps"], control["status"], control["teacher_weight"]) == (STEPS, "finished", 0.0)
    alone = StudentTrainer(dataclasses.replace(job_of(swept.context, name), distilled=False, name="control"))
    rows = [row for _ in range(6) for row in alone.run_to_validation().curve]
    assert [row["step"] for row in rows] == [row["step"] for row in swept.curve("control")]
    for here, there in zip(rows, swept.curve("control"), strict=True):
        assert here == there  # bit for bit
    first, second = swept.curve("control")[0], swept.curve(name)[0]
    assert first["learning_rate"] == second["learning_rate"]
    assert first["loss"] == pytest.approx(second["cross_entropy"], rel=1e-5)  # same weights, same rows


def test_the_written_models_are_the_ones_that_were_judged(swept: Swept, digits_world: World) -> None:
    rows = Shards(digits_world.root, "validation")
    run = StudentTrainer(job_of(swept.context, "wide"))
    for folder, trial in (
        *((f"students/{t['name']}", t) for t in swept.trials["trials"] if t["name"] in swept.trials["kept"]),
        ("control", swept.trials["control"]),
    ):
        model = load_model(swept.folder / folder)
        assert count_parameters(model) == trial["parameters"]
        found = validation_loss(model, digits_world.predict, run.validation)
        assert found == pytest.approx(trial["validation_loss"], rel=1e-5)
    assert rows.rows > 64  # the losses above are of a part, spread over the split


def test_a_trial_is_its_run_alone(swept: Swept) -> None:
    name = swept.trials["winner"]
    run = StudentTrainer(job_of(swept.context, name))
    rows = [row for _ in range(6) for row in run.run_to_validation().curve]
    assert rows == swept.curve(name)


def test_nothing_else_is_left_or_printed(swept: Swept) -> None:
    assert {path.name for path in swept.folder.iterdir()} == {"students", "control", "curves", "events", "trials.json"}
    assert {path.name for path in (swept.folder / "students").iterdir()} == set(swept.trials["kept"])
    for name in swept.trials["kept"]:
        model = swept.folder / "students" / name
        assert {path.name for path in model.iterdir()} == {"config.json", "model.safetensors"}
    assert swept.junk == set()
    assert swept.printed == ""


def test_progress_is_told_all_along(swept: Swept) -> None:
    told = [event for event in swept.events if isinstance(event, TaskProgress)]
    trials = [event for event in told if event.task == "sweep"]
    assert trials[0] == TaskProgress("sweep", 0, 4 * STEPS, "starting trials")
    assert trials[-1].done == 4 * STEPS
    assert [event.done for event in trials] == sorted(event.done for event in trials)
    assert "best " in trials[-1].note
    control = [event for event in told if event.task == "control"]
    assert (control[0].done, control[-1].done) == (0, STEPS)


def job_of(context: StageContext, name: str) -> TrialJob:
    """A student's job as the sweep has it, from the start."""
    job = next(job for job in jobs(context) if job.name == name)
    fresh = dataclasses.replace(job.checkpoints, uri=f"{job.checkpoints.uri}-{secrets.token_hex(4)}")
    return dataclasses.replace(job, checkpoints=fresh)


def test_a_search_covers_steps_and_roundings(
    ray_cluster: str, digits_world: World, digits_cache: Artifact, tmp_path: Path
) -> None:
    """Each trial runs its own steps to their end, and the winner's control as many."""
    space = {"steps": {"kind": "choice", "values": [6, 20]}, "rounding": {"kind": "choice", "values": [None, "int8"]}}
    settings = {**SWEEP, "students": [STUDENTS[3]], "validate_every": 5}
    events: list[ProgressEvent] = []
    context = digits_world.context("sweep", events.append, digits_cache, sweep=settings, tune={"space": space})
    assert context.recipe.rows_read == 20 * 16
    sweep(context)
    found = json.loads((Path(context.draft.uri) / "trials.json").read_text())
    expected = [(6, None), (6, "int8"), (20, None), (20, "int8")]
    assert [(each["values"]["steps"], each["values"]["rounding"]) for each in found["trials"]] == expected
    assert [each["steps"] for each in found["trials"]] == [6, 6, 20, 20]
    assert {each["status"] for each in found["trials"]} == {"finished"}
    losses = [each["validation_loss"] for each in found["trials"]]
    assert len(set(losses)) == 4
    assert max(losses[2:]) < min(losses[:2])
    winner = next(each for each in found["trials"] if each["name"] == found["winner"])
    assert found["control"]["steps"] == winner["steps"] == 20
    done = [event for event in events if isinstance(event, TaskProgress) and event.task == "sweep"][-1]
    assert (done.done, done.total) == (80, 80)


def test_trials_of_other_steps_are_not_compared_on_their_way(digits_world: World, digits_cache: Artifact) -> None:
    space = {"steps": {"kind": "choice", "values": [6, 20]}}
    with pytest.raises(
        InputError, match=r"scheduler asha compares trials at the same step.*set scheduler\.kind to none"
    ):
        digits_world.context("sweep", cached=digits_cache, sweep=SWEEP, tune={**TUNE, "space": space})


def test_a_trial_that_takes_long_tells_its_steps_between_validations(
    digits_world: World, digits_cache: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("overproof.distill.student_trainer.TELL_EVERY_S", 0.0)
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP, tune=TUNE)
    shown = list[ProgressEvent]()
    tracker = SweepTracker(shown.append, STEPS, 2, MAX_DEATHS, tmp_path)
    tracker.add_trial("wide")
    trainer = StudentTrainer(dataclasses.replace(job_of(context, "wide"), progress=tracker.show))
    first = trainer.run_to_validation().steps
    assert 1 < first < STEPS
    told = [event for event in shown if isinstance(event, TaskProgress)]
    assert [(event.done, event.total) for event in told] == [(step, 2 * STEPS) for step in range(first + 1)]
    assert told[-1].note == "training"
    tracker.start_controls({"control": STEPS})
    tracker.show(TaskProgress("control", 3, STEPS, "loss 1.000"))
    assert shown[-1] == TaskProgress("control", 3, STEPS, "control loss 1.000")
    tracker.show(Notice("a word"))
    assert shown[-1] == Notice("a word")


def test_a_student_learns_alike_from_every_scheme(digits_world: World, digits_cache: Artifact) -> None:
    """All ten classes, once as the top 10 and once as they are, are the same teacher; drawn ones are close to it."""
    ends = {}
    for scheme in ({"kind": "topk", "k": 10}, {"kind": "dense"}, {"kind": "sampled", "k": 4, "draws": 16}):
        cached = capture(digits_world, 400, scheme=scheme)
        students = [{**STUDENTS[0], "teacher_weight": 1.0}]
        context = digits_world.context(
            "sweep", cached=cached, cache={"scheme": scheme}, sweep={**SWEEP, "students": students}, tune=TUNE
        )
        check_cache(context)
        run = StudentTrainer(job_of(context, "wide"))
        ends[scheme["kind"]] = [run.run_to_validation() for _ in range(4)][-1].curve[-1]["validation_loss"]
    assert ends["dense"] == pytest.approx(ends["topk"], rel=1e-4)
    assert ends["sampled"] == pytest.approx(ends["topk"], rel=0.02)
    with pytest.raises(InputError, match=r"made with another scheme"):
        check_cache(
            digits_world.context("sweep", cached=digits_cache, cache={"scheme": {"kind": "dense"}}, sweep=SWEEP)
        )


WILD = {**STUDENTS[3], "name": "wild", "model": {**NARROW, "initializer_range": 1e30}}


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_without_a_student_that_finishes_ends_with_the_reason(
    digits_world: World, digits_cache: Artifact
) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep={**SWEEP, "students": [WILD]})
    with pytest.raises(InputError, match=r"^student wild: step 1: loss is .*lower learning_rate.* no student of the"):
        sweep(context)


def check_that_laggards_are_stopped(
    scheduler: dict[str, Any], digits_world: World, digits_cache: Artifact, curves: Path
) -> None:
    learner = {**STUDENTS[0], "model": {**WIDE, "initializer_range": 0.2}}
    rates = {"learning_rate": {"kind": "choice", "values": [3e-2, 1e-2, 1e-6, 1e-7, 1e-8]}}
    context = digits_world.context(
        "sweep", cached=digits_cache, sweep={**SWEEP, "students": [learner], "concurrent_trials": 1},
        tune={"space": rates, "scheduler": scheduler},
    )  # fmt: skip
    tracker = SweepTracker(context.progress, STEPS, 5, MAX_DEATHS, curves)
    trials = train_students(context, SweepState(context.draft), {}, tracker, None)
    entries = {entry["values"]["learning_rate"]: entry for entry in map(tracker.trial_entry, trials)}
    statuses = {rate: entry["status"] for rate, entry in entries.items()}
    assert len(entries) == 5
    assert statuses[3e-2] == "finished"
    assert "stopped" in {statuses[rate] for rate in (1e-6, 1e-7, 1e-8)}
    winner = tracker.winner()
    assert winner is not None
    assert winner["values"]["learning_rate"] == 3e-2


def end_by(number: signal.Signals, world: World, cached: Artifact) -> None:
    """A sweep whose process gets a signal after the first validation of its one student."""
    sent: list[int] = []

    def progress(event: ProgressEvent) -> None:
        if isinstance(event, TaskProgress) and event.done and not sent:
            sent.append(event.done)
            os.kill(os.getpid(), number)

    sweep(world.context("sweep", progress, cached, sweep={**SWEEP, "students": STUDENTS[:1]}))


@pytest.mark.usefixtures("ray_cluster")
def test_ctrl_c_ends_the_sweep(digits_world: World, digits_cache: Artifact) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        end_by(signal.SIGINT, digits_world, digits_cache)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_that_tune_ends_short_is_a_fault_and_not_the_users_wish(
    digits_world: World, digits_cache: Artifact
) -> None:
    """Tune ends its run at SIGUSR1 as well, and as quietly."""
    handler = signal.getsignal(signal.SIGUSR1)
    try:
        message = r"Ray Tune ended the sweep before these trials: wide \(at step (7|14|21) of 24\)$"
        with pytest.raises(RuntimeError, match=message):
            end_by(signal.SIGUSR1, digits_world, digits_cache)
    finally:
        signal.signal(signal.SIGUSR1, handler)


def test_which_trials_did_not_end_is_said_with_what_is_known_of_them(tmp_path: Path) -> None:
    tracker = SweepTracker(no_progress, STEPS, 5, MAX_DEATHS, tmp_path)
    for name in ("ended", "dead", "young"):
        tracker.add_trial(name)
    tracker.record_end("ended")
    tracker.record_death("dead", "its node is gone", retry=True)
    assert tracker.unfinished() == [
        "dead (at step 0 of 24, its process died: its node is gone)",
        "young (at step 0 of 24)",
        "2 that never started",
    ]
    for _ in range(MAX_DEATHS):
        tracker.record_death("dead", "its node is gone", retry=True)
    assert tracker.failures == {"dead": "its node is gone"}
    assert [line.split()[0] for line in tracker.unfinished()] == ["young", "2"]


@settings_(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), max_size=20))
def test_progress_is_that_of_a_count_over_all_trials(told: list[tuple[str, int]]) -> None:
    """Results come in any order, and a trial's last one counts."""
    shown = list[ProgressEvent]()
    with tempfile.TemporaryDirectory() as curves:
        tracker = SweepTracker(shown.append, 10, 3, MAX_DEATHS, Path(curves))
        last = dict[str, tuple[int, int]]()
        for name in "abc":
            tracker.add_trial(name)
        for name, loss in told:
            steps = last.get(name, (0, 0))[0] + 2
            failed = "too large" if loss == 4 else None
            result = {"name": name, "steps": steps, "validation_loss": loss, "failed": failed, "pid": 1, "faults": (),
                      "resumed_step": 0, "curve": [{"step": steps}], "files": {}}  # fmt: skip
            tracker.record_result(result)
            tracker.report_progress()
            last[name] = steps, loss
            best = min((loss for _, loss in last.values() if loss < 4), default=None)
            event = shown[-1]
            assert isinstance(event, TaskProgress)
            assert event.done == sum(steps for steps, _ in last.values())
            assert event.note.startswith("training" if best is None else f"best {best}.000 ")
        for name, (steps, _) in last.items():
            assert [row["step"] for row in tracker.read_curve(name)] == list(range(2, steps + 1, 2))


@pytest.mark.usefixtures("ray_cluster")
def test_text_is_cached_and_swept_on_an_object_store(s3_uri: str) -> None:
    """The stage `cache` itself runs on one among the trials: two jobs that make it at once."""
    # The workers do not have this process's environment.
    world = make("text", Store(s3_uri.replace("s3://", "s3://testing:testing@")))
    cached = capture(world, None)
    assert set(cached.record.files) == {"00000.parquet", "00001.parquet", "00002.parquet", "cache.json"}
    context = world.context("sweep", cached=cached)
    artifact = context.draft.commit(sweep(context), 0)
    parts = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    models = {f"{folder}/{part}" for folder in ("students/only", "control") for part in parts}
    files = {name for name in artifact.record.files if not name.startswith("events/")}
    assert {name.split("/")[1] for name in set(artifact.record.files) - files} == {"only", "control"}
    assert files == models | {"curves/only.jsonl", "curves/control.jsonl", "trials.json"}
    load_model(artifact.local() / "students/only")


def test_a_cache_of_another_teacher_is_refused(digits_world: World) -> None:
    cached = capture(digits_world, 400)
    index = cached.local() / TargetIndex.FILE
    index.write_text(index.read_text().replace(TargetIndex.read(cached.local()).identity.teacher_sha256, "a" * 64))
    with pytest.raises(InputError, match=r"cache\.json: made with another teacher"):
        sweep(digits_world.context("sweep", cached=cached, sweep=SWEEP, tune=TUNE))


def test_too_small_a_cache_is_refused_before_anything_starts(digits_world: World) -> None:
    small = capture(digits_world, 100)
    with pytest.raises(InputError, match=r"raise cache\.rows"):
        sweep(digits_world.context("sweep", cached=small, sweep=SWEEP, tune=TUNE))


def test_slots_count_what_fits_each_node() -> None:
    up = NodeShape("up", 4, 1, 1, always=1), NodeShape("up", 3, 0, 1, always=1), NodeShape("up", 0, 0, 1, always=1)
    nodes = Capacity(up, "")

    def settings(**changes: Any) -> Sweep:
        return Sweep.model_validate({**SWEEP, **changes})

    assert trial_slots(settings(cpus_per_trial=1), nodes) == 7
    assert trial_slots(settings(cpus_per_trial=2), nodes) == 3
    assert trial_slots(settings(cpus_per_trial=0.5), nodes) == 14
    assert trial_slots(settings(cpus_per_trial=1, gpus_per_trial=0.5), nodes) == 2
    assert trial_slots(settings(cpus_per_trial=8), nodes) == 0
    addable = Capacity((*up, NodeShape("gpu", 16, 1, 8)), "")  # trials wait for those: then the autoscaler adds them
    assert trial_slots(settings(cpus_per_trial=8), addable) == 16
    assert trial_slots(settings(cpus_per_trial=1, gpus_per_trial=1), addable) == 9


def test_rungs_are_before_the_last_step() -> None:
    def sweep_of(steps: int, **changes: int) -> Optimization:
        return Optimization(steps=steps, batch_size=8, learning_rate=1e-3, **changes)

    def at(grace: int | None, factor: int, steps: int) -> list[int]:
        return list(rung_steps(Asha(grace_steps=grace, reduction_factor=factor), sweep_of(steps)))

    assert at(8, 2, 24) == [8, 16]
    assert at(8, 2, 32) == [8, 16]
    assert at(10, 3, 100) == [10, 30, 90]
    assert at(100, 2, 50) == []
    assert at(None, 2, 80) == [10, 20, 40]  # from the first validation on
    assert list(rung_steps(Median(), sweep_of(80))) == []
    assert list(rung_steps(Pbt(), sweep_of(80, validate_every=30))) == [30, 60]
    assert list(rung_steps(NoStop(), sweep_of(50))) == []


@pytest.mark.parametrize("name", ["control", "control-wide", "teacher"])
def test_no_student_takes_the_name_of_another_model(name: str) -> None:
    with pytest.raises(ValueError, match=f"a student is named '{name}', as another model of the sweep is"):
        Sweep.model_validate({**SWEEP, "students": [{**STUDENTS[0], "name": name}]})


def trial(name: str, loss: float | None, parameters: int, status: str = "finished") -> dict[str, Any]:
    return {"name": name, "validation_loss": loss, "parameters": parameters, "status": status}


def test_kept_are_the_best_and_the_smaller_ones_that_none_beats() -> None:
    trials = [
        trial("beaten", 2.0, 30), trial("small", 3.0, 5), trial("best", 1.0, 20), trial("equal", 1.0, 20),
        trial("middle", 2.0, 10), trial("stopped", 0.5, 1, "stopped"), trial("failed", None, 1, "failed"),
    ]  # fmt: skip
    assert pareto_students(trials, "best", 9) == ["best", "middle", "small"]
    assert pareto_students(trials, "equal", 2) == ["equal", "middle"]
    assert pareto_students(trials, "best", 1) == ["best"]
    assert pareto_students([*trials, trial("tie", 1.0, 7)], "best", 9) == ["best", "tie", "small"]
