"""The train stage on a real cluster of two nodes: what it leaves, what it says, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_data import VIT, digits_like, settings
from transformers import AutoModelForImageClassification

from overproof.artifacts import Store
from overproof.cluster.ray_cluster import relay_progress
from overproof.config import Pretrained, Train
from overproof.config import load_recipe as read_recipe
from overproof.data.manifest import Manifest
from overproof.errors import InputError
from overproof.models.hf_directory import build_model, load_model, save_model
from overproof.stage_context import (
    Progress,
    ProgressEvent,
    StageContext,
    StepTrained,
    TaskProgress,
    TrainingResumed,
    no_progress,
)
from overproof.train.ray_trainer import train_teacher

DIGITS = Path(__file__).parents[2] / "jobs" / "recipes" / "digits.yaml"
SEED = 5
PLAN = {"steps": 30, "batch_size": 16, "learning_rate": 1e-2}


Stage = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def stage(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Runs the stage, each time into a folder of its own; gives its metrics and that folder."""
    store = Store(str(tmp_path_factory.mktemp("store")))
    draft = store.new_writer("tiny", "prepare", "a" * 64, {}, {})
    with draft.directory() as folder:
        digits_like(folder)
    prepared = draft.commit({}, 0.0)
    runs = count()

    def run(plan: Train, progress: Progress = no_progress) -> tuple[dict[str, Any], Path]:
        recipe = read_recipe(DIGITS).model_copy(update={"train": plan, "seed": SEED})
        own = store.new_writer(f"tiny-{next(runs)}", "train", "b" * 64, {}, {})
        return train_teacher(StageContext(recipe, {"prepare": prepared}, own, progress)), Path(own.uri)

    return run


@dataclass(frozen=True)
class Run:
    metrics: dict[str, Any]
    folder: Path
    events: list[ProgressEvent]
    on_interrupt: tuple[Any, Any]  # who answers Ctrl-C, before and after

    def lines(self, key: str) -> list[float]:
        return lines(self.folder, key)


def lines(folder: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.fixture(scope="module")
def two_workers(stage: Stage) -> Run:
    events: list[ProgressEvent] = []
    before = signal.getsignal(signal.SIGINT)
    with relay_progress(events.append) as progress:
        metrics, folder = stage(settings(workers=2, zero_stage=3, **PLAN), progress)
    return Run(metrics, folder, events, (before, signal.getsignal(signal.SIGINT)))


def test_leaves_a_model_that_transformers_loads(two_workers: Run) -> None:
    assert sorted(path.name for path in two_workers.folder.iterdir()) == ["curve.jsonl", "events", "model"]
    model = AutoModelForImageClassification.from_pretrained(two_workers.folder / "model", local_files_only=True)
    assert two_workers.metrics["parameters"] == sum(p.numel() for p in model.parameters())


def test_leaves_a_curve_and_metrics(two_workers: Run) -> None:
    metrics, losses, validation = two_workers.metrics, two_workers.lines("loss"), two_workers.lines("validation_loss")
    assert len(losses) == metrics["steps"] == 30
    assert metrics["images"] == 30 * 16  # five epochs: every row comes five times
    assert metrics["train_loss"] == losses[-1] < losses[0]
    assert metrics["validation_loss"] == validation[-1] < validation[0]
    assert metrics["first_batch_s"] > 0
    assert metrics["seconds_per_step"] > 0


def test_leaves_events_that_tensorboard_reads(two_workers: Run) -> None:
    events = EventAccumulator(str(two_workers.folder / "events")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(two_workers.lines("loss"))


def test_says_how_far_it_is(two_workers: Run) -> None:
    assert two_workers.events[0] == TaskProgress("train", 0, 30, "starting 2 workers")
    last = [event for event in two_workers.events if isinstance(event, StepTrained)][-1]
    assert (last.task, last.done, last.total, last.workers) == ("train", 30, 30, 2)
    assert last.loss == two_workers.lines("loss")[-1]
    assert last.note.startswith(f"loss {last.loss:.2f} · ")


def test_gives_ctrl_c_back(two_workers: Run) -> None:
    before, after = two_workers.on_interrupt
    assert after is before


def test_no_steps_pass_the_weights_through(
    stage: Stage, tmp_path: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(VIT, Manifest.read(digits_root), 9)
    save_model(model, model.config, tmp_path / "given")
    monkeypatch.chdir(tmp_path)
    metrics, folder = stage(settings(model=Pretrained(path="given"), steps=0))
    kept = load_model(folder / "model").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert metrics["steps"] == metrics["images"] == 0
    assert metrics["validation_loss"] == lines(folder, "validation_loss")[0] > 0


def test_a_loss_that_blows_up_is_refused(stage: Stage) -> None:
    with pytest.raises(InputError, match="lower learning_rate") as refused:
        stage(settings(workers=2, learning_rate=1e30, warmup_steps=0))
    assert type(refused.value) is InputError
    assert "Traceback" not in str(refused.value)


def test_failures_that_nothing_comes_of_end_the_run(stage: Stage) -> None:
    def die(event: ProgressEvent) -> None:
        if isinstance(event, StepTrained):
            os.kill(os.getpid(), signal.SIGKILL)

    ends = "train: 2 failures in a row without a new checkpoint after step 0; the last one: a worker died: "
    with pytest.raises(RuntimeError, match=ends):
        stage(settings(workers=1, max_failures=2), die)


def test_ctrl_c_ends_a_run_that_waits_for_nodes(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")

    def interrupt(event: ProgressEvent) -> None:
        if isinstance(event, TrainingResumed) and not waits:  # no room for 1 workers yet
            waits.append(event)
            os.kill(driver, signal.SIGINT)

    driver, waits = os.getpid(), list[ProgressEvent]()
    with pytest.raises(KeyboardInterrupt):
        stage(settings(workers=1, cpus_per_worker=64), interrupt)
