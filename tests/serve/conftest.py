"""One small package of each kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from packing import make_package

CHAT_TEMPLATE = "{% for m in messages %}# {{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}{{ '# assistant\\n' }}"


@pytest.fixture(scope="session")
def text_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template."""
    template = f"compress.chat_template={json.dumps(CHAT_TEMPLATE)}"
    return make_package("text", tmp_path_factory.mktemp("store"), template)


@pytest.fixture(scope="session")
def digits_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package("digits", tmp_path_factory.mktemp("store"))
