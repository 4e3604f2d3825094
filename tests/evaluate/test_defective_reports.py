"""A sound file that is shipped with what is not its own is refused, each time: another tokenizer, the report of another
model, a test split that it was trained on. Files that are wrong themselves are in ``test_defective_exports``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

import packing
from finished import RECIPES
from overproof.artifacts import Artifact, Store
from overproof.config import Evaluate, Gate, Recipe, load_recipe
from overproof.data.manifest import SPLITS, TOKENIZER, Manifest
from overproof.data.parquet_reader import Shards
from overproof.data.prepare import prepare
from overproof.data.tokenization import train_bpe
from overproof.data.tokenizer_match import require_tokenizer
from overproof.errors import InputError
from overproof.evaluate.gate import judge
from overproof.evaluate.metrics import MeasuredFile, Report
from overproof.export.gguf_file import export_gguf
from overproof.export.stage import export_models
from overproof.files import file_sha256
from overproof.package.package import open_package
from overproof.registry import FORMATS, TASKS
from overproof.stage_context import StageContext, no_progress
from text_classes import WORDS, write_jsonl

PARITY = Gate.model_validate({"rules": [{"kind": "parity", "at_most": 0.5}]})
SETTINGS = Evaluate(threads=1, decode_tokens=8, timed_requests=4, probe_prompts=2, probe_tokens=8)
Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return packing.make_recipe("text", tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def parents(recipe: Recipe) -> dict[str, Artifact]:
    """Every parent of a package of ``student-q4_0``."""
    return packing.make_parents(recipe)


@pytest.fixture(scope="module")
def packed(recipe: Recipe, parents: dict[str, Artifact]) -> Path:
    return packing.pack(recipe, parents).local()


@pytest.fixture(scope="module")
def another(recipe: Recipe, parents: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher in the student's format: of the student's shape, it has its size to the byte."""
    file = tmp_path_factory.mktemp("another") / "teacher-q4_0.gguf"
    tokenizer = parents["prepare"].local() / TOKENIZER
    export_gguf(parents["train"].local() / "model", tokenizer, file, "q4_0", recipe.name)
    assert file.stat().st_size == (parents["compress"].local() / "student-q4_0.gguf").stat().st_size
    return file


def changed(artifact: Artifact, folder: Path, spoil: Spoil) -> Artifact:
    """A copy of an artifact that was changed after its stage was done."""
    root = Path(shutil.copytree(artifact.local(), folder / artifact.record.stage))
    spoil(root)
    return replace(artifact, uri=str(root))


def assert_not_packed(recipe: Recipe, parents: dict[str, Artifact], folder: Path, words: str) -> None:
    """By the package stage, in a store of its own."""
    with pytest.raises(InputError, match=words):
        packing.pack(recipe.model_copy(update={"store": str(folder / "store")}), parents)


def put_in_place(package: Path, name: str, content: bytes) -> None:
    """Another part of a package, whose hash and size are put right in package.json."""
    (package / name).write_bytes(content)
    now = {"sha256": file_sha256(package / name), "size_bytes": len(content)}
    packing.edit(package / "package.json", lambda listing: listing["files"].update({name: now}))


# --- a stale tokenizer ----------------------------------------------------------------------------


