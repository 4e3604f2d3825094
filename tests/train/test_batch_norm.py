"""Running statistics of batch norm under DeepSpeed, on several ranks: real ones, killed with SIGKILL, no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_results import column, run_cases
from safetensors.torch import load_file

from overproof.models.hf_directory import load_model
from overproof.models.resnet import ResNet

MODEL = ResNet(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1)).model_dump()
STAGES = (0, 2, 3)  # what differs in how buffers are saved and loaded
COMMON: dict[str, Any] = {
    "model": MODEL, "steps": 12, "batch_size": 16, "validate_every": 6, "checkpoint": {"every_steps": 4},
}  # fmt: skip
KILLED = [{"world": 2, "kill": 6}, {"world": 2}]
MOVED = [{"world": 2, "kill": 10}, {"world": 1}]


def cases() -> list[dict[str, Any]]:
    def case(name: str, attempts: list[dict[str, int]], data: str = "whole", **train: Any) -> dict[str, Any]:
        return {"name": name, "attempts": attempts, "data": data, "train": COMMON | {"workers": [1, 2]} | train}

    still = {"learning_rate": 1e-12, "zero_stage": 2}  # the weights are those that were drawn
    found = [case(f"still{world}", [{"world": world}], **still) for world in (1, 2)]
    for stage in STAGES:
        found.append(case(f"whole{stage}", [{"world": 2}], zero_stage=stage))
        found.append(case(f"killed{stage}", KILLED, zero_stage=stage))
        found.append(case(f"moved{stage}", MOVED, zero_stage=stage))
    skipping = {"on_nonfinite": "skip", "steps": 8}
    return [*found, *(case(f"skip{s}", [{"world": 2}], "broken", zero_stage=s, **skipping) for s in (0, 2))]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases("batch_norm_ranks.py", tmp_path_factory.mktemp("batch-norm"), cases())


def statistics(result: dict[str, Any], part: str) -> dict[str, torch.Tensor]:
    found = load_file(Path(result["model"]) / "model.safetensors")
    return {name: value for name, value in found.items() if name.endswith(part)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(results: dict[str, Any], stage: int) -> None:
    whole, killed = results[f"whole{stage}"], results[f"killed{stage}"]
    assert killed["starts"][1] in (0, 4)
    for key in ("loss", "grad_norm", "validation_loss"):
        assert column(killed, key) == column(whole, key)
        assert column(whole, key)
    assert killed["weights"] == whole["weights"]


@pytest.mark.parametrize("stage", STAGES)
def test_another_number_of_workers_goes_on_from_the_same_statistics(results: dict[str, Any], stage: int) -> None:
    """What batch norm divides by is that of a worker's rows, so training is another one; it begins with no other."""
    moved = results[f"moved{stage}"]
    assert moved["starts"][1] in (4, 8)
    counts = statistics(moved, "num_batches_tracked")
    assert counts
    assert all(count.dtype == torch.int64 and count == 12 for count in counts.values())
    for name, value in statistics(moved, "running_mean").items():
        difference = (value - statistics(results[f"whole{stage}"], "running_mean")[name]).abs().max()
        assert difference < 0.1 * value.abs().max(), name
    load_model(Path(moved["model"]))


def test_statistics_are_of_the_rows_of_all_workers(results: dict[str, Any]) -> None:
    """The means of what the stem gives are those that one worker has, who sees all rows at once."""
    stem = "resnet.embedder.embedder.normalization.running_mean"
    one, two = (statistics(results[f"still{world}"], "running_mean")[stem] for world in (1, 2))
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_stages_of_zero_change_no_statistics(results: dict[str, Any], stage: int) -> None:
    for part in ("running_mean", "running_var", "num_batches_tracked"):
        for name, value in statistics(results["whole0"], part).items():
            found = statistics(results[f"whole{stage}"], part)[name]
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 2])
def test_steps_that_are_left_out_leave_the_statistics_finite(results: dict[str, Any], stage: int) -> None:
    skipped = results[f"skip{stage}"]
    left_out = [row["step"] for row in skipped["rows"] if "skipped" in row]
    assert left_out
    for part in ("running_mean", "running_var"):
        assert all(value.isfinite().all() for value in statistics(skipped, part).values())
    counts = statistics(skipped, "num_batches_tracked").values()
    assert all(count == 8 - len(left_out) for count in counts)
    assert all(row["validation_loss"] < 10 for row in skipped["rows"] if "validation_loss" in row)
