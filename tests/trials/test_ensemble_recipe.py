"""Two runs of a recipe, their packages as one ensemble, and that as the teacher of a third run, which ships it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finished import RECIPES
from overproof import pipeline
from overproof.cli import ensemble
from overproof.cli.main import main
from overproof.config import load_recipe
from overproof.errors import InputError
from overproof.package.package import open_package

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
