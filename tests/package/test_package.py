"""What a package holds, and everything that keeps one from being opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from overproof.artifacts import Artifact
from overproof.config import Recipe
from overproof.errors import GateRefused, InputError
from overproof.files import file_sha256
from overproof.package.package import load_package, open_package
from overproof.package.trust import ANYONE
from overproof.registry import TASKS
from packing import assert_refused, copy, edit, make_package, make_parents, make_recipe, pack

Spoil = Callable[[Path], Any]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe("text", tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def parents(recipe: Recipe) -> dict[str, Artifact]:
    return make_parents(recipe)


@pytest.fixture(scope="module")
def packed(recipe: Recipe, parents: dict[str, Artifact]) -> Path:
    return pack(recipe, parents).local()


def test_a_package_is_the_measured_file_with_its_proof_and_parents(
    packed: Path, recipe: Recipe, parents: dict[str, Artifact]
) -> None:
    package = open_package(packed)
    content = package.content
    exported = parents["compress"].local() / f"{content.candidate}.gguf"
    assert package.model.read_bytes() == exported.read_bytes()
    assert package.sha256 == file_sha256(exported) == package.measured.sha256
    assert package.verdict.passed
    assert package.verdict.chosen == content.candidate == "student-q4_0"  # the smallest that passed
    assert content.policy == recipe.gate
    assert content.parents == {stage: artifact.record.fingerprint for stage, artifact in parents.items()}
    assert content.shards == {f"{name}/00000.parquet": name * 8 for name in ("train", "validation", "test")}
    assert {name: entry.sha256 for name, entry in content.files.items()} == {
        name: file_sha256(packed / name)
        for name in ("model.gguf", "tokenizer.json", "report.json", "verdict.json", "README.md")
    }


def test_the_card_says_what_how_and_how_sure(packed: Path, parents: dict[str, Artifact]) -> None:
    package = open_package(packed)
    _, head, text = (packed / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["pipeline_tag"] == "text-generation"
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "bits_per_byte", "value": 0.9}]
    figures = ("0.9000 (0.8900 to 0.9100)", "temperature 1.0", "12,345 parameters", "2 empty")
    hashes = (package.sha256, *package.content.shards.values(), *(a.record.fingerprint for a in parents.values()))
    reasons = [reason.text for candidate in package.verdict.candidates for reason in candidate.reasons]
    for word in (*figures, *hashes, *reasons, "curl http://127.0.0.1:8000/v1/completions"):
        assert word in text
    body = text.split("-d '", 1)[1].split("'\n", 1)[0]
    assert json.loads(body) == TASKS["language_modeling"].example({})


def test_the_card_says_that_a_student_read_what_the_teacher_wrote(
    recipe: Recipe, parents: dict[str, Artifact], tmp_path: Path
) -> None:
    (student,) = recipe.model_dump(mode="json")["sweep"]["students"]
    overrides = (
        "generate={prompt_tokens: 16}",
        f"sweep.students={json.dumps([{**student, 'text': 'teacher', 'teacher_weight': 0.0}])}",
        "tune={}",
    )
    card = (pack(make_recipe("text", tmp_path, *overrides), parents).local() / "README.md").read_text()
    assert "share of the loss 0.0, on text that the teacher wrote from the first 16 tokens of each row on" in card
    assert "at each position" not in card


@pytest.mark.parametrize(
    ("engine", "words"),
    [("llama.cpp", "the file's own bytes"), ("vllm", "the file's weights unpacked to fp16, not its own bytes")],
)
def test_the_card_says_which_engine_measured_and_what_it_computes_with(engine: str, words: str, tmp_path: Path) -> None:
    card = (make_package("text", tmp_path, f"evaluate.engine={engine}") / "README.md").read_text()
    assert f"- **Engine**: measured and served by {engine}, which computes with {words}.\n" in card
    assert ("llama.cpp" in card) == (engine == "llama.cpp")


def test_nothing_is_packed_when_the_gate_refused(tmp_path: Path) -> None:
    rules = 'gate.rules=[{"kind": "smaller", "against": "teacher", "at_least": 1000}]'
    with pytest.raises(GateRefused, match=r"student-q8_0: .* needed 1000 times"):
        make_package("text", tmp_path, rules)


def test_the_candidate_that_the_recipe_names_is_packed(tmp_path: Path) -> None:
    package = open_package(
        make_package("text", tmp_path, "sweep.students.0.name=student", "gate.candidate=student-q8_0")
    )
    assert package.content.candidate == "student-q8_0"
    assert "the candidate that the recipe names" in (package.path / "README.md").read_text()


def test_a_named_candidate_that_did_not_pass_is_refused_though_another_passed(tmp_path: Path) -> None:
    recipe = make_recipe("text", tmp_path, "sweep.students.0.name=student", "gate.candidate=student-q8_0",
                         'gate.rules=[{"kind": "smaller", "against": "teacher", "at_least": 200}]')  # fmt: skip
    with pytest.raises(GateRefused, match=r"gate\.candidate names \(student-q4_0 passed\).*\n  student-q8_0: "):
        pack(recipe, make_parents(recipe))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _worse(report: Any) -> None:
    for comparison in report["comparisons"]:
        comparison["value"] = comparison["low"] = comparison["high"] = 0.5


def _forge(verdict: Any) -> None:
    verdict["chosen"] = "student-q8_0"


def _refuse(verdict: Any) -> None:
    verdict.update(passed=False, chosen=None)


def _swap(folder: Path) -> None:
    """Another model, with every hash in package.json put right."""
    _flip(folder / "model.gguf")
    edit(folder / "package.json", lambda c: c["files"]["model.gguf"].update(sha256=file_sha256(folder / "model.gguf")))


def _list(folder: Path, name: str, content: bytes, listed_as: str | None = None) -> None:
    """Another file, put into the listing."""
    (folder / name).write_bytes(content)
    entry = {"sha256": file_sha256(folder / name), "size_bytes": len(content)}
    edit(folder / "package.json", lambda c: c["files"].update({listed_as or name: entry}))


def _link(folder: Path, name: str, to: Path) -> None:
    """A link in place of a file, to the same bytes."""
    (folder / name).rename(to)
    (folder / name).symlink_to(to)


REFUSALS: dict[str, tuple[Spoil, str]] = {
    "no package.json": (lambda f: (f / "package.json").unlink(), "no package.json, so no package; expected one"),
    "package.json is not JSON": (lambda f: (f / "package.json").write_text("{"), "package.json: .*what this version"),
    "unknown field": (lambda f: edit(f / "package.json", lambda c: c.update(x=1)), "package.json: x: "),
    "a path for a name": (
        lambda f: edit(f / "package.json", lambda c: c.update(model="../model.gguf")), "package.json: model: "),
    "a part is missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "a part is not listed": (
        lambda f: edit(f / "package.json", lambda c: c["files"].pop("report.json")), "lists no report.json"),
    "the model was edited": (lambda f: _flip(f / "model.gguf"), "model.gguf: sha256 is .* package.json says"),
    "the card was edited": (lambda f: (f / "README.md").write_text("better"), "README.md: has 6 bytes, package.json"),
    "the report was edited": (lambda f: edit(f / "report.json", _worse), "do not give the verdict"),
    "the policy was edited": (
        lambda f: edit(f / "package.json", lambda c: c["policy"]["rules"][2].update(at_least=1e6)),
        "do not give the verdict"),
    "the verdict is a refusal": (lambda f: edit(f / "verdict.json", _refuse), "has no passing verdict"),
    "the verdict is of another file": (lambda f: edit(f / "verdict.json", _forge), "has no passing verdict"),
    "the verdict was forged": (
        lambda f: (edit(f / "verdict.json", _forge),
                   edit(f / "package.json", lambda c: c.update(candidate="student-q8_0"))),
        "do not give the verdict"),
    "another model, hashes put right": (_swap, "only the measured file is served"),
    "a pickle in the listing": (lambda f: _list(f, "optimizer.PT", b"\x80\x04."), "optimizer.PT: may be a pickle"),
    "a file beside it": (lambda f: (f / "more.txt").write_text(""), "more.txt: not listed in package.json"),
    "a hidden file": (lambda f: (f / ".more").write_text(""), r"\.more: no name of a package's file"),
    "a folder below it": (lambda f: (f / "more").mkdir(), "more: a folder; a package holds plain files alone"),
    "a pipe": (lambda f: os.mkfifo(f / "more"), "more: no plain file"),
    "a link out of it": (lambda f: _link(f, "model.gguf", f.parent / "model.gguf"), "model.gguf: a link"),
    "a link within it": (lambda f: (f / "more").symlink_to("model.gguf"), "more: a link"),
    "a link that leads nowhere": (lambda f: (f / "more").symlink_to("nothing"), "more: a link"),
    "a link for the listing": (lambda f: _link(f, "package.json", f.parent / "p.json"), "package.json: a link"),
    "a link for the store's record": (lambda f: _link(f, "artifact.json", f.parent / "a"), "artifact.json: a link"),
    "two names but for case": (
        lambda f: _list(f, "MODEL.gguf", b"GGUF"), "(model|MODEL).gguf: differs from (model|MODEL).gguf in case alone"),
    "a path in the listing": (lambda f: _list(f, "more.txt", b"", "./more.txt"), r"package.json: files\.\./more.txt"),
    "a parent in the listing": (lambda f: _list(f, "../more.txt", b""), r"package.json: files\.\.\./more.txt"),
    "a path for a hash": (
        lambda f: edit(f / "package.json", lambda c: c["files"]["README.md"].update(sha256="../../README.md")),
        r"package\.json: files\.README\.md\.sha256: no sha256 in hex"),
    "the listing in itself": (
        lambda f: edit(f / "package.json", lambda c: c["files"].update({"package.json": c["files"]["README.md"]})),
        "lists package.json, which cannot hold its own hash"),
    "a policy without rules": (
        lambda f: edit(f / "package.json", lambda c: c["policy"].update(rules=[])), r"package.json: policy\.rules: "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_package_that_does_not_hold_together_is_refused(packed: Path, tmp_path: Path, name: str) -> None:
    assert_refused(packed, tmp_path, *REFUSALS[name])


def test_other_words_for_the_same_verdict_are_accepted(packed: Path, tmp_path: Path) -> None:
    """A later version may put its reasons differently; what is shown is always the verdict judged anew."""
    folder = copy(packed, tmp_path)
    edit(folder / "verdict.json", lambda v: v["candidates"][0]["reasons"][0].update(text="a forged figure"))
    assert "a forged figure" not in repr(open_package(folder).verdict)


def test_a_package_is_found_by_itself_or_as_the_newest_of_its_recipe(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def load(where: Path) -> str:
        return load_package(str(where), ANYONE).listing.sha256

    assert load(packed) == load(packed.parent) == open_package(packed).listing.sha256
    moved = copy(packed, tmp_path)
    (moved / "artifact.json").unlink()
    assert load(moved) == load(packed)
    newer = copy(packed, packed.parent).rename(packed.parent / "package-0newer")
    record = json.loads((newer / "artifact.json").read_text())
    (newer / "artifact.json").write_text(json.dumps(record | {"created": "2999-01-01T00:00:00+00:00"}))
    edit(newer / "package.json", lambda content: content.update(created="2999-01-01T00:00:00+00:00"))
    assert load(packed.parent) == load(newer) != load(packed)
    with pytest.raises(InputError, match="no package there"):
        load(tmp_path / "nothing")


def test_a_package_is_fetched_from_a_bucket(
    packed: Path, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    from pyarrow import fs

    from overproof.files import filesystem, join_uri

    recipe = join_uri(s3_uri.replace("bucket/store", "bucket/mirror"), "stdlib-lm")  # the bucket outlives the test
    uri = join_uri(recipe, packed.name)
    bucket, path = filesystem(uri)
    bucket.create_dir(path, recursive=True)
    fs.copy_files(str(packed), path, destination_filesystem=bucket)
    here = load_package(uri, ANYONE)
    assert here.listing == open_package(packed).listing
    assert load_package(recipe, ANYONE).path == here.path
    bucket.delete_file(f"{path}/model.gguf")
    with pytest.raises(InputError, match=r"model\.gguf: missing, though package.json lists it"):
        load_package(uri, ANYONE)
    assert load_package(uri, ANYONE, here.listing.sha256).path == here.path  # it was deployed, and lies here
