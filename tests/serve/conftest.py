"""One small package of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from packing import make_package


@pytest.fixture(scope="session")
def text_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package("text", tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def digits_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package("digits", tmp_path_factory.mktemp("store"))
