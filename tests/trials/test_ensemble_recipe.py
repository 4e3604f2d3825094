"""Two runs of a recipe, what they trained as one ensemble, and that as the teacher of a third run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finished import RECIPES
from overproof import pipeline
from overproof.cli import ensemble
from overproof.cli.main import main
from overproof.config import Evaluate, load_recipe
from overproof.data.manifest import Manifest
from overproof.errors import InputError
from overproof.evaluate.metrics import Report
from overproof.models.hf_directory import load_model
from overproof.package.package import open_package
from overproof.registry import TASKS
from overproof.tasks.base import TokenTask
from overproof.tasks.text_evaluation import torch_scorer

pytestmark = pytest.mark.trial
MODEL = "{kind: vit, hidden_size: 16, intermediate_size: 32, layers: 1, heads: 2}"
STUDENT = f"{{name: small, teacher_weight: 0.9, model: {MODEL}}}"
SHORT = (
    f"sweep.students=[{STUDENT}]", "tune={search: {kind: grid}}", "train.workers=1", "sweep.steps=30",
    "evaluate.timed_requests=20", "compress={kind: onnx, formats: [int8], teacher: true}",
)  # fmt: skip


@pytest.mark.usefixtures("ray_cluster")
def test_packages_are_an_ensemble_that_teaches_and_ships(tmp_path: Path) -> None:
    packages = list[Path]()
    for seed in (1, 2):
        sets = (f"store={tmp_path}", f"name=run-{seed}", f"seed={seed}", "train.steps=60", *SHORT)
        gate = "gate.rules=[{kind: parity, at_most: 1.0}]"
        made = pipeline.run(load_recipe(RECIPES / "digits.yaml", (*sets, "gate.candidate=teacher-int8", gate)))
        packages.append(made["package"].local())
    both = tmp_path / "both"
    fit = ("--fit", str(RECIPES / "digits.yaml"), "--set", f"store={tmp_path}", "--set", "name=run-1")
    assert main(["ensemble", str(both), *map(str, packages), *fit]) == 0
    taught = (
        f"store={tmp_path}", "name=whole", f"train.model={{kind: pretrained, path: {both}}}", "train.steps=0", *SHORT,
        "gate.candidate=teacher-int8", "gate.rules=[{kind: keep, against: teacher, at_least: 0.97}]",
    )  # fmt: skip
    package = open_package(pipeline.run(load_recipe(RECIPES / "digits.yaml", taught))["package"].local())
    assert package.content.candidate == "teacher-int8"
    alone = [open_package(each).measured.metrics["accuracy"].value for each in packages]
    print(f"accuracy: {alone} alone, {package.measured.metrics['accuracy'].value} together")
    assert package.measured.metrics["accuracy"].value >= min(alone)
    elsewhere = tmp_path / "elsewhere" / "copy"
    shutil.copytree(packages[0], elsewhere)
    with pytest.raises(InputError, match=r"which is not there: .*expected a package in the store of its run"):
        ensemble.model_directory(elsewhere)


DECODER = "kind: llama, hidden_size: {0}, intermediate_size: 256, layers: 2, heads: {1}, kv_heads: {1}"
SHORT_TEXT = (
    f"train.model={{{DECODER.format(96, 3)}}}", "train.workers=1", "train.steps=300", "cache.actors=1", "tune={}",
    f"sweep.students=[{{name: small, teacher_weight: 0.9, model: {{{DECODER.format(64, 2)}}}}}]", "sweep.steps=120",
    "sweep.keep=1", "compress.formats=[q8_0]", "gate.rules=[{kind: keep, against: teacher, at_least: 0.5}]",
    "evaluate={max_documents: 8, decode_tokens: 8, timed_requests: 20}",
)  # fmt: skip


@pytest.mark.usefixtures("ray_cluster")
def test_language_models_together_are_better_than_each_and_teach(tmp_path: Path) -> None:
    """Of one tokenizer, from other fresh weights, weighed on validation rows."""
    file, sets = RECIPES / "stdlib-lm.yaml", (f"store={tmp_path}", *SHORT_TEXT)
    made = [
        pipeline.run(load_recipe(file, (*sets, f"train.model.initializer_range={spread}")), "train")
        for spread in (0.04, 0.06)
    ]
    members, both = [each["train"].local() / "model" for each in made], tmp_path / "both"
    fit = ("--fit", str(file), *(part for each in sets for part in ("--set", each)))
    assert main(["ensemble", str(both), *map(str, members), *fit]) == 0
    taught = load_recipe(file, (*sets, f"train.model={{kind: pretrained, path: {both}}}", "train.steps=0"))
    done = pipeline.run(taught)
    assert open_package(done["package"].local()).content.candidate == "small-q8_0"
    report = Report.model_validate_json((done["evaluate"].local() / "report.json").read_bytes())
    assert report.unwritten_teacher is not None
    together = report.unwritten_teacher.metrics["bits_per_byte"].value
    root, task = made[0]["prepare"].local(), TASKS["language_modeling"]
    assert isinstance(task, TokenTask)
    alone = list[float]()
    for member in members:
        scorer = torch_scorer(load_model(member), Manifest.read(root), 0, "fp32")
        found = task.score_by(scorer, "", root, task.units(root, 8), Evaluate(), lambda _: None)
        alone.append(task.quality.value(float(found.total.sum()), float(found.size.sum())))
    print(f"bits per byte: {alone} alone, {together} together")
    assert together < min(alone)
