"""`overproof shrink` on a table, whole: to a package, and to what would have to give where the budget is too small."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv

from overproof.cli.main import main
from overproof.config import load_recipe

pytestmark = pytest.mark.trial

FEW = (
    "evaluate.timed_requests=5", "evaluate.probe_prompts=2", "evaluate.bootstrap_samples=200", "sweep.keep=1",
    "train.steps=60", "sweep.steps=60", "train.warmup_steps=5", "sweep.warmup_steps=5",
)  # fmt: skip


def write_table(path: Path) -> Path:
    """Numbers that tell the label."""
    rows = np.random.default_rng(0).normal(size=(200, 3))
    label = np.where(rows.sum(1) > 0, "yes", "no")
    csv.write_csv(pa.table({**{f"x{i}": rows[:, i] for i in range(3)}, "label": label}), path)
    return path


def test_a_table_is_shrunk_to_a_package_or_told_what_would_have_to_give(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    monkeypatch.chdir(tmp_path)
    data = write_table(tmp_path / "my table.csv")
    few = [word for change in FEW for word in ("--set", change)]
    argv = ["shrink", "--data", str(data), "--keep", "0.5", "--max-mb", "0.2", *few]
    assert main(argv) == 0
    out = capsys.readouterr().out
    recipe = load_recipe("my-table-small.yaml")
    assert recipe.train.steps == 60
    assert "picture  " in out
    assert (tmp_path / "store/my-table-small").is_dir()
    package = next((tmp_path / "store/my-table-small").glob("package-*"))
    assert out.splitlines()[-1] == f"serve it: overproof serve my-table-small/{package.name}"
    assert "passed · shipped" in " ".join(out.split())
    # What is trained is there; engines are asked again, for as many requests as a latency needs.
    assert main([*argv, "--max-p95-ms", "0.0001", "--out", "faster.yaml"]) == 1
    printed = capsys.readouterr()
    assert re.search(r"the nearest, \w+-int8, broke latency\.", printed.out)
    assert re.search(r"overproof run faster\.yaml --set gate\.rules\.2\.at_most_ms=", printed.out)
    assert "the gate refused every candidate" in printed.err
