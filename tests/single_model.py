"""One package in this process, as the HTTP API takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overproof.package.package import open_package
from overproof.serve.async_engine import ThreadedEngine
from overproof.serve.model_registry import SingleModel
from overproof.serve.response_builder import ServedModel, model_info


def one(package: Path, engine: Any, max_tokens: int = 32, calls: int = 4) -> SingleModel:
    """A registry of this package alone, answered by this engine."""
    info = model_info(open_package(package))
    return SingleModel(ServedModel(info, ThreadedEngine(engine, calls), max_tokens, str(package)))
