"""The recipes of tables, whole: each ships what its own gate has passed, and it is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from finished import RECIPES
from overproof import pipeline
from overproof.config import load_recipe
from overproof.engines.base import EngineSettings
from overproof.package.package import open_package
from overproof.registry import ENGINES, TASKS
from overproof.serve.middleware import Access
from overproof.serve.routes import build_app
from single_model import one

pytestmark = pytest.mark.trial


@pytest.mark.parametrize("name", ["diabetes", "breast-cancer", "wine"])
def test_a_recipe_of_a_table_passes_its_own_gate_and_is_served(
    name: str, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    done = pipeline.run(load_recipe(RECIPES / f"{name}.yaml", (f"store={tmp_path}",)))
    folder = done["package"].local()
    package = open_package(folder)
    assert package.content.name == name
    measured = package.measured.metrics
    assert measured["parity_nats"].value < 0.01
    task = TASKS[package.content.task]
    body = task.example(package.content.details)
    engine = ENGINES[package.report.engine].load(package.model, EngineSettings())
    with TestClient(
        build_app(one(folder, engine), Access(None)), client=("127.0.0.1", 1), base_url="http://localhost"
    ) as http:
        reply = http.post(task.route, json=body)
    assert reply.status_code == 200, reply.text
    (answer,) = reply.json()["data"]
    card = (folder / "README.md").read_text()
    assert json.dumps(body)[1:40] in card
    if name == "diabetes":
        assert 40 < measured["rmse"].value < 110  # of a target whose own deviation is 77
        assert 25 <= answer["low"] <= answer["value"] <= answer["high"] <= 346
        assert "pipeline_tag: tabular-regression" in card
        assert (done["report"].local() / "report.html").read_text().count("root mean squared error") >= 1
