"""The proofs, as one runs them: short ones, each on a cluster of its own."""

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
    said = prove("resume", "--kills", "1", "--set", "train.steps=60", "--set", "train.checkpoint.every_steps=10")
    compared = [line for line in said if line.startswith(("steps", "last loss", "sha256 of", "rows, as"))]
    assert len(compared) == 8
    assert all(line.rstrip().endswith("same") for line in compared)
    assert any("kill -9 of worker" in line for line in said)
    assert "proven: 1 kills, and nothing differs" in said


def test_nodes_that_die_and_join_change_no_more_than_rounding() -> None:
    small = ("train.steps=150", "train.batch_size=48", "train.learning_rate=2e-4", "train.checkpoint.every_steps=20")
    said = prove("elastic", *(part for value in small for part in ("--set", value)))
    assert any(line.startswith("a node died") and "3 to 2" in line for line in said)
    assert any(line.startswith("a node joined") and "2 to 3" in line for line in said)
    assert "proven: losses within 1e-05, every row as planned" in said
