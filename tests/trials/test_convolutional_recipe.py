"""A recipe whose teacher is a ResNet, through every stage up to the gate: a student without some of its channels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from finished import RECIPES
from overproof import pipeline
from overproof.config import load_recipe
from overproof.models.hf_directory import load_model

pytestmark = pytest.mark.trial
TEACHER = "{kind: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1]}"
STUDENT = "{name: half, temperature: 2.0, teacher_weight: 0.9, model: {kind: pruned, hidden_sizes: [4, 8], rows: 32}}"
SHORT = (
    f"train.model={TEACHER}", f"sweep.students=[{STUDENT}]", "tune={search: {kind: grid}}", "train.steps=20",
    "train.workers=1", "sweep.steps=20", "evaluate.timed_requests=20", "compress.formats=[int8-static]",
    "compress.calibration={rows: 32}", "gate.rules=[{kind: parity, at_most: 1.0}]",
)  # fmt: skip


@pytest.mark.usefixtures("ray_cluster")
def test_a_resnet_is_trained_pruned_distilled_exported_and_judged(tmp_path: Path) -> None:
    made = pipeline.run(load_recipe(RECIPES / "digits.yaml", (f"store={tmp_path}", *SHORT)), "gate")
    teacher = load_model(made["train"].local() / "model")
    counts = {value.item() for name, value in teacher.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counts == {20}
    half = AutoModelForImageClassification.from_pretrained(made["sweep"].local() / "students/half").eval()
    assert (half.config.hidden_sizes, half.config.embedding_size) == ([4, 8], 4)
    assert torch.isfinite(half(torch.rand(2, 1, 8, 8)).logits).all()
    files = {path.stem for path in made["compress"].local().glob("*.onnx")}
    assert {"teacher", "half", "half-int8-static"} < files
    verdict = json.loads((made["gate"].local() / "verdict.json").read_text())
    assert verdict["passed"]
