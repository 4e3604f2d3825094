"""The small worlds, once for all tests of distillation."""

from __future__ import annotations

import pytest
from distill_world import World, capture, make

from overproof.artifacts import Artifact, Store


@pytest.fixture(scope="session")
def digits_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make("digits", Store(str(tmp_path_factory.mktemp("digits"))))


@pytest.fixture(scope="session")
def text_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make("text", Store(str(tmp_path_factory.mktemp("text"))))


@pytest.fixture(scope="session")
def digits_cache(digits_world: World) -> Artifact:
    return capture(digits_world, 400)
