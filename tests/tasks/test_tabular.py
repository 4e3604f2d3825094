"""Tabular models over HTTP, and one whole loop: from a recipe to a served regression."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from finished import RECIPES
from overproof import pipeline
from overproof.config import load_recipe
from overproof.engines.base import EngineSettings
from overproof.errors import InputError
from overproof.package.package import open_package
from overproof.registry import ENGINES, TASKS
from overproof.serve.middleware import Access
from overproof.serve.routes import build_app
from overproof.tasks.tabular import CLASSIFICATION, REGRESSION, RowsRequest, encode_cell
from single_model import one

DETAILS = {
    "columns": [
        {"name": "age", "categories": [], "mean": 0.0, "deviation": 1.0},
        {"name": "colour", "categories": ["blue", "green", "red"], "mean": 0.0, "deviation": 1.0},
        {"name": "member", "categories": ["false", "true"], "mean": 0.0, "deviation": 1.0},
        {"name": "grade", "categories": ["1", "2", "5"], "mean": 0.0, "deviation": 1.0},
    ],
    "classes": ["low", "high"],
    "centres": [10.0, 20.0, 40.0, 80.0],
}
ROW = {"age": 3, "colour": "red", "member": True, "grade": 5}


def ask(app: Any, path: str, **body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return await http.post(path, json=body)

    return asyncio.run(send())


def test_rows_are_read_by_column_in_any_order() -> None:
    rows = [ROW, dict(reversed(ROW.items())), ROW | {"age": None, "colour": None, "grade": 2.0}]
    found = REGRESSION.inputs(RowsRequest(rows=rows), DETAILS, Path())
    np.testing.assert_array_equal(found, [[3, 2, 1, 2], [3, 2, 1, 2], [np.nan, np.nan, 1, 1]])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**ROW, "colr": 1}, r"rows\.0\.colr: there is no such column, nearest is 'colour'; expected age, colour, mem"),
        ({"age": 3}, r"rows\.0: found no 'colour'; expected every column, null where a value is missing"),
        (
            {**ROW, "colour": "reed"},
            r"rows\.0\.colour: category 'reed' is unknown, nearest is 'red'; expected one of b",
        ),
        ({**ROW, "age": "old"}, r"rows\.0\.age: found 'old'; expected a number, or null"),
        ({**ROW, "age": True}, r"rows\.0\.age: found True; expected a number, or null"),
        ({**ROW, "grade": 2.5}, r"rows\.0\.grade: category '2\.5' is unknown"),
        ({**ROW, "age": 1e39}, r"rows\.0\.age: found 1e\+39; expected a number between -3\.4e\+38 and 3\.4e\+38"),
    ],
)
def test_rows_that_the_model_cannot_read_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        REGRESSION.inputs(RowsRequest(rows=[row]), DETAILS, Path())


@pytest.mark.parametrize(
    ("cell", "words"),
    [([1], "expected a number, text, true or false, or null"), (10**400, "expected a number between")],
)
def test_cells_that_are_no_values_are_named(cell: Any, words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        RowsRequest.model_validate({"rows": [{**ROW, "age": cell}]})
    (error,) = refused.value.errors()
    assert error["loc"] == ("rows", 0, "age")
    assert words in error["msg"]


def test_categories_of_numbers_are_asked_for_as_numbers() -> None:
    column = {"name": "c", "categories": ["0.00001", "1.23456789012e+11", "-0", "7"], "mean": 0.0, "deviation": 1.0}
    assert [encode_cell(cell, column, "c") for cell in (1e-05, 123456789012.0, -0.0, 7)] == [0, 1, 2, 3]


def test_versions_agree_by_what_they_say_and_not_by_how_they_number_it() -> None:
    one = [{"name": "cat", "label": 0}, {"name": "dog", "label": 1}]
    other = [{"name": "cat", "label": 1}, {"name": "dog", "label": 0}]
    assert CLASSIFICATION.agree(one, other)
    assert not CLASSIFICATION.agree(one, other[::-1])
    near, far = {"value": 12.0, "low": 5.0, "high": 20.0}, {"value": 40.0, "low": 30.0, "high": 90.0}
    assert REGRESSION.agree([near], [{"value": 14.0, "low": 8.0, "high": 19.0}])
    assert not REGRESSION.agree([near], [far])


def test_a_prediction_is_the_mean_between_the_ends_of_nine_in_ten() -> None:
    probabilities = np.array([[0.25, 0.25, 0.25, 0.25], [0.01, 0.97, 0.01, 0.01]], np.float32)
    first, second = REGRESSION.answers(np.log(probabilities), DETAILS)
    assert first == {"index": 0, "value": pytest.approx(37.5), "low": 10.0, "high": 80.0}
    assert second == {"index": 1, "value": pytest.approx(20.7), "low": 20.0, "high": 20.0}


@pytest.mark.usefixtures("ray_cluster")
def test_a_regression_is_distilled_judged_and_served(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe as it stands but for fewer steps; what it is as good as is judged among the trials."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    rules = "gate.rules=[{kind: smaller, against: teacher, at_least: 4}, {kind: parity, at_most: 0.01}]"
    few = ("train.steps=40", "sweep.steps=40", "sweep.concurrent_trials=1", "evaluate.timed_requests=20", rules)
    done = pipeline.run(load_recipe(RECIPES / "diabetes.yaml", (f"store={tmp_path}", *few)))
    folder = done["package"].local()
    package = open_package(folder)
    measured = package.measured.metrics
    assert measured["parity_nats"].value < 0.01
    assert 40 < measured["rmse"].value < 110  # of a target whose own deviation is 77
    engine = ENGINES[package.report.engine].load(package.model, EngineSettings())
    app = build_app(one(folder, engine), Access(None))
    body = TASKS[package.content.task].example(package.content.details)
    reply = ask(app, "/v1/predict", **body)
    assert reply.status_code == 200, reply.text
    (answer,) = reply.json()["data"]
    assert 25 <= answer["low"] <= answer["high"] <= 346
    assert 25 <= answer["value"] <= 346
    refused = ask(app, "/v1/predict", rows=[{**body["rows"][0], "bmy": 1}])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rows")
    assert "nearest is 'bmi'" in refused.json()["error"]["message"]
    lost = ask(app, "/v1/classify", **body)
    assert lost.status_code == 404
    assert "ask it at POST /v1/predict" in lost.json()["error"]["message"]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: tabular-regression" in card
    assert json.dumps(body)[1:40] in card
    assert (done["report"].local() / "report.html").read_text().count("root mean squared error") >= 1
