"""The loop: alone without a cluster, its recorded curve, validation over ranks, and the files it leaves."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_data import LLAMA, settings
from torch import Tensor, nn

from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.errors import InputError
from overproof.models.base import Prediction
from overproof.models.hf_directory import Batch, build_model, to_tensors
from overproof.registry import TASKS
from overproof.train.cross_entropy import mean_cross_entropy
from overproof.train.engine import PendingMetrics, TorchEngine
from overproof.train.loop import CurveRow, LoopHooks, fit, shard_batches, train_steps, validation_ids, validation_loss
from overproof.train.metrics import MetricsLogger
from overproof.train.objective import CrossEntropy, Objective, nll

PREDICT = TASKS["language_modeling"].predict
GOLDEN = Path(__file__).parents[1] / "golden" / "train-digits-like.json"


@pytest.fixture(scope="module")
def alone(digits_root: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("without_ray.py")
    done = subprocess.run([sys.executable, script, digits_root], capture_output=True, text=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_loop_runs_without_ray_or_deepspeed(alone: dict[str, Any]) -> None:
    assert alone["loaded"] == []


def test_loop_learns_and_reports_every_step(alone: dict[str, Any]) -> None:
    trained = [row for row in alone["rows"] if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 41))
    assert all(set(row) == {"step", "loss", "learning_rate", "grad_norm"} for row in trained)
    assert [row["step"] for row in alone["rows"] if "validation_loss" in row] == [10, 20, 30, 40]
    assert trained[0]["loss"] == pytest.approx(math.log(4), abs=0.3)
    assert alone["rows"][-1]["validation_loss"] < 0.6 * math.log(4)


def test_loss_curve_is_the_recorded_one(alone: dict[str, Any]) -> None:
    """Recorded on a CPU in fp32. Record it again, on purpose, when training is meant to change."""
    recorded = json.loads(GOLDEN.read_text())
    assert len(recorded) == len(alone["rows"])
    for was, now in zip(recorded, alone["rows"], strict=True):
        assert now == pytest.approx(was, abs=1e-4)


class Fixed:
    """An engine whose losses are given."""

    def __init__(self, losses: list[float]) -> None:
        self.losses, self.begun = iter(losses), 0

    def step(self, objective: Objective, batch: Batch) -> PendingMetrics:
        loss = next(self.losses)
        self.begun += 1
        return lambda: {"loss": loss, "learning_rate": 0.1, "grad_norm": 1.0}

    @contextmanager
    def eval_mode(self) -> Iterator[nn.Module]:
        yield nn.Identity()

    def all_reduce(self, values: Tensor) -> Tensor:
        return values

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def test_a_loss_that_is_not_finite_is_refused_with_what_to_do() -> None:
    seen: list[CurveRow] = []
    with pytest.raises(InputError, match=r"step 2: loss is nan .*lower learning_rate \(at most 0\.003"):
        fit(
            Fixed([1.0, math.nan, 1.0]),
            CrossEntropy(PREDICT),
            settings(steps=3),
            iter([{}] * 3),
            lambda: 0.0,
            seen.append,
        )
    assert [row["step"] for row in seen] == [1]


def test_validates_every_so_often_and_at_the_end() -> None:
    given = train_steps(
        Fixed([1.0] * 5), CrossEntropy(PREDICT), settings(steps=5, validate_every=2), iter([{}] * 5), lambda: 7.0
    )
    assert [row["step"] for row in given if "validation_loss" in row] == [2, 4, 5]


class Checkpoints:
    """A checkpoint hook that notes how many steps an engine had begun."""

    def __init__(self, engine: Fixed) -> None:
        self.engine, self.seen = engine, list[int]()

    def after_step(self, step: int, score: float | None) -> None:
        assert self.engine.begun == step
        self.seen.append(step)


def test_a_row_is_read_when_the_next_step_is_begun_unless_something_looks_at_the_weights() -> None:
    engine, plan = Fixed([1.0] * 5), settings(steps=5, validate_every=3)
    rows = train_steps(engine, CrossEntropy(PREDICT), plan, iter([{}] * 5), lambda: float(engine.begun))
    assert [(row["step"], row.get("validation_loss"), engine.begun) for row in rows] == [
        (1, None, 2), (2, None, 3), (3, None, 3), (3, 3.0, 3), (4, None, 5), (5, None, 5), (5, 5.0, 5),
    ]  # fmt: skip
    engine = Fixed([1.0] * 5)
    hook = Checkpoints(engine)
    list(train_steps(engine, CrossEntropy(PREDICT), plan, iter([{}] * 5), lambda: 0.0, LoopHooks(checkpoint=hook)))
    assert hook.seen == [1, 2, 3, 4, 5]


def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_as_they_were(text_root: Path) -> None:
    """Without waiting for the norm: the fused optimizer is told on the device."""
    model = build_model(LLAMA, Manifest.read(text_root), 0)
    engine = TorchEngine(model, settings(model=LLAMA))
    batch = to_tensors(Shards(text_root, "train").take(np.arange(8)))
    assert math.isfinite(engine.step(CrossEntropy(PREDICT), batch)()["loss"])
    before = copy.deepcopy((engine.model.state_dict(), engine.optimizer.state_dict()["state"]))

    class Broken(CrossEntropy):
        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            loss, scalars = super().loss(model, batch)
            return loss * math.nan, scalars

    assert math.isnan(engine.step(Broken(PREDICT), batch)()["grad_norm"])
    after = (engine.model.state_dict(), engine.optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_no_steps_still_validate() -> None:
    plan = settings(steps=0)
    assert list(train_steps(Fixed([]), CrossEntropy(PREDICT), plan, iter([]), lambda: 7.0)) == [
        {"step": 0, "validation_loss": 7.0}
    ]


def test_padding_does_not_count(text_root: Path) -> None:
    model = build_model(LLAMA, Manifest.read(text_root), 0).eval()
    held_out = Shards(text_root, "validation").take(np.arange(23))
    losses, count = 0.0, 0
    with torch.no_grad():
        whole = validation_loss(model, PREDICT, [to_tensors(held_out)])
        for tokens, length in zip(held_out["tokens"], held_out["length"], strict=True):
            alone_BS = torch.from_numpy(tokens[: length + 1].astype(np.int64))[None]
            logits_BPV = model(input_ids=alone_BS[:, :-1]).logits
            losses += nn.functional.cross_entropy(logits_BPV[0], alone_BS[0, 1:], reduction="sum").item()
            count += int(length)
    assert whole == pytest.approx(losses / count, abs=1e-5)


def test_mean_over_what_counts_in_fp32() -> None:
    logits_BPV = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]], dtype=torch.bfloat16)
    prediction = Prediction(logits_BPV, torch.tensor([[0, 0]]), torch.tensor([[True, False]]))
    assert nll(prediction).dtype == torch.float32
    loss = mean_cross_entropy(prediction.logits_BPV, prediction.targets_BP, prediction.mask_BP)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)), abs=1e-6)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))
def test_ranks_share_validation_in_equally_many_batches(rows: int, batch_size: int, world: int) -> None:
    ids = validation_ids(rows, rows)
    parts = [shard_batches(ids, batch_size, rank, world) for rank in range(world)]
    assert len({len(mine) for mine in parts}) == 1
    assert all(0 < len(part) <= max(2, batch_size) for mine in parts for part in mine)
    taken = np.concatenate([part for mine in parts for part in mine])
    assert np.array_equal(taken, ids if rows >= world else np.tile(ids, world))


def test_validation_rows_are_spread_over_the_split() -> None:
    assert validation_ids(10, 4).tolist() == [0, 2, 5, 7]
    assert validation_ids(3, 256).tolist() == [0, 1, 2]


def test_curve_is_readable_by_people_and_machines(tmp_path: Path) -> None:
    written: list[CurveRow] = [
        {"step": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.5},
        {"step": 1, "validation_loss": 1.75},
    ]
    with MetricsLogger(tmp_path / "curve.jsonl", tmp_path / "events") as curve:
        for row in written:
            curve(row)
    assert [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()] == written
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    tags = ["train/grad_norm", "train/learning_rate", "train/loss", "validation/loss"]
    assert sorted(events.Tags()["scalars"]) == tags
    assert [(event.step, event.value) for event in events.Scalars("validation/loss")] == [(1, 1.75)]
