"""The recipes of tables, whole: each ships what its own gate has passed."""

from __future__ import annotations

from pathlib import Path

import pytest

from finished import RECIPES
from overproof import pipeline
from overproof.config import load_recipe
from overproof.package.package import open_package

pytestmark = pytest.mark.trial


@pytest.mark.parametrize("name", ["diabetes", "breast-cancer", "wine"])
def test_a_recipe_of_a_table_passes_its_own_gate(
    name: str, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    done = pipeline.run(load_recipe(RECIPES / f"{name}.yaml", (f"store={tmp_path}",)))
    assert open_package(done["package"].local()).content.name == name
