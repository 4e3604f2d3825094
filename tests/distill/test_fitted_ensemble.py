"""The weights of an ensemble's members are fitted on rows that none of them was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distill_world import TEACHERS, World

from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.models.hf_directory import build_model, load_model, save_model, to_tensors
from overproof.registry import TASKS
from overproof.train.ensemble import fit_weights


def test_a_member_that_knows_nothing_counts_for_nothing(digits_world: World, tmp_path: Path) -> None:
    prepared = digits_world.artifacts["prepare"]
    teacher = digits_world.artifacts["train"].local() / "model"
    fresh = build_model(TEACHERS["digits"], Manifest.read(prepared), 5)
    for weight in fresh.parameters():
        torch.nn.init.normal_(weight, std=0.5)  # sure of itself, and wrong
    save_model(fresh, fresh.config, tmp_path / "fresh")
    told = list[str]()
    weights = fit_weights([teacher, tmp_path / "fresh"], prepared, told.append)
    assert weights.sum() == pytest.approx(1)
    assert weights[0] > 0.9
    rows = Shards(prepared, "validation").rows
    assert told[0] == f"member 1 of 2, row 0 of {rows}"

    def nats(weights: np.ndarray) -> float:
        batch = to_tensors(Shards(prepared, "validation").take(np.arange(rows)))
        with torch.inference_mode():
            mixed = sum(
                weight * TASKS["image_classification"].predict(load_model(path), batch).logits_BPV[:, 0].softmax(-1)
                for weight, path in zip(weights, (teacher, tmp_path / "fresh"), strict=True)
            )
        return -float(mixed.gather(1, batch["label"][:, None].long()).log().mean())

    assert nats(weights) <= min(nats(np.array([1.0, 0.0])), nats(np.array([0.5, 0.5]))) + 1e-6
