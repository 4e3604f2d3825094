"""Rows of tables: what is refused, what a prediction says, and a model over HTTP."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from overproof.data.manifest import Manifest
from overproof.engines.base import EngineSettings
from overproof.errors import InputError
from overproof.export.onnx_file import export_onnx
from overproof.models.hf_directory import build_model, save_model
from overproof.models.mlp import Mlp
from overproof.package.private_copy import PrivateCopy
from overproof.registry import ENGINES, TASKS
from overproof.serve.async_engine import ThreadedEngine
from overproof.serve.middleware import Access
from overproof.serve.model_registry import SingleModel
from overproof.serve.response_builder import ServedModel
from overproof.serve.responses import ModelInfo, Provenance
from overproof.serve.routes import build_app
from overproof.tasks.tabular import CLASSIFICATION, REGRESSION, RowsRequest, encode_cell

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
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
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


def test_a_regression_is_answered_by_column_over_http(tmp_path: Path) -> None:
    """The model is untrained."""
    manifest = Manifest(
        task="tabular_regression", columns=(), splits={}, rows_per_group=8, positions=1, outputs=4, details=DETAILS
    )
    model = build_model(Mlp(hidden_size=8, intermediate_size=16, layers=1), manifest, 0)
    save_model(model, model.config, tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "model.onnx")
    engine = ENGINES["onnxruntime"].load(tmp_path / "model.onnx", EngineSettings())
    made = Provenance(
        task="tabular_regression", details=DETAILS, package="p", candidate="c", format="fp32", sha256="0" * 64,
        size_bytes=1, verdict=[], parents={},
    )  # fmt: skip
    info = ModelInfo(id="rows", created=0, overproof=made)
    served = ServedModel(info, ThreadedEngine(engine, 1), 1, partial(PrivateCopy, tmp_path))
    app = build_app(SingleModel(served), Access(None))
    reply = ask(app, "/v1/predict", rows=[ROW, {**ROW, "colour": None}])
    assert reply.status_code == 200, reply.text
    first, second = reply.json()["data"]
    assert 10 <= first["low"] <= first["value"] <= first["high"] <= 80
    assert first["value"] != second["value"]
    assert ask(app, "/v1/predict", **TASKS["tabular_regression"].example(DETAILS | {"example": ROW})).status_code == 200
    refused = ask(app, "/v1/predict", rows=[{**ROW, "colr": 1}])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rows")
    assert "nearest is 'colour'" in refused.json()["error"]["message"]
    lost = ask(app, "/v1/classify", rows=[ROW])
    assert lost.status_code == 404
    assert "ask it at POST /v1/predict" in lost.json()["error"]["message"]
