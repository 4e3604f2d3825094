"""A proof, as one runs it: a short one, on a cluster of its own.

``tests/trials`` has twenty kills of two workers, and the proof that moves nodes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "jobs/recipes/digits.yaml"


def prove(what: str, *options: str) -> list[str]:
    """The lines it prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "overproof.cli.main", "prove", what, str(RECIPE), *options],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_killed_worker_changes_not_one_bit() -> None:
    few = ("train.workers=1", "train.steps=24", "train.checkpoint.every_steps=8")
    lines = prove("resume", "--kills", "1", *(word for change in few for word in ("--set", change)))
    compared = [line for line in lines if line.startswith(("steps", "last loss", "sha256 of", "rows, as"))]
    assert len(compared) == 8
    assert all(line.rstrip().endswith("same") for line in compared)
    assert any("kill -9 of worker" in line for line in lines)
    assert "proven: 1 kills, and nothing differs" in lines
