"""The compress, evaluate and gate stages, one after another, on a real cluster."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from overproof.artifacts import Artifact, Store
from overproof.config import Recipe
from overproof.evaluate.gate import Verdict
from overproof.evaluate.metrics import Report
from overproof.evaluate.outcome import Outcome
from overproof.evaluate.stage import evaluate_exports, judge_report
from overproof.export.stage import export_models, read_exports
from overproof.files import file_sha256
from overproof.package.package import build_package
from overproof.registry import FORMATS, TASKS
from overproof.report.content import EvaluatedFiles, file_rows
from overproof.stage_context import StageContext, no_progress

ENGINE = {"text": "llama.cpp", "digits": "onnxruntime"}
KEPT = {"text": ["student"], "digits": ["student", "brief"]}
TRIALS: dict[str, Any] = {"trials": [], "control": {"name": "control"}}
STUDENTS = {"text": ["student-q8_0", "student-q4_0"], "digits": ["student-int8", "brief-int8"]}


def run(stage: Any, of: Recipe, parents: dict[str, Artifact], folder: Path) -> Artifact:
    store = Store(str(folder))
    draft = store.new_writer("test", stage.__name__, hashlib.sha256(stage.__name__.encode()).hexdigest(), None, {})
    return draft.commit(stage(StageContext(of, parents, draft, no_progress)), 0.0)


def artifact_of(stage: str, write: Callable[[Path], object], folder: Path) -> Artifact:
    """What a stage leaves, written by hand."""
    draft = Store(str(folder)).new_writer("test", stage, hashlib.sha256(stage.encode()).hexdigest(), None, {})
    write(Path(draft.uri))
    return draft.commit({}, 0.0)


@pytest.mark.parametrize("kind", ["text", "digits"])
@pytest.mark.usefixtures("ray_cluster")
def test_report_and_verdict(
    kind: str, make_recipe: Callable[..., Recipe], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    parents: dict[str, Artifact] = request.getfixturevalue(kind)
    asked = make_recipe(kind)
    evaluated = run(evaluate_exports, asked, parents, tmp_path)
    report = Report.model_validate_json((evaluated.local() / "report.json").read_bytes())
    assert [m.name for m in report.measured] == ["teacher", "control", *KEPT[kind], *STUDENTS[kind]]
    assert report.winner == "student"
    assert (report.task, report.engine) == (asked.data.kind, ENGINE[kind])
    assert report.computes_with == FORMATS[asked.compress.kind].engines[report.engine]
    names = [m.name for m in report.measured]
    assert {(c.name, c.against) for c in report.comparisons} == {(a, b) for a in names for b in names if a != b}
    by_name = {m.name: m.metrics for m in report.measured}
    speed = {"decode_tokens_per_s", "time_to_first_token_s"} if kind == "text" else {"images_per_s"}
    for metrics in by_name.values():
        assert {
            report.quality,
            "agreement",
            "latency_p50_s",
            "latency_p95_s",
            "resident_mb",
            "parity_nats",
            "contended_cores",
        } | speed <= metrics.keys()
    assert by_name["teacher"]["agreement"].value == 1
    assert by_name["student"]["agreement"].value < 1
    better = report.compare("student", "control")
    assert better is not None
    assert better.high is not None
    assert better.high < 0  # trained for more steps
    for export, measured in zip(read_exports(parents["compress"].local()), report.measured, strict=True):
        assert measured.sha256 == file_sha256(parents["compress"].local() / export.file)

    units = pq.read_table(evaluated.local() / "units.parquet").to_pandas()
    mine = units[units.export == "student"]
    assert len(mine) == by_name["student"][report.quality].n
    value = TASKS[report.task].quality.value(mine["total"].sum(), mine["size"].sum())
    assert value == pytest.approx(by_name["student"][report.quality].value)
    agreement = mine.agreed.sum() / mine.predictions.sum()
    assert agreement == pytest.approx(by_name["student"]["agreement"].value)
    assert evaluated.record.metrics["student"] == by_name["student"][report.quality].value

    parents = parents | {"evaluate": evaluated}
    judged = run(judge_report, asked, parents, tmp_path)
    verdict = Verdict.model_validate_json((judged.local() / "verdict.json").read_bytes())
    assert verdict.passed, verdict
    smallest = min((m for m in report.measured if m.candidate), key=lambda m: (m.size_bytes, m.name))
    assert verdict.chosen == smallest.name
    for judgement in verdict.candidates:  # each against its own student
        assert f"than {judgement.name.partition('-')[0]} (" in judgement.reasons[0].text
    assert judged.record.metrics == {"passed": True, "chosen": verdict.chosen}

    strict = make_recipe(kind, [{"kind": "smaller", "against": "teacher", "at_least": 1000}])
    refused = run(judge_report, strict, parents, tmp_path / "refused")
    assert refused.record.metrics == {"passed": False, "chosen": None}
    for artifact, begins in ((judged, f"{smallest.name} ships: "), (refused, "Nothing ships: ")):
        outcome = Outcome.model_validate_json((artifact.local() / "outcome.json").read_bytes())
        assert outcome.ships.startswith(begins)
        assert outcome.bought.startswith("Distillation bought quality")


def test_compress_writes_what_is_listed(text: dict[str, Artifact], digits: dict[str, Artifact]) -> None:
    for kind, done in (("text", text), ("digits", digits)):
        root = done["compress"].local()
        exports = read_exports(root)
        assert [e.name for e in exports if e.candidate] == STUDENTS[kind]
        assert {e.name: e.student for e in exports} == {"teacher": None, "control": None} | {
            name: name.partition("-")[0] for name in KEPT[kind] + STUDENTS[kind]
        }
        listed = {e.file: e.size_bytes for e in exports} | {
            name: (root / name).stat().st_size for name in ("exports.json", "artifact.json")
        }
        assert {e.companions for e in exports} == ({("tokenizer.json",)} if kind == "text" else {()})
        if kind == "text":
            listed["tokenizer.json"] = (done["prepare"].local() / "tokenizer.json").stat().st_size
        assert {file.name: file.stat().st_size for file in root.iterdir()} == listed
        assert json.loads((root / "exports.json").read_text())[0]["format"] == ("f16" if kind == "text" else "fp32")


@pytest.mark.usefixtures("ray_cluster")
def test_a_teachers_own_variants_may_be_chosen(
    make_recipe: Callable[..., Recipe], digits: dict[str, Artifact], tmp_path: Path
) -> None:
    """Beside those of students, against the same rules; the card says that nothing was distilled into it."""
    plain = make_recipe("digits", [{"kind": "keep", "at_least": 0.5}])
    asked = plain.model_copy(
        update={
            "compress": plain.compress.model_copy(update={"teacher": True}),
            "gate": plain.gate.model_copy(update={"candidate": "teacher-int8"}),
        }
    )
    parents = {stage: digits[stage] for stage in ("prepare", "train", "sweep")}
    parents["compress"] = run(export_models, asked, parents, tmp_path)
    exports = {export.name: export for export in read_exports(parents["compress"].local())}
    assert [export.name for export in exports.values() if export.candidate] == [*STUDENTS["digits"], "teacher-int8"]
    assert (exports["teacher-int8"].student, exports["teacher-int8"].format) == ("teacher", "int8")
    parents["evaluate"] = run(evaluate_exports, asked, parents, tmp_path)
    report = Report.model_validate_json((parents["evaluate"].local() / "report.json").read_bytes())
    assert report.winner == "student"
    parents["gate"] = run(judge_report, asked, parents, tmp_path)
    verdict = Verdict.model_validate_json((parents["gate"].local() / "verdict.json").read_bytes())
    assert verdict.chosen == "teacher-int8"
    roles = {row["name"]: row["role"] for row in file_rows(EvaluatedFiles(report, verdict), TRIALS)["rows"]}
    assert (roles["teacher-int8"], roles["brief-int8"]) == ("teacher", "kept")
    card = run(build_package, asked, parents, tmp_path).local()
    words = (card / "README.md").read_text()
    assert "**Student**: none; the teacher itself, in fewer bits." in words
    assert "a larger one in fewer bits" in words
    assert "**Control**" not in words
    assert (card / "model.onnx").stat().st_size == exports["teacher-int8"].size_bytes


def test_a_served_teacher_has_no_variants_and_names_are_apart(make_recipe: Callable[..., Recipe]) -> None:
    plain = make_recipe("text").model_dump()
    plain["compress"]["teacher"] = True
    plain["sweep"]["students"][0]["name"] = "teacher-q8_0"
    with pytest.raises(ValueError, match=r"a student is named 'teacher-q8_0', as a compressed file of another"):
        Recipe.model_validate(plain)
    plain["sweep"]["students"][0]["name"] = "student"
    plain["data"] |= {"tokenizer": {"kind": "file", "path": "somewhere"}}
    plain["train"] |= {"model": {"kind": "served", "url": "http://h/v1", "model": "m"}, "steps": 0}
    plain["gate"] = {"rules": [{"kind": "keep", "at_least": 0.5}]}
    with pytest.raises(ValueError, match=r"compress\.teacher: train\.model\.kind is 'served'.*expected false"):
        Recipe.model_validate(plain)
