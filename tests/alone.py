"""One package in this process, as the HTTP API takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overproof.registry.package import open_package
from overproof.serve.backend import Threads
from overproof.serve.house import One
from overproof.serve.shapes import Served, model_of


def one(package: Path, engine: Any, max_tokens: int = 32, calls: int = 4) -> One:
    """A house with this package alone."""
    return One(Served(model_of(open_package(package)), Threads(engine, calls), max_tokens))