def swap_two_ids(root: Path) -> None:
    """Every token is as before but for two, each of which has the other's id."""
    spec = json.loads((root / TOKENIZER).read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (root / TOKENIZER).write_text(json.dumps(spec))


def take_another(root: Path) -> None:
    train_bpe(["an entirely other corpus, with other pairs"], 300).save(str(root / TOKENIZER))


def lay_out_otherwise(root: Path) -> None:
    """The same tokenizer in other bytes: nobody has looked at these."""
    (root / TOKENIZER).write_text(json.dumps(json.loads((root / TOKENIZER).read_text()), indent=1))


STALE = pytest.mark.parametrize("spoil", [take_another, swap_two_ids], ids=lambda spoil: spoil.__name__)


@STALE
def test_a_tokenizer_that_was_changed_after_training_is_neither_exported_nor_measured(
    text: dict[str, Artifact], make_recipe: Callable[..., Recipe], tmp_path: Path, spoil: Spoil
) -> None:
    prepared = changed(text["prepare"], tmp_path, spoil)
    draft = Store(str(tmp_path / "store")).new_writer("test", "compress", "c" * 64, {}, {})
    words = r"tokenizer\.json: sha256 is .*; expected .*, of the tokenizer that split the texts .*put it back"
    with pytest.raises(InputError, match=words):
        export_models(StageContext(make_recipe("text"), text | {"prepare": prepared}, draft, no_progress))
    task, file = TASKS["language_modeling"], text["compress"].local() / "student.gguf"
    with pytest.raises(InputError, match=words):
        task.probe(file, prepared.local(), SETTINGS, "llama.cpp", FORMATS["gguf"], lambda _: None)


@STALE
def test_a_model_whose_own_tokenizer_is_not_the_datas_is_not_trained(
    text: dict[str, Artifact], tmp_path: Path, spoil: Spoil
) -> None:
    model = Path(shutil.copytree(text["train"].local() / "model", tmp_path / "model"))
    require_tokenizer(model, text["prepare"])
    spoil(model)
    words = r"is not the tokenizer of the data .*: vocabulary entry \d+: .*: set data\.tokenizer to"
    with pytest.raises(InputError, match=words):
        require_tokenizer(model, text["prepare"])


def test_a_file_whose_engine_splits_texts_otherwise_is_refused(text: dict[str, Artifact], tmp_path: Path) -> None:
    """Two tokens of the file's own vocabulary are swapped. Its quality is as before: rows hold numbers of tokens."""
    file = shutil.copyfile(text["compress"].local() / "student.gguf", tmp_path / "stale.gguf")
    reader = gguf.GGUFReader(file, "r+")
    tokens = reader.fields["tokenizer.ggml.tokens"]
    texts = {bytes(tokens.parts[place]): tokens.parts[place] for place in tokens.data}
    texts[b"e"][:], texts[b"t"][:] = ord("t"), ord("e")
    reader.data.flush()
    root, task = text["prepare"].local(), TASKS["language_modeling"]
    metrics = task.probe(file, root, SETTINGS, "llama.cpp", FORMATS["gguf"], lambda _: None)
    assert metrics["parity_nats"].value < PARITY.rules[0].model_dump()["at_most"]
    measured = MeasuredFile(name="stale", student="student", format="f16", size_bytes=1, sha256="0" * 64,
                            candidate=True, metrics=metrics)  # fmt: skip
    report = Report(task="language_modeling", quality=task.quality.name, engine="llama.cpp", computes_with="",
                    confidence=0.95, measured=(measured,), comparisons=())  # fmt: skip
    (verdict,) = judge(PARITY, report).candidates
    assert not verdict.passed
    assert "it splits 100 % of 12 test documents into other tokens than tokenizer.json" in verdict.reasons[0].text


@pytest.mark.parametrize("spoil", [take_another, swap_two_ids, lay_out_otherwise], ids=lambda spoil: spoil.__name__)
def test_a_model_is_neither_packed_nor_opened_with_another_tokenizer(
    recipe: Recipe, parents: dict[str, Artifact], packed: Path, tmp_path: Path, spoil: Spoil
) -> None:
    words = r"tokenizer\.json: sha256 .*; the tokenizer of the texts that were measured was .*: evaluate again"
    spoiled = changed(parents["compress"], tmp_path, spoil)
    assert_not_packed(recipe, parents | {"compress": spoiled}, tmp_path, words)

    def put_another(package: Path) -> None:
        spoil(package)
        put_in_place(package, TOKENIZER, (package / TOKENIZER).read_bytes())

    packing.assert_refused(packed, tmp_path, put_another, words)


def test_a_report_that_names_no_tokenizer_is_of_no_model_that_has_one(packed: Path, tmp_path: Path) -> None:
    packing.assert_refused(
        packed, tmp_path, lambda p: packing.edit(p / "report.json", lambda r: r.pop("tokenizer_sha256")),
        "was one that the report does not name; a model is served with no other: evaluate again",
    )  # fmt: skip


# --- a student under its teacher's report ---------------------------------------------------------


def test_a_file_that_was_changed_after_it_was_measured_is_not_packed(
    recipe: Recipe, parents: dict[str, Artifact], another: Path, tmp_path: Path
) -> None:
    """By a byte, or for another model's of the same size."""
    own = (parents["compress"].local() / "student-q4_0.gguf").read_bytes()
    for number, content in enumerate((own + b"\0", own[:-1] + bytes([own[-1] ^ 1]), another.read_bytes())):
        given = changed(parents["compress"], tmp_path / str(number),
                        lambda root, content=content: (root / "student-q4_0.gguf").write_bytes(content))  # fmt: skip
        words = r"model\.gguf: sha256 .*; measured was .*; only the measured file is served: evaluate again"
        assert_not_packed(recipe, parents | {"compress": given}, tmp_path, words)


def test_a_student_is_not_packed_under_the_report_of_its_teacher(
    recipe: Recipe, parents: dict[str, Artifact], another: Path, tmp_path: Path
) -> None:
    teachers = {"sha256": file_sha256(another), "size_bytes": another.stat().st_size}

    def measure_teacher(root: Path) -> None:
        report = json.loads((root / "report.json").read_text())
        next(file for file in report["measured"] if file["name"] == "student-q4_0").update(teachers)
        (root / "report.json").write_text(json.dumps(report))

    given = changed(parents["evaluate"], tmp_path, measure_teacher)
    measured = f"measured was {teachers['sha256'][:12]}… with {teachers['size_bytes']}"
    words = f"{measured}; only the measured file is served: evaluate again"
    assert_not_packed(recipe, parents | {"evaluate": given}, tmp_path, words)


def test_a_report_of_other_students_packs_none(recipe: Recipe, parents: dict[str, Artifact], tmp_path: Path) -> None:
    def rename(root: Path) -> None:
        for name in ("report.json", "verdict.json"):
            if (root / name).is_file():
                (root / name).write_text((root / name).read_text().replace('"student-', '"pupil-'))

    given = {stage: changed(parents[stage], tmp_path, rename) for stage in ("evaluate", "gate")}
    words = r"report\.json: is of pupil-q4_0; expected one of the exports of .*, which are .*student-q4_0.*: evaluate"
    assert_not_packed(recipe, parents | given, tmp_path, words)


def test_another_model_in_a_package_is_not_opened(packed: Path, another: Path, tmp_path: Path) -> None:
    """Of the same size, with its hash put right, so that only the report is not its own."""
    packing.assert_refused(
        packed, tmp_path, lambda package: put_in_place(package, "model.gguf", another.read_bytes()),
        r"model\.gguf: sha256 .*; measured was .*; only the measured file is served: evaluate again",
    )  # fmt: skip


def test_another_report_in_a_package_is_not_opened(packed: Path, another: Path, tmp_path: Path) -> None:
    """The teacher's package, report and all, but for the model."""
    own = open_package(packed).sha256
    content = (packed / "report.json").read_text().replace(own, file_sha256(another)).encode()
    packing.assert_refused(
        packed, tmp_path, lambda package: put_in_place(package, "report.json", content),
        f"sha256 {own[:12]}… .*; measured was {file_sha256(another)[:12]}…",
    )  # fmt: skip


def test_scores_of_two_files_are_no_report(text: dict[str, Artifact]) -> None:
    """A file that is written anew while it is scored, part by part."""
    task, root, folder = TASKS["language_modeling"], text["prepare"].local(), text["compress"].local()
    parts = [
        task.score(folder / f"{name}.gguf", root, task.units(root, None)[share], SETTINGS, "llama.cpp",
                   FORMATS["gguf"], lambda _: None)
        for name, share in (("student", slice(0, 1)), ("student", slice(1, 2)), ("control", slice(1, 2)))
    ]  # fmt: skip
    assert len(parts[0].joined(parts[1]).units) == 2
    with pytest.raises(InputError, match="it was changed while it was scored, export and evaluate again"):
        parts[0].joined(parts[2])


# --- a test split that leaked into training -------------------------------------------------------


def as_it_is(text: str) -> str:
    return text


def other_case_and_spaces(text: str) -> str:
    return f"  {text.upper().replace(' ', '  ')}\n"


def a_word_changed(text: str) -> str:
    words = text.split()
    return " ".join([*words[:30], "otherwise", *words[31:]])


def a_sentence_more(text: str) -> str:
    return f"{text} Read more about it here."


def numbered_texts(count: int) -> list[tuple[str, str]]:
    """Texts of sixty words, each of which begins with its number."""
    rng, names = np.random.default_rng(0), list(WORDS)
    every = [word for words in WORDS.values() for word in words] + [f"w{number}" for number in range(200)]
    return [(f"n{number} {' '.join(rng.choice(every, 59))}", names[number % 3]) for number in range(count)]


def prepared_splits(folder: Path, texts: list[tuple[str, str]], *changes: str) -> tuple[Manifest, dict[str, list[str]]]:
    """The manifest, and the numbers of the texts in each split."""
    folder.mkdir()
    data: dict[str, Any] = {
        "kind": "text_classification", "source": {"kind": "jsonl", "path": str(write_jsonl(folder / "a.jsonl", texts))},
        "tokenizer": {"kind": "bpe", "vocab_size": 384}, "sequence_length": 16, "validation_fraction": 0.1,
        "test_fraction": 0.2, "shards": 1, "rows_per_group": 1,
    }  # fmt: skip
    asked = load_recipe(RECIPES / "minilm-topics.yaml", (f"store={folder}", f"data={json.dumps(data)}", *changes))
    draft = Store(asked.store).new_writer(asked.name, "prepare", "d" * 64, {}, {})
    prepare(StageContext(asked, {}, draft, no_progress))
    root = Path(draft.uri)
    tokenizer, found = Tokenizer.from_file(str(root / TOKENIZER)), dict[str, list[str]]()
    for split in SPLITS:
        shards = Shards(root, split)
        rows = tokenizer.decode_batch(shards.take(np.arange(shards.rows))["tokens"].clip(0).tolist())
        found[split] = [re.findall(r"n\s?(\d+)", row.lower())[0] for row in rows]
    return Manifest.read(root), found


@pytest.mark.parametrize(
    "leak", [as_it_is, other_case_and_spaces, a_word_changed, a_sentence_more], ids=lambda leak: leak.__name__
)
def test_what_the_test_split_holds_is_not_trained_on(tmp_path: Path, leak: Callable[[str], str]) -> None:
    texts = numbered_texts(60)
    given = [*texts, *((leak(text), label) for text, label in texts)]
    manifest, numbers = prepared_splits(tmp_path / "prepared", given)
    assert not set(numbers["train"]) & {*numbers["test"], *numbers["validation"]}
    if leak is as_it_is:
        assert manifest.dropped["duplicates"] == 60
        return
    _, leaked = prepared_splits(tmp_path / "leaked", given, "data.near_duplicates=null")
    assert len(set(leaked["train"]) & {*leaked["test"], *leaked["validation"]}) > 10
    assert manifest.near_duplicates is not None
    assert manifest.near_duplicates.documents == len(leaked["train"]) - len(numbers["train"]) > 10


def test_one_leaked_text_among_many_is_found(tmp_path: Path) -> None:
    texts = numbered_texts(120)
    for number, (text, label) in enumerate(texts):
        given = [*texts, (a_word_changed(text), label)]
        _, leaked = prepared_splits(tmp_path / f"leaked{number}", given, "data.near_duplicates=null")
        if str(number) in set(leaked["train"]) & set(leaked["test"]):
            break
    manifest, numbers = prepared_splits(tmp_path / "prepared", given)
    assert str(number) in numbers["test"]
    assert str(number) not in numbers["train"]
    assert len(numbers["train"]) == len(leaked["train"]) - 1
    assert manifest.near_duplicates is not None
    assert (manifest.near_duplicates.documents, manifest.near_duplicates.test_documents) == (1, 1)


def test_what_the_test_split_holds_is_not_trained_on_in_images_either(tmp_path: Path) -> None:
    """Each is there twice, with the same class or another, and as one kind of file or another."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
    for number in range(40):
        image = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8))
        image.save(tmp_path / f"images/cat/{number}.png")
        image.save(tmp_path / f"images/{'cat' if number % 2 else 'dog'}/{number}.bmp")
    source = f"data.source={{kind: folder, path: {tmp_path / 'images'}}}"
    asked = load_recipe(RECIPES / "digits.yaml", (f"store={tmp_path}", source, "data.test_fraction=0.3",
                                                  "data.rows_per_group=1", "data.shards=1"))  # fmt: skip
    draft = Store(asked.store).new_writer(asked.name, "prepare", "d" * 64, {}, {})
    prepare(StageContext(asked, {}, draft, no_progress))
    shards = {split: Shards(Path(draft.uri), split) for split in SPLITS}
    pixels = {split: {p.tobytes() for p in s.take(np.arange(s.rows))["pixels"]} for split, s in shards.items()}
    assert not pixels["train"] & (pixels["test"] | pixels["validation"])
    manifest = Manifest.read(Path(draft.uri))
    assert manifest.dropped["copies of held-out images"] == 80 - sum(s.rows for s in shards.values()) > 10
