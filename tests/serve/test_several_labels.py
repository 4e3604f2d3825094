"""Texts with several classes each, over HTTP: the reply, what describes it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from overproof.models.encoder import MULTI_LABEL
from served_texts import ask, classify, classify_app

CLASSES = ["animal", "food", "plant"]
DETAILS = {
    "classes": CLASSES, "sequence_length": 16, "vocabulary": 300, "padding": 0, "problem_type": MULTI_LABEL,
    "threshold": 0.5,
}  # fmt: skip
TEXTS = ["a cat", "cat " * 500, "bread and soup", "a tree", "with a wing", "eaten", "fern", "mouse and apple"]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model's head is untrained: classes are given by chance, and told apart all the same."""
    folder: Path = tmp_path_factory.mktemp("labels")
    return classify_app(folder, "multi_label_text_classification", DETAILS, positions=3, outputs=2)


def test_every_class_has_its_probability_and_those_from_the_threshold_on_are_given(app: Any) -> None:
    reply = classify(app, texts=TEXTS)
    assert reply.status_code == 200, reply.text
    answers = reply.json()["data"]
    assert [answer["index"] for answer in answers] == list(range(len(TEXTS)))
    for answer in answers:
        assert len(answer["probabilities"]) == len(CLASSES)
        assert answer["labels"] == [i for i, probability in enumerate(answer["probabilities"]) if probability >= 0.5]
        assert answer["names"] == [CLASSES[label] for label in answer["labels"]]
    assert len({tuple(answer["probabilities"]) for answer in answers}) == len(TEXTS)
    assert any(abs(sum(answer["probabilities"]) - 1) > 0.1 for answer in answers)
    assert any(answer["labels"] for answer in answers)
    (model,) = ask(app, "GET", "/v1/models").json()["data"]
    assert model["overproof"]["details"] == DETAILS  # where the order of classes and the threshold are found


def test_the_reply_is_as_openapi_describes_it(app: Any) -> None:
    schema = ask(app, "GET", "/openapi.json").json()
    forms = schema["components"]["schemas"]
    post = schema["paths"]["/v1/classify"]["post"]
    (whole,) = [part["schema"] for part in post["responses"]["200"]["content"].values()]
    reply = forms[whole["$ref"].rpartition("/")[2]]
    rows = [part["$ref"].rpartition("/")[2] for part in reply["properties"]["data"]["items"]["anyOf"]]
    assert sorted(rows) == ["ClassReply", "LabelsReply"]
    described = forms["LabelsReply"]
    assert sorted(described["required"]) == ["index", "labels", "names", "probabilities"]
    assert all(field["description"] for field in described["properties"].values())
    found = classify(app, texts=["a cat"]).json()
    assert found.keys() == reply["properties"].keys()
    assert found["data"][0].keys() == described["properties"].keys()
    (numbers,) = (
        ask(app, "GET", "/openapi.json").json()["paths"]["/v1/predict"]["post"]["responses"]["200"]["content"].values()
    )
    assert "NumberReply" in numbers["schema"]["$ref"]


@pytest.mark.parametrize(
    ("body", "words"),
    [({"texts": [" "]}, "texts.0: expected a text; found none"), ({"texts": []}, "texts: "),
     ({"images": [[0.5]]}, "texts: field required"), ({"texts": ["x"], "threshold": 0.2}, "threshold: unknown field")],
)  # fmt: skip
def test_what_is_no_list_of_texts_is_refused(app: Any, body: dict[str, Any], words: str) -> None:
    refused = classify(app, **body)
    assert refused.status_code == 400
    assert words in refused.json()["error"]["message"]
