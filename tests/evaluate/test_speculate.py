"""A teacher packed with its student as a draft: the whole stage on real files, and what keeps such a package shut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overproof.artifacts import Artifact, Store
from overproof.config import Recipe, Serve, Speculate
from overproof.engines.base import Sampling
from overproof.engines.llamacpp import LlamaCpp
from overproof.errors import GateRefused
from overproof.evaluate.gate import judge
from overproof.evaluate.metrics import Report
from overproof.evaluate.stage import evaluate_exports, judge_report
from overproof.export.stage import export_models, read_exports
from overproof.files import file_sha256
from overproof.package.package import build_package, open_package
from overproof.package.speculation import SpeculationMeasurement, SpeculationResult, judge_draft
from overproof.package.speculative_stage import pack_with_draft
from overproof.serve.controller import describe_version
from overproof.serve.replica import load_engine
from overproof.serve.response_builder import model_info
from overproof.stage_context import StageContext, no_progress
from packing import assert_refused, edit

POLICY = Speculate(prompts=12, new_tokens=16, at_least=0.01, at_most=0.05)
FOUND = SpeculationMeasurement(
    model="teacher-q8_0", draft="student-q4_0", model_sha256="a", draft_sha256="b", draft_tokens=3, threads=1,
    prompts=9, identical=9, new_tokens=16, drafted=90, accepted=40,
    alone_tokens_per_s=(100.0, 90.0, 110.0, 100.0, 100.0), drafted_tokens_per_s=(150.0, 99.0, 165.0, 150.0, 150.0),
)  # fmt: skip


def run(name: str, stage: Any, of: Recipe, parents: dict[str, Artifact], folder: Path) -> Artifact:
    draft = Store(str(folder)).new_writer("test", name, hashlib.sha256(name.encode()).hexdigest(), None, {})
    return draft.commit(stage(StageContext(of, parents, draft, no_progress)), 0.0)


@pytest.fixture(scope="module")
def asked(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe("text").model_copy(update={"speculate": POLICY})


@pytest.fixture(scope="module")
def done(
    asked: Recipe, text: dict[str, Artifact], ray_cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    """Everything up to the student's package."""
    store = tmp_path_factory.mktemp("store")
    parents = dict(text)
    stages = {
        "compress": export_models, "evaluate": evaluate_exports, "gate": judge_report, "package": build_package
    }  # fmt: skip
    for name, stage in stages.items():
        parents[name] = run(name, stage, asked, parents, store)
    return parents


