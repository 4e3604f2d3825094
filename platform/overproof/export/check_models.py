"""Whether a format can hold models, by their configurations: ``python -m overproof.export.check_models FOLDER``.

In a process of its own, for a format may need transformers, which is more than what asks otherwise needs; torch, which
takes thrice as long to import, is kept out. Reads ``question.json`` from the folder and writes ``refusals.json`` there.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overproof.errors import InputError
from overproof.registry import FORMATS
from overproof.subprocesses import run_module

TIMEOUT_S = 600


def check_models(
    format: str, positions: int, models: Mapping[str, Mapping[str, Any]], variants: Sequence[str] = ()
) -> None:
    """Ask a format about every model: the content of its config.json, by what messages call it.

    Raises:
        InputError: it cannot hold one, or its engines do not read rows of so many places of it: a line for each.
    """
    if not models:
        return
    with tempfile.TemporaryDirectory() as folder:
        question = {"format": format, "positions": positions, "models": models, "variants": list(variants)}
        Path(folder, "question.json").write_text(json.dumps(question), encoding="utf-8")
        done = run_module("overproof.export.check_models", folder, timeout_s=TIMEOUT_S)
        if done.returncode != 0:
            raise RuntimeError(f"asking {format} about models ended with {done.returncode}: {done.stderr[-2000:]}")
        refusals: list[str] = json.loads(Path(folder, "refusals.json").read_text(encoding="utf-8"))
    if refusals:
        raise InputError("\n".join(refusals))


def refusals(
    format: str, positions: int, models: Mapping[str, Mapping[str, Any]], variants: Sequence[str] = ()
) -> list[str]:
    """What a format says of the models that it cannot hold."""
    found = []
    for where, config in models.items():
        try:
            FORMATS[format].check_model(config, positions, where, variants)
        except InputError as error:
            found.append(str(error))
    return found


def main(folder: str) -> None:
    """Answer the question in a folder."""
    question = json.loads(Path(folder, "question.json").read_text(encoding="utf-8"))
    Path(folder, "refusals.json").write_text(json.dumps(refusals(**question)), encoding="utf-8")


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
    main(sys.argv[1])
