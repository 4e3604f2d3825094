"""Scripts of real ranks, each in its own process, which leave what came of their cases in ``results.json``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_cases(script: str, folder: Path, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a script of this folder finds, by the names of the cases. They run beside each other on few cores, so each
    rank has one thread.
    """
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(folder), json.dumps(cases)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def column(result: dict[str, Any], key: str) -> list[str]:
    """A figure of each row that has it, as hex floats, so that equal means equal to the last bit."""
    return [row[key].hex() for row in result["rows"] if key in row]