@pytest.fixture(scope="module")
def packed(asked: Recipe, done: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("speculate", pack_with_draft, asked, done, tmp_path_factory.mktemp("speculate")).local()


def test_the_teacher_answers_and_the_packaged_student_drafts(packed: Path, done: dict[str, Artifact]) -> None:
    opened, shipped = open_package(packed), open_package(done["package"].local())
    exports = {e.name: done["compress"].local() / e.file for e in read_exports(done["compress"].local())}
    assert opened.content.candidate == opened.measured.name == "teacher-q8_0"
    assert opened.sha256 == file_sha256(exports["teacher-q8_0"])
    assert file_sha256(packed / "draft.gguf") == shipped.sha256
    assert opened.content.parents["package"] == done["package"].record.fingerprint
    judged = SpeculationResult.model_validate_json((packed / "speculation.json").read_bytes())
    assert (judged.found.identical, judged.found.prompts) == (12, 12)
    assert len(judged.found.times) == 5
    assert 0 < judged.found.accepted < judged.found.drafted
    card = (packed / "README.md").read_text()
    assert "text identical on 12 of 12 prompts" in card
    assert "teacher-q8_0, drafted by student-" in card


def test_it_is_served_like_any_other(packed: Path) -> None:
    assert any("text identical on 12 of 12" in why for why in model_info(open_package(packed)).overproof.verdict)
    assert describe_version(str(packed), Serve()).resident_mb == pytest.approx(
        open_package(packed).measured.metrics["resident_mb"].value + (packed / "draft.gguf").stat().st_size / 1e6
    )
    engine, alone = load_engine(open_package(packed), Serve()), LlamaCpp(packed / "model.gguf")
    assert isinstance(engine, LlamaCpp)
    for prompt in ([0, 70 + i] for i in range(16)):
        assert engine.complete(prompt, Sampling(24)).tokens == alone.complete(prompt, Sampling(24)).tokens
    assert engine.drafted > engine.accepted > 0
    engine.close()
    alone.close()


def test_a_draft_that_is_too_slow_is_refused(asked: Recipe, done: dict[str, Artifact], tmp_path: Path) -> None:
    policy = POLICY.model_copy(update={"at_least": 1000.0, "prompts": 2})
    with pytest.raises(GateRefused, match=r"is done:\n  .* times as fast as alone .*, needed 1000 times"):
        run("speculate", pack_with_draft, asked.model_copy(update={"speculate": policy}), done, tmp_path)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _list(folder: Path, name: str) -> None:
    entry = {"sha256": file_sha256(folder / name)}
    edit(folder / "package.json", lambda c: c["files"][name].update(entry))


def _other_draft(folder: Path) -> None:
    _flip(folder / "draft.gguf")
    _list(folder, "draft.gguf")


def _other_draft_measured(folder: Path) -> None:
    _other_draft(folder)
    sha256 = file_sha256(folder / "draft.gguf")
    edit(folder / "speculation.json", lambda s: s["found"].update(draft_sha256=sha256))


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "the draft was edited": (lambda f: _flip(f / "draft.gguf"), "draft.gguf: sha256 is .* package.json says"),
    "the draft is missing": (lambda f: (f / "draft.gguf").unlink(), "draft.gguf: missing"),
    "the draft is not listed": (
        lambda f: edit(f / "package.json", lambda c: c["files"].pop("draft.gguf")), "lists no draft.gguf"),
    "another draft, its hash put right": (_other_draft, "or of other files"),
    "another draft, both hashes put right": (_other_draft_measured, "only the measured file is served"),
    "some text differs": (
        lambda f: edit(f / "speculation.json", lambda s: s["found"].update(identical=11)), "no passing verdict with"),
    "nothing was compared": (
        lambda f: edit(f / "speculation.json", lambda s: s["found"].update(identical=0, prompts=0)),
        "no passing verdict with"),
    "a speed is missing": (
        lambda f: edit(f / "speculation.json", lambda s: s["found"]["alone_tokens_per_s"].pop()), "come in pairs"),
    "the policy asks for more": (
        lambda f: edit(f / "package.json", lambda c: c["speculate"]["policy"].update(at_least=1e6)),
        "no passing verdict with"),
    "the student answers": (
        lambda f: edit(f / "package.json", lambda c: c.update(candidate=c["speculate"]["draft"])), "or of other files"),
    "a draft that did not pass": (
        lambda f: edit(f / "package.json", lambda c: c["speculate"].update(draft="control")), "no passing verdict"),
    "it says that it has no draft": (
        lambda f: edit(f / "package.json", lambda c: c.pop("speculate")), "teacher-q8_0 has no passing verdict"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_package_that_does_not_hold_together_is_refused(packed: Path, tmp_path: Path, name: str) -> None:
    assert_refused(packed, tmp_path, *REFUSALS[name])


def test_every_rule_speaks_for_itself(done: dict[str, Artifact]) -> None:
    report = Report.model_validate_json((done["evaluate"].local() / "report.json").read_bytes())
    assert judge_draft(POLICY, report, FOUND).passed
    for change, policy, rule in (
        ({"identical": 8}, {}, "identical"),
        ({}, {"at_least": 1.51}, "faster"),  # the median run was 1.5 times as fast
        ({}, {"repeats": 6}, "faster"),
        ({"draft_tokens": 4}, {}, "faster"),
        ({}, {"teacher_format": "q4_0"}, "teacher"),
    ):
        found = judge_draft(POLICY.model_copy(update=policy), report, FOUND.model_copy(update=change))
        assert [reason.rule for reason in found.reasons if not reason.passed] == [rule], found
    worse = report.model_copy(
        update={
            "comparisons": tuple(
                each.model_copy(update={"value": 0.02, "low": 0.01, "high": 0.03})
                if (each.name, each.against) == (FOUND.model, "teacher")
                else each
                for each in report.comparisons
            )
        }
    )
    for at_most, broken in ((0.025, ["regression"]), (0.035, [])):  # the far end of the interval counts
        found = judge_draft(POLICY.model_copy(update={"at_most": at_most}), worse, FOUND)
        assert [reason.rule for reason in found.reasons if not reason.passed] == broken, found
    speed = judge_draft(POLICY, report, FOUND).reasons[1].text
    assert speed.startswith(
        "1.50 times as fast as alone (runs 1.10 to 1.50; 100 and 150 tokens/s, threads 1; 40 of 90 "
    )


def test_the_teachers_own_format_is_no_candidate(asked: Recipe, done: dict[str, Artifact]) -> None:
    report = Report.model_validate_json((done["evaluate"].local() / "report.json").read_bytes())
    assert report.winner == "student"
    assert [m.candidate for m in report.measured if m.name == "teacher-q8_0"] == [False]
    assert "teacher-q8_0" not in [c.name for c in judge(asked.gate, report).candidates]
