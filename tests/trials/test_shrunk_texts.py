"""`overproof shrink` on labelled texts, whole: an encoder without a classifier, to a package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from overproof.cli.main import main
from overproof.evaluate.metrics import Report
from overproof.files import read_json
from text_classes import labelled_texts, write_base, write_jsonl

pytestmark = pytest.mark.trial

FEW = (
    "evaluate.timed_requests=5", "evaluate.probe_prompts=2", "evaluate.bootstrap_samples=200", "train.steps=40",
    "train.learning_rate=5.0e-3", "train.warmup_steps=4", "sweep.steps=30", "sweep.learning_rate=5.0e-3",
    "sweep.warmup_steps=3",
)  # fmt: skip


def test_an_encoder_is_shrunk_from_texts_to_a_package(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher is trained first. Files are about as large as they were told to be."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    monkeypatch.chdir(tmp_path)
    base, data = write_base(tmp_path / "base", layers=4), write_jsonl(tmp_path / "texts.jsonl", labelled_texts())
    few = [word for change in FEW for word in ("--set", change)]
    assert main(["shrink", str(base), "--data", str(data), "--keep", "0.3", "--max-mb", "0.2", *few]) == 0
    out = capsys.readouterr().out
    (package,) = (tmp_path / "store/base-small").glob("package-*")
    assert out.splitlines()[-1] == f"serve it: overproof serve base-small/{package.name}"
    assert "passed · shipped" in " ".join(out.split())
    (path,) = (tmp_path / "store/base-small").glob("evaluate-*/report.json")
    told = dict(re.findall(r"- name: (\S+)  # about (\S+) MB in int8", (tmp_path / "base-small.yaml").read_text()))
    report = read_json(Report, path)
    sizes = {file.name.removesuffix("-int8"): file.size_bytes / 1e6 for file in report.measured if file.candidate}
    assert sizes.keys() == told.keys()
    for name, found in sizes.items():
        assert found == pytest.approx(float(told[name]), rel=0.25)
