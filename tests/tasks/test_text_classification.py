"""Classifiers of texts: what is refused, and a model over HTTP."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from overproof.data.manifest import Manifest
from overproof.engines.base import EngineSettings
from overproof.errors import InputError
from overproof.export.onnx_file import export_onnx
from overproof.models.hf_directory import load_start, save_model
from overproof.registry import ENGINES
from overproof.serve.async_engine import ThreadedEngine
from overproof.serve.middleware import Access
from overproof.serve.model_registry import SingleModel
from overproof.serve.response_builder import ServedModel
from overproof.serve.responses import ModelInfo, Provenance
from overproof.serve.routes import build_app
from overproof.tasks.text_classification import MOST_CHARACTERS, TASK, ClassifyTextsRequest
from text_classes import write_base


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


def test_texts_are_answered_over_http_by_the_models_own_tokenizer(tmp_path: Path) -> None:
    """The model's head is untrained."""
    base = write_base(tmp_path / "base")
    details = {"classes": ["animal", "food", "plant"], "sequence_length": 16, "vocabulary": 300, "padding": 0}
    manifest = Manifest(
        task="text_classification", columns=(), splits={}, rows_per_group=8, positions=1, outputs=3, details=details
    )
    model = load_start(base, manifest, 0)
    save_model(model, model.config, tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "model.onnx")
    (tmp_path / "package.json").write_text("{}")
    shutil.copy(base / "tokenizer.json", tmp_path)
    engine = ENGINES["onnxruntime"].load(tmp_path / "model.onnx", EngineSettings())
    made = Provenance(
        task="text_classification", details=details, package="p", candidate="c", format="fp32", sha256="0" * 64,
        size_bytes=1, verdict=[], parents={},
    )  # fmt: skip
    served = ServedModel(ModelInfo(id="topics", created=0, overproof=made), ThreadedEngine(engine, 1), 1, str(tmp_path))
    app = build_app(SingleModel(served), Access(None))
    reply = ask(app, "/v1/classify", texts=["a cat", "cat " * 500])
    assert reply.status_code == 200, reply.text
    answers = reply.json()["data"]
    assert [sum(answer["probabilities"]) for answer in answers] == [pytest.approx(1, abs=1e-5)] * 2
    assert {answer["name"] for answer in answers} <= set(details["classes"])
    for wrong, words in (
        ({"texts": [" "]}, "texts.0: expected a text; found none"),
        ({"texts": [1]}, "texts.0: input should be a valid string"),
        ({"images": [[0.5]]}, "texts: field required"),
        ({"texts": ["x"], "labels": []}, "labels: unknown field; leave it out"),
    ):
        refused = ask(app, "/v1/classify", **wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, words.partition(":")[0].split(".")[0])
        assert words in refused.json()["error"]["message"]
