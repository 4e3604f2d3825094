"""`overproof shrink` on labelled texts, whole: an encoder without a classifier, to a package that answers over HTTP."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from overproof.cli.main import main
from overproof.config import load_recipe
from overproof.engines.base import EngineSettings
from overproof.evaluate.metrics import Report
from overproof.files import read_json
from overproof.package.package import open_package
from overproof.registry import ENGINES
from overproof.serve.middleware import Access
from overproof.serve.routes import build_app
from single_model import one
from text_classes import labelled_texts, texts_of_several, write_base, write_jsonl

pytestmark = pytest.mark.trial

FEW = (
    "evaluate.timed_requests=5", "evaluate.probe_prompts=2", "evaluate.bootstrap_samples=200", "train.steps=40",
    "train.learning_rate=5.0e-3", "train.warmup_steps=4", "sweep.steps=30", "sweep.learning_rate=5.0e-3",
    "sweep.warmup_steps=3",
)  # fmt: skip


def test_an_encoder_is_shrunk_from_texts_to_a_package(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher is trained first. Files are about as large as they were told to be."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    monkeypatch.chdir(tmp_path)
    base, data = write_base(tmp_path / "base", layers=4), write_jsonl(tmp_path / "texts.jsonl", labelled_texts())
    few = [word for change in FEW for word in ("--set", change)]
    assert main(["shrink", str(base), "--data", str(data), "--keep", "0.3", "--max-mb", "0.2", *few]) == 0
    out = capsys.readouterr().out
    (package,) = (tmp_path / "store/base-small").glob("package-*")
    assert out.splitlines()[-1] == f"serve it: overproof serve base-small/{package.name}"
    assert "passed · shipped" in " ".join(out.split())
    (path,) = (tmp_path / "store/base-small").glob("evaluate-*/report.json")
    told = dict(re.findall(r"- name: (\S+)  # about (\S+) MB in int8", (tmp_path / "base-small.yaml").read_text()))
    report = read_json(Report, path)
    sizes = {file.name.removesuffix("-int8"): file.size_bytes / 1e6 for file in report.measured if file.candidate}
    assert set() < sizes.keys() <= told.keys()  # no file is made of a student that a smaller one beats
    for name, found in sizes.items():
        assert found == pytest.approx(float(told[name]), rel=0.25)


def test_an_encoder_learns_several_classes_a_text_and_answers_over_http(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task is found by the lists in the data; an int8 file is shipped."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    monkeypatch.chdir(tmp_path)
    base, data = write_base(tmp_path / "base"), write_jsonl(tmp_path / "texts.jsonl", texts_of_several(240))
    changes = (*FEW, "sweep.steps=60", "data.class_weights=balanced", "sweep.concurrent_trials=1")
    few = [word for change in changes for word in ("--set", change)]
    assert main(["shrink", str(base), "--data", str(data), "--keep", "0.3", *few]) == 0
    assert "passed · shipped" in " ".join(capsys.readouterr().out.split())
    assert load_recipe(tmp_path / "base-small.yaml").data.kind == "multi_label_text_classification"
    (folder,) = (tmp_path / "store/base-small").glob("package-*")
    package = open_package(folder)
    assert package.content.candidate.startswith("pruned-")
    measured = package.measured.metrics
    assert measured["micro_f1"].value > 0.7
    for name in ("micro_f1", "macro_f1", "exact_match", "classwise_calibration_error"):
        assert 0 <= measured[name].low < measured[name].high <= 1  # type: ignore[operator]
    card = (folder / "README.md").read_text()
    assert "| macro F1, % | exact match, % | class-wise calibration error, % |" in card
    engine = ENGINES[package.report.engine].load(package.model, EngineSettings())
    http = TestClient(
        build_app(one(folder, engine), Access(None)), client=("127.0.0.1", 1), base_url="http://localhost"
    )
    texts = dict(texts_of_several(30, seed=1))
    reply = http.post("/v1/classify", json={"texts": list(texts)})
    assert reply.status_code == 200, reply.text
    answers = reply.json()["data"]
    assert sum(answer["names"] == names for answer, names in zip(answers, texts.values(), strict=True)) > 18
    assert all(
        answer["labels"] == [i for i, probability in enumerate(answer["probabilities"]) if probability >= 0.5]
        for answer in answers
    )
