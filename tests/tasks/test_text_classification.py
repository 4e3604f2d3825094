"""Classifiers of texts: what is refused, and a model over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from overproof.errors import InputError
from overproof.tasks.text_classification import MOST_CHARACTERS, TASK, ClassifyTextsRequest
from served_texts import classify, classify_app
from text_classes import write_base


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
    details = {"classes": ["animal", "food", "plant"], "sequence_length": 16, "vocabulary": 300, "padding": 0}
    app = classify_app(tmp_path, "text_classification", details, positions=1, outputs=3)
    reply = classify(app, texts=["a cat", "cat " * 500])
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
        refused = classify(app, **wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, words.partition(":")[0].split(".")[0])
        assert words in refused.json()["error"]["message"]
