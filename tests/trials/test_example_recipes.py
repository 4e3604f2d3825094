"""The recipes of docs/examples.md, whole, with fewer steps: a small Llama stands in for SmolLM2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from finished import RECIPES
from overproof import pipeline
from overproof.config import load_recipe
from overproof.data.manifest import Manifest
from overproof.engines.base import EngineSettings
from overproof.package.package import open_package
from overproof.registry import ENGINES, TASKS
from overproof.serve.middleware import Access
from overproof.serve.routes import build_app
from overproof.tasks.text_classification import TASK
from single_model import one
from test_shrink import documents, write_llama
from text_classes import labelled_texts, write_base, write_jsonl

pytestmark = pytest.mark.trial

FEW = (
    "train.validate_every=2", "sweep.steps=4", "sweep.validate_every=2", "sweep.warmup_steps=1",
    "evaluate.timed_requests=5", "evaluate.probe_prompts=2", "evaluate.bootstrap_samples=200",
    "evaluate.decode_tokens=8", "evaluate.max_documents=6",
)  # fmt: skip


def run(name: str, folder: Path, *changes: str) -> str:
    """The name of the shipped candidate's model."""
    done = pipeline.run(load_recipe(RECIPES / f"{name}.yaml", (f"store={folder}/store", *FEW, *changes)))
    package = open_package(done["package"].local())
    assert package.content.name == name
    assert (done["report"].local() / "report.png").read_bytes().startswith(b"\x89PNG")
    return package.content.candidate


def test_smollm2_as_it_is_and_halved(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    model = write_llama(tmp_path, layers=4)
    students = ", ".join(
        f"{{name: {name}, teacher_weight: 0.8, model: {{kind: teacher_layers, layers: {layers}}}}}"
        for name, layers in (("whole", 4), ("half", 2))
    )
    shipped = run(
        "smollm2", tmp_path, f"data.source.path={documents(tmp_path)}", "data.source.pattern='*.md'",
        f"data.tokenizer.path={model}/tokenizer.json", f"train.model.path={model}", "data.sequence_length=32",
        f"sweep.students=[{students}]", "gate.rules.0.at_least=0.3",
    )  # fmt: skip
    assert shipped.startswith(("whole", "half", "teacher"))


def test_a_chat_model_of_the_standard_library(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    made = tmp_path / "stdlib-chat"
    subprocess.run([sys.executable, str(RECIPES.parent / "stdlib_chat.py"), str(made)], check=True)
    shipped = run(
        "chat", tmp_path, f"data.source.path={made}/chats.jsonl", f"data.tokenizer.path={made}/model",
        "train.steps=6", "train.warmup_steps=1", 
        "gate.rules=[{kind: smaller, against: teacher, at_least: 1.5}, {kind: parity, at_most: 0.5}]",
        "evaluate.answer_tokens=8",
    )  # fmt: skip
    assert shipped.startswith(("narrow", "deep"))
    (package,) = (tmp_path / "store").glob("chat/package-*")
    found = open_package(package).measured.metrics["expected_accuracy"]
    assert (found.value, found.n) == (0.0, 6)  # of eight tokens after six steps
    assert found.of is not None
    assert found.of > 6
    card, page = (package / "README.md").read_text(), next((tmp_path / "store").glob("chat/report-*/report.html"))
    assert "| answers as expected, % |" in card
    assert f"Answers as expected: 6 of {found.of} questions" in card
    assert "<th>as expected</th>" in page.read_text()


def test_a_base_is_fine_tuned_distilled_judged_and_served(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe as it stands but for its files, fewer steps and layers; how good it is is judged with them."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    write_base(tmp_path / "base")
    write_jsonl(tmp_path / "t.jsonl", labelled_texts(240))
    model = "{kind: teacher_layers, layers: 1}"
    students = (f"[{{name: half, temperature: 2.0, teacher_weight: 0.5, model: {model}, states: {{weight: 1.0}},"
                " relations: {heads: 4, weight: 0.5}}]")  # fmt: skip
    done = pipeline.run(load_recipe(RECIPES / "minilm-topics.yaml", (
        f"store={tmp_path}/store", f"data.source.path={tmp_path}/t.jsonl", f"data.tokenizer.path={tmp_path}/base",
        f"train.model.path={tmp_path}/base", "data.sequence_length=16", "data.test_fraction=0.2", "data.shards=1",
        "train.steps=30", "train.learning_rate=5.0e-3", "train.warmup_steps=3", "sweep.steps=20",
        "sweep.learning_rate=5.0e-3", "sweep.warmup_steps=2", "sweep.concurrent_trials=1",
        f"sweep.students={students}", "evaluate.timed_requests=20",
        "gate.rules=[{kind: smaller, against: teacher, at_least: 2}, {kind: parity, at_most: 0.05}]",
    )))  # fmt: skip
    folder = done["package"].local()
    package = open_package(folder)
    measured = package.measured.metrics
    assert measured["accuracy"].value > 0.8
    for name in ("macro_f1", "calibration_error"):
        assert 0 <= measured[name].low <= measured[name].high <= 1  # type: ignore[operator]
    assert package.content.companions == ("tokenizer.json",)
    manifest = Manifest.read(done["prepare"].local())
    assert json.loads((done["train"].local() / "model/config.json").read_text())["id2label"]["1"] == "food"
    engine = ENGINES[package.report.engine].load(package.model, EngineSettings())
    http = TestClient(
        build_app(one(folder, engine), Access(None)), client=("127.0.0.1", 1), base_url="http://localhost"
    )
    body = TASKS[package.content.task].example(package.content.details)
    assert body["texts"][0] in {text for text, _ in labelled_texts(240)}
    texts = dict(labelled_texts(30, seed=1))
    reply = http.post("/v1/classify", json={"texts": [*texts, "cat " * 500]})
    assert reply.status_code == 200, reply.text
    answers = reply.json()["data"]
    assert sum(answer["name"] == name for answer, name in zip(answers, texts.values(), strict=False)) > 24
    assert answers[30]["name"] == "animal"
    assert sum(answers[0]["probabilities"]) == pytest.approx(1, abs=1e-5)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "| macro F1, % | calibration error, % |" in card
    assert "A classifier of texts of up to 16 tokens" in card
    assert f"{manifest.details['truncated']:,} of the" in card
    line = TASK.describe_reply({"texts": list(texts)}, reply.json())
    assert line.startswith(f"{next(iter(texts))!r} is classed as {answers[0]['name']} (probability 0.")


def test_a_small_text_passes_as_it_stands(tmp_path: Path) -> None:
    """What docs/own-data.md shows: a small folder of text, of which a small student keeps enough."""
    command = [sys.executable, "-m", "overproof.cli.main", "run", str(RECIPES / "own-text.yaml")]
    done = subprocess.run(
        [*command, "--set", f"store={tmp_path}/store"],
        cwd=RECIPES.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ships: the smallest of" in done.stdout
    assert "Distillation bought quality" in done.stdout
    assert "fewer than 30" not in done.stdout
