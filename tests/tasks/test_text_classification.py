"""Classifiers of texts over HTTP, and one whole loop: from a base without a head to a served student."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from finished import RECIPES
from overproof import pipeline
from overproof.config import load_recipe
from overproof.data.manifest import Manifest
from overproof.engines.base import EngineSettings
from overproof.errors import InputError
from overproof.package.package import open_package
from overproof.registry import ENGINES, TASKS
from overproof.serve.middleware import Access
from overproof.serve.routes import build_app
from overproof.tasks.text_classification import MOST_CHARACTERS, TASK, ClassifyTextsRequest
from single_model import one
from text_classes import labelled_texts, write_base, write_jsonl


def ask(app: Any, path: str, **body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return await http.post(path, json=body)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("texts", "where"),
    [([], ("texts",)), ([" "], ("texts", 0)), (["x", 3], ("texts", 1)), (["x" * (MOST_CHARACTERS + 1)], ("texts", 0)),
     (["x"] * 1025, ("texts",)), ("x", ("texts",)), (["\ud800"], ("texts", 0))],
)  # fmt: skip
def test_what_is_no_list_of_texts_is_refused(texts: Any, where: tuple[Any, ...]) -> None:
    with pytest.raises(ValidationError) as refused:
        ClassifyTextsRequest.model_validate({"texts": texts})
    assert refused.value.errors()[0]["loc"] == where


def test_a_text_without_a_token_is_named(tmp_path: Path) -> None:
    """A byte-level tokenizer reads everything; a WordPiece one without special tokens may find nothing."""
    folder = write_base(tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(InputError, match=r"texts\.1: the model's tokenizer finds no token in it"):
        TASK.inputs(ClassifyTextsRequest(texts=["a cat", "\u200b"]), {"sequence_length": 8}, folder)


@pytest.mark.usefixtures("ray_cluster")
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
    app = build_app(one(folder, engine), Access(None))
    body = TASKS[package.content.task].example(package.content.details)
    assert body["texts"][0] in {text for text, _ in labelled_texts(240)}
    texts = dict(labelled_texts(30, seed=1))
    reply = ask(app, "/v1/classify", texts=[*texts, "cat " * 500])
    assert reply.status_code == 200, reply.text
    answers = reply.json()["data"]
    assert sum(answer["name"] == name for answer, name in zip(answers, texts.values(), strict=False)) > 24
    assert answers[30]["name"] == "animal"
    assert sum(answers[0]["probabilities"]) == pytest.approx(1, abs=1e-5)
    for wrong, words in (
        ({"texts": [" "]}, "texts.0: expected a text; found none"),
        ({"texts": [1]}, "texts.0: input should be a valid string"),
        ({"images": [[0.5]]}, "texts: field required"),
        ({"texts": ["x"], "labels": []}, "labels: unknown field; leave it out"),
    ):
        refused = ask(app, "/v1/classify", **wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (
            400,
            words.partition(":")[0].partition(".")[0],
        )
        assert words in refused.json()["error"]["message"]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "| macro F1, % | calibration error, % |" in card
    assert "A classifier of texts of up to 16 tokens" in card
    assert f"{manifest.details['truncated']:,} of the" in card
    line = TASK.describe_reply({"texts": list(texts)}, reply.json())
    assert line.startswith(f"{next(iter(texts))!r} is classed as {answers[0]['name']} (probability 0.")
