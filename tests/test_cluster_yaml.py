"""cluster.yaml against Ray's own schema and its own filling-in of defaults."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler
import yaml
from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[1]
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return loaded


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    Draft7Validator(SCHEMA).validate(config)
    validate_config(prepare_config(copy.deepcopy(config)))
    broken = config | {"available_node_types": {"head": {}}}
    with pytest.raises(ValidationError):
        Draft7Validator(SCHEMA).validate(broken)


def test_it_has_the_four_groups_and_grows_from_nothing(config: dict[str, Any]) -> None:
    groups = config["available_node_types"]
    assert set(groups) == {"head", "cpu", "gpu", "serve"}
    assert groups["gpu"]["resources"]["GPU"] == 1
    assert all(group["min_workers"] == 0 for group in groups.values())
    assert sum(group["max_workers"] for group in groups.values()) <= config["max_workers"]


def test_it_demands_a_token_and_opens_no_port(config: dict[str, Any]) -> None:
    text = (REPOSITORY / "cluster.yaml").read_text()
    assert "RAY_AUTH_MODE=token" in " ".join(config["setup_commands"])
    assert "0.0.0.0" not in text
    mounted = {source for source in config["file_mounts"].values() if not source.startswith("~")}
    assert all((REPOSITORY / source).exists() for source in mounted)
