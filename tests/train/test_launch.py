"""The train stage on a real cluster of two nodes: what it leaves, what it says, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import ray.train
import torch
from ray.util.placement_group import placement_group_table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_data import VIT, digits_like, settings
from transformers import AutoModelForImageClassification

from finished import Run
from overproof.artifacts import Store
from overproof.config import Pretrained, Train
from overproof.config import load_recipe as read_recipe
from overproof.data.manifest import Manifest
from overproof.errors import InputError
from overproof.models.hf_directory import build_model, load_model, save_model
from overproof.stage_context import Progress, ProgressEvent, StageContext, TrainingResumed, no_progress
from overproof.train.checkpoint import Checkpoints
from overproof.train.ray_trainer import run_workers, train_teacher
from overproof.train.train_job import SupervisedSpec, TrainJob

DIGITS = Path(__file__).parents[2] / "jobs" / "recipes" / "digits.yaml"
SEED = 5


Make = Callable[..., StageContext]


@pytest.fixture(scope="module")
def make(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Contexts of the stage, each with a folder of its own."""
    store = Store(str(tmp_path_factory.mktemp("store")))
    draft = store.new_writer("tiny", "prepare", "a" * 64, {}, {})
    with draft.directory() as folder:
        digits_like(folder)
    prepared = draft.commit({}, 0.0)
    runs = count()

    def context(plan: Train, progress: Progress = no_progress) -> StageContext:
        recipe = read_recipe(DIGITS).model_copy(update={"train": plan, "seed": SEED})
        own = store.new_writer(f"tiny-{next(runs)}", "train", "b" * 64, {}, {})
        return StageContext(recipe, {"prepare": prepared}, own, progress)

    return context


def run_work(context: StageContext, work: Callable[[TrainJob], Any]) -> Any:
    """Workers that do something else than to train."""
    train, draft = context.recipe.train, context.draft
    checkpoints = Checkpoints(draft.workspace, draft.fingerprint, draft.config, draft.parents, train.checkpoint)
    checkpoints.claim_folder()
    spec = SupervisedSpec(train.model)
    return run_workers(
        TrainJob(train, SEED, context.parents["prepare"], draft, checkpoints, context.progress, spec), work
    )


def reserved(before: frozenset[str] | None = None) -> frozenset[str]:
    """The placement groups that are there; those beyond ``before`` are given 10 s to go."""
    deadline = monotonic() + 10
    while True:
        groups = frozenset(name for name, group in placement_group_table().items() if group["state"] != "REMOVED")
        if before is None or groups <= before or monotonic() > deadline:
            return groups
        sleep(0.1)


def lines(folder: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def test_leaves_a_model_that_transformers_loads(digits: Run) -> None:
    trained = digits.artifacts["train"]
    assert {name.split("/")[0] for name in trained.record.files} == {"curve.jsonl", "events", "model"}
    model = AutoModelForImageClassification.from_pretrained(trained.local() / "model", local_files_only=True)
    assert trained.record.metrics["parameters"] == sum(p.numel() for p in model.parameters())


def test_leaves_a_curve_and_metrics(digits: Run) -> None:
    trained, plan = digits.artifacts["train"], digits.recipe.train
    losses, validation = (lines(trained.local(), key) for key in ("loss", "validation_loss"))
    metrics = trained.record.metrics
    assert len(losses) == metrics["steps"] == plan.steps
    assert metrics["images"] == plan.steps * plan.batch_size
    assert metrics["train_loss"] == losses[-1] < losses[0]
    assert metrics["validation_loss"] == validation[-1] < validation[0]
    assert metrics["first_batch_s"] > 0
    assert metrics["seconds_per_step"] > 0


def test_leaves_events_that_tensorboard_reads(digits: Run) -> None:
    folder = digits.artifacts["train"].local()
    events = EventAccumulator(str(folder / "events")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(lines(folder, "loss"))


def test_no_steps_pass_the_weights_through(
    make: Make, tmp_path: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(VIT, Manifest.read(digits_root), 9)
    save_model(model, model.config, tmp_path / "given")
    monkeypatch.chdir(tmp_path)
    context, on_interrupt = make(settings(model=Pretrained(path="given"), steps=0)), signal.getsignal(signal.SIGINT)
    metrics = train_teacher(context)
    assert signal.getsignal(signal.SIGINT) is on_interrupt
    folder = Path(context.draft.uri)
    kept = load_model(folder / "model").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert metrics["steps"] == metrics["images"] == 0
    assert metrics["validation_loss"] == lines(folder, "validation_loss")[0] > 0


def test_bad_input_that_one_of_two_workers_finds_is_refused_as_it_is(make: Make) -> None:
    reason = "step 2: loss is nan; expected finite numbers"

    def refuse(job: TrainJob) -> None:
        if ray.train.get_context().get_world_rank() == 1:
            raise InputError(reason)

    with pytest.raises(InputError) as refused:
        run_work(make(settings(workers=2)), refuse)
    assert type(refused.value) is InputError
    assert str(refused.value) == reason


def test_failures_that_nothing_comes_of_end_the_run(make: Make) -> None:
    def die(job: TrainJob) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    before = reserved()
    ends = "train: 2 failures in a row without a new checkpoint after step 0; the last one: a worker died: "
    with pytest.raises(RuntimeError, match=ends):
        run_work(make(settings(workers=1, max_failures=2)), die)
    assert reserved(before) <= before


def test_ctrl_c_ends_a_run_that_waits_for_nodes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")

    def interrupt(event: ProgressEvent) -> None:
        if isinstance(event, TrainingResumed) and not waits:  # no room for 1 workers yet
            waits.append(event)
            os.kill(driver, signal.SIGINT)

    driver, waits, before = os.getpid(), list[ProgressEvent](), reserved()
    with pytest.raises(KeyboardInterrupt):
        train_teacher(make(settings(workers=1, cpus_per_worker=64), interrupt))
    assert reserved(before) <= before
