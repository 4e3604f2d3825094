"""Engines run a model's file. Each is imported only where it is used, for none is small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overproof.engines.base import TextEngine


def text_engine(name: str, path: Path, **settings: Any) -> TextEngine:
    """A language model, loaded by the engine of that name: "llama.cpp" or "vllm".

    Raises:
        InputError: it cannot be loaded.
    """
    if name == "vllm":
        from overproof.engines.vllm import Vllm

        return Vllm(path, **settings)
    from overproof.engines.llamacpp import LlamaCpp

    return LlamaCpp(path, **settings)
