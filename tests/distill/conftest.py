"""The small worlds, once for all tests of distillation."""

from __future__ import annotations

import pytest
from distill_world import World, make

from overproof.artifact import Store


@pytest.fixture(scope="session")
def digits_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make("digits", Store(str(tmp_path_factory.mktemp("digits"))))


@pytest.fixture(scope="session")
def text_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make("text", Store(str(tmp_path_factory.mktemp("text"))))
