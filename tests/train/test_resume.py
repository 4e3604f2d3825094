"""Killed with SIGKILL and started again: real ranks, real DeepSpeed, no Ray."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rank_results import column, run_cases
from resume_ranks import BROKEN_ROW, SEED
from tiny_data import LLAMA, ROWS, ROWS_PER_GROUP, VIT

from overproof.data.order import Order

TOLERANCE = 1e-5
# Epochs end inside each run; a step takes half a row group, one, or two.
RUNS: dict[str, dict[str, Any]] = {
    "stage0": {"zero_stage": 0},
    "stage1": {"zero_stage": 1, "batch_size": 16},
    "stage2": {"zero_stage": 2, "micro_batch_size": 1},
    "stage3": {"zero_stage": 3, "batch_size": 4, "activation_checkpointing": True},
    "offload2": {"zero_stage": 2, "offload": "optimizer"},
    "offload3": {"zero_stage": 3, "offload": "parameters", "micro_batch_size": 2},
}
COMMON: dict[str, Any] = {"steps": 28, "batch_size": 8, "validate_every": 7, "checkpoint": {"every_steps": 5}}


def case(name: str, attempts: list[dict[str, int]], data: str = "text", **train: Any) -> dict[str, Any]:
    model = {"model": (LLAMA if data == "text" else VIT).model_dump()}
    return {"name": name, "data": data, "attempts": attempts, "train": {**COMMON, **model, **train}}


def cases() -> list[dict[str, Any]]:
    killed = [{"world": 2, "kill": 3}, {"world": 2, "kill": 13}, {"world": 2}]
    moved = [{"world": 2, "kill": 12}, {"world": 1, "kill": 19}, {"world": 4}]
    found = []
    for name, train in RUNS.items():
        found += [case(f"{name}-whole", [{"world": 2}], **train), case(f"{name}-killed", killed, **train)]
        if "offload" not in name:
            found.append(case(f"{name}-moved", moved, **train, workers=[1, 4]))
    keeping = {"every_steps": 4, "keep_last": 1, "keep_best": 1}
    # The rate grows until the loss does, so that the best checkpoint is not the last on whatever processor.
    wild = {"validate_every": 4, "learning_rate": 3.0, "warmup_steps": 28, "checkpoint": keeping}
    return [
        *found,
        case("best", [{"world": 2}], **wild, result="best"),
        case("last", [{"world": 2}], **wild),
        case("nan-stop", [{"world": 2}], data="broken", zero_stage=2),
        *(
            case(f"nan-skip{stage}", [{"world": 2}], data="broken", zero_stage=stage, on_nonfinite="skip")
            for stage in range(4)
        ),
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases("resume_ranks.py", tmp_path_factory.mktemp("resume"), cases())


def check_starts(starts: list[int], kills: tuple[int, ...]) -> None:
    """Each attempt begins at a checkpoint before the kill: the last one, or, where that was being written, the one
    before."""
    every = COMMON["checkpoint"]["every_steps"]
    assert starts[0] == 0
    for start, kill in zip(starts[1:], kills, strict=True):
        newest = kill // every * every
        assert start in (newest, max(0, newest - every))


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(results: dict[str, Any], name: str) -> None:
    whole, killed = results[f"{name}-whole"], results[f"{name}-killed"]
    check_starts(killed["starts"], (3, 13))
    for key in ("loss", "grad_norm", "learning_rate", "validation_loss"):
        assert column(killed, key) == column(whole, key)
        assert column(whole, key)
    assert [row["step"] for row in killed["rows"]] == [row["step"] for row in whole["rows"]]
    assert killed["weights"] == whole["weights"]


@pytest.mark.parametrize("name", [name for name in RUNS if "offload" not in name])
def test_other_numbers_of_workers_go_on_within_rounding(results: dict[str, Any], name: str) -> None:
    whole, moved = results[f"{name}-whole"], results[f"{name}-moved"]
    check_starts(moved["starts"], (12, 19))
    for key in ("loss", "validation_loss"):
        pairs = [(a[key], b[key]) for a, b in zip(whole["rows"], moved["rows"], strict=True) if key in a]
        assert max(abs(a - b) for a, b in pairs) < TOLERANCE


def test_weights_decay_as_before_on_another_number_of_workers(results: dict[str, Any]) -> None:
    """DeepSpeed 0.19.8 mixes up the groups of ZeRO-3 there, which shows in the gradients first."""
    whole, moved = results["stage3-whole"], results["stage3-moved"]
    pairs = [(a["grad_norm"], b["grad_norm"]) for a, b in zip(whole["rows"], moved["rows"], strict=True) if "loss" in a]
    assert max(abs(a - b) for a, b in pairs) < TOLERANCE


def test_the_last_checkpoints_and_the_best_are_kept(results: dict[str, Any]) -> None:
    best = results["best"]
    scores = {row["step"]: row["validation_loss"] for row in best["rows"] if "validation_loss" in row}
    lowest = min(scores, key=lambda step: scores[step])
    assert lowest < 28
    assert best["kept"] == [f"{step:08d}" for step in (lowest, 28)]


def test_the_best_is_given_on_where_it_is_asked_for(results: dict[str, Any]) -> None:
    assert column(results["best"], "loss") == column(results["last"], "loss")
    assert results["best"]["weights"] != results["last"]["weights"]


def broken_steps() -> list[int]:
    """The steps, counted from 1, that read the broken row."""
    order = Order(ROWS["train"] // ROWS_PER_GROUP, ROWS_PER_GROUP, SEED)
    return [step + 1 for step in range(COMMON["steps"]) if BROKEN_ROW in order.step_rows(step, COMMON["batch_size"])]


def test_a_row_that_is_not_a_number_is_named(results: dict[str, Any]) -> None:
    error = results["nan-stop"]["error"]
    assert f"step {broken_steps()[0]}: loss is nan" in error
    assert f"at fault by itself: row {BROKEN_ROW} (sample_id of the train split)" in error
    assert "on_nonfinite: skip" in error


@pytest.mark.parametrize("stage", range(4))
def test_a_step_that_is_left_out_leaves_the_rest_finite(results: dict[str, Any], stage: int) -> None:
    skipped = results[f"nan-skip{stage}"]
    assert [row["step"] for row in skipped["rows"] if "skipped" in row] == broken_steps()
    assert len(broken_steps()) == skipped["metrics"]["skipped_steps"] > 1
    assert all(np.isfinite(value) for row in skipped["rows"] for value in row.values())
    assert skipped["metrics"]["train_loss"] < skipped["rows"][0]["loss"]
