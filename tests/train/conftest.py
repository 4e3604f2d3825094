"""The tiny data sets, once for all tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_data import digits_like, text_like


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_like(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def text_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_like(tmp_path_factory.mktemp("text"))
