"""Labelled texts of any source as shards: what is read, how it is split and cut, and what is refused."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from finished import RECIPES
from overproof.artifacts import Store
from overproof.config import Recipe, load_recipe
from overproof.data.manifest import SPLITS, TOKENIZER, Manifest
from overproof.data.parquet_reader import Shards
from overproof.data.prepare import prepare
from overproof.distill.losses import distillation_loss
from overproof.errors import InputError
from overproof.models.base import Prediction
from overproof.models.hf_directory import to_tensors
from overproof.models.roberta import PADDING_ID
from overproof.registry import TASKS
from overproof.stage_context import Notice, Progress, ProgressEvent, StageContext, no_progress
from overproof.tasks.texts import Texts, encode_texts, truncating_tokenizer
from overproof.train.cross_entropy import mean_cross_entropy
from overproof.train.objective import CrossEntropy
from text_classes import WORDS, labelled_texts, write_base, write_jsonl

TEXTS = labelled_texts()


def recipe(folder: Path, source: str, *changes: str, tokenizer: str = "{kind: bpe, vocab_size: 384}") -> Recipe:
    sizes = "sequence_length: 16, validation_fraction: 0.1, test_fraction: 0.2, shards: 1, rows_per_group: 4"
    data = f"data={{kind: text_classification, source: {source}, tokenizer: {tokenizer}, {sizes}}}"
    return load_recipe(RECIPES / "minilm-topics.yaml", (f"store={folder}/store", data, *changes))


def prepared(asked: Recipe, progress: Progress = no_progress) -> Path:
    name = hashlib.sha256(str(asked).encode()).hexdigest()
    draft = Store(asked.store).new_writer(asked.name, "prepare", name, {}, {})
    prepare(StageContext(asked, {}, draft, progress))
    return Path(draft.uri)


def rows_of(root: Path) -> dict[str, list[tuple[list[int], int]]]:
    found = {}
    for split in SPLITS:
        shards = Shards(root, split)
        columns = shards.take(np.arange(shards.rows))
        found[split] = list(zip(columns["tokens"].tolist(), columns["label"].tolist(), strict=True))
    return found


def write_source(kind: str, folder: Path) -> str:
    """The same texts in each format, in two files."""
    folder.mkdir()
    for number in range(2):
        part = TEXTS[number::2]
        table = {"text": [text for text, _ in part], "label": [label for _, label in part]}
        if kind == "jsonl":
            write_jsonl(folder / f"{number}.jsonl", part)
        elif kind == "csv":
            with (folder / f"{number}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("label", "more", "text"), *((label, 1, text) for text, label in part)])
        elif kind == "parquet":
            table["label"] = pa.array(table["label"]).dictionary_encode()
            pq.write_table(pa.table(table), folder / f"{number}.parquet")
        else:
            for row, (text, label) in enumerate(part):
                (folder / label).mkdir(exist_ok=True)
                (folder / label / f"{number}-{row}.txt").write_text(text)
    return f"{{kind: {kind}, path: {folder}}}"


def test_every_source_gives_the_same_shards(tmp_path: Path) -> None:
    found = {kind: prepared(recipe(tmp_path, write_source(kind, tmp_path / kind))) for kind in
             ("jsonl", "csv", "parquet", "folder")}  # fmt: skip
    rows = {kind: rows_of(root) for kind, root in found.items()}
    for kind in found:
        assert rows[kind] == rows["jsonl"], kind
        assert (found[kind] / TOKENIZER).read_bytes() == (found["jsonl"] / TOKENIZER).read_bytes()
    manifest = Manifest.read(found["jsonl"])
    assert manifest.details["classes"] == list(WORDS)
    assert (manifest.outputs, manifest.positions) == (3, 1)
    assert manifest.tokenizer_sha256 == hashlib.sha256((found["jsonl"] / TOKENIZER).read_bytes()).hexdigest()
    assert {split: part.rows for split, part in manifest.splits.items()} == {"train": 84, "validation": 12, "test": 24}
    every = [tuple(tokens) for split in SPLITS for tokens, _ in rows["jsonl"][split]]
    assert len(set(every)) == len(TEXTS)
    for split in SPLITS:  # each class has its share
        assert len(set(Counter(label for _, label in rows["jsonl"][split]).values())) == 1


def test_a_row_is_what_the_tokenizer_makes_of_its_text(tmp_path: Path) -> None:
    source = f"{{kind: jsonl, path: {write_jsonl(tmp_path / 't.jsonl', TEXTS)}}}"
    asked = recipe(tmp_path, source, "data.sequence_length=40")
    root = prepared(asked)
    tokenizer = Tokenizer.from_file(str(root / TOKENIZER))
    labels = {tuple(tokenizer.encode(text).ids): label for text, label in TEXTS}
    details = Manifest.read(root).details
    for tokens, label in rows_of(root)["test"]:
        length = tokens.index(-1)
        assert set(tokens[length:]) == {-1}
        assert labels[tuple(tokens[:length])] == details["classes"][label]
        assert [tokenizer.id_to_token(tokens[place]) for place in (0, length - 1)] == ["[CLS]", "[SEP]"]
    assert details["vocabulary"] == tokenizer.get_vocab_size()
    before = TASKS["text_classification"].shape(asked.data)
    assert before.details["classes"] == details["classes"]
    assert details["vocabulary"] <= before.details["vocabulary"] == 384
    padding = tokenizer.token_to_id("[PAD]")
    assert before.details["padding"] == details["padding"] == padding == PADDING_ID  # whatever the family


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    told: list[ProgressEvent] = []
    source = f"{{kind: jsonl, path: {write_jsonl(tmp_path / 't.jsonl', TEXTS)}}}"
    asked = recipe(tmp_path, source, "data.sequence_length=6")
    root = prepared(asked, told.append)
    manifest = Manifest.read(root)
    assert manifest.details["truncated"] == len(TEXTS)
    assert "120 of 120 texts are longer than 6 tokens" in next(e.text for e in told if isinstance(e, Notice))
    separator = Tokenizer.from_file(str(root / TOKENIZER)).token_to_id("[SEP]")
    assert all(tokens[-1] == separator for tokens, _ in rows_of(root)["test"])
    assert "120 of the 120 texts" in TASKS["text_classification"].card(manifest, asked.evaluate).intended_use


def test_only_texts_of_a_split_are_counted_as_cut(tmp_path: Path) -> None:
    """What does not fill a row group of the train split is left out."""
    texts = labelled_texts(122)
    source = f"{{kind: jsonl, path: {write_jsonl(tmp_path / 't.jsonl', texts)}}}"
    manifest = Manifest.read(prepared(recipe(tmp_path, source, "data.sequence_length=6")))
    assert manifest.splits["train"].rows == 84  # of 86
    assert manifest.details["truncated"] == sum(split.rows for split in manifest.splits.values()) < len(texts)


def test_classes_that_are_numbers_have_one_order() -> None:
    assert Texts(["a", "b"], [("10", "1"), ("01",)], {}).classes == ["01", "1", "10"]
    assert Texts(["a", "b"], [("10", "9"), ("x",)], {}).classes == ["10", "9", "x"]


def test_a_text_stands_once_and_in_one_class(tmp_path: Path) -> None:
    twice = [*TEXTS, *TEXTS[:7], ("of two classes", "food"), ("of two classes", "plant")]
    found = [prepared(recipe(tmp_path, f"{{kind: jsonl, path: {write_jsonl(tmp_path / f'{i}.jsonl', texts)}}}"))
             for i, texts in enumerate((TEXTS, twice[::-1]))]  # fmt: skip
    assert rows_of(found[0]) == rows_of(found[1])
    assert Manifest.read(found[1]).dropped == {"duplicates": 8, "texts of several classes": 1}


@pytest.mark.parametrize("chosen", ["balanced", "{plant: 3.0, food: 0.5}"])
def test_classes_count_by_their_weights(chosen: str, tmp_path: Path) -> None:
    """In the labels' loss and in the teacher's, and the same however a batch is shared between workers."""
    texts = [(text, label) for number, (text, label) in enumerate(TEXTS) if label == "food" or number % 4 == 0]
    source = f"{{kind: jsonl, path: {write_jsonl(tmp_path / 't.jsonl', texts)}}}"
    root = prepared(recipe(tmp_path, source, f"data.class_weights={chosen}"))
    shards = Shards(root, "train")
    columns = shards.take(np.arange(shards.rows))
    names = np.array(Manifest.read(root).details["classes"])[columns["label"]]
    weight = {name: columns["weight"][names == name] for name in WORDS}
    assert columns["weight"].mean() == pytest.approx(1)
    if chosen == "balanced":
        assert weight["food"].sum() == pytest.approx(weight["plant"].sum()) == pytest.approx(weight["animal"].sum())
    else:
        ratios = (weight["plant"][0] / weight["animal"][0], weight["food"][0] / weight["animal"][0])
        assert ratios == pytest.approx((3, 0.5))
    logits = torch.randn(shards.rows, 3, generator=torch.Generator().manual_seed(0))
    batch = to_tensors(columns)

    def model(input_ids: torch.Tensor, **_: torch.Tensor) -> Any:
        return SimpleNamespace(logits=logits[: len(input_ids)])

    predict = partial(TASKS["text_classification"].predict, model)  # type: ignore[arg-type]
    each = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
    expected = float((each * batch["weight"]).mean())
    found, _ = CrossEntropy(lambda _, rows: predict(rows)).loss(torch.nn.Identity(), batch)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    prediction = predict(batch)
    terms = distillation_loss(
        prediction.logits_BPV, prediction.targets_BP, prediction.mask_BP, None, prediction.logits_BPV, 1.0, 0.25
    )
    assert float(terms.cross_entropy) == pytest.approx(expected, rel=1e-5)
    assert float(terms.divergence) == pytest.approx(0, abs=1e-6)
    half, shares = shards.rows // 2, list[float]()
    for rows in (slice(0, half), slice(half, None)):
        own = Prediction(*(each[rows] for each in (prediction.logits_BPV, prediction.targets_BP, prediction.mask_BP)))
        shares.append(float(mean_cross_entropy(own.logits_BPV, own.targets_BP, own.mask_BP)))
    assert sum(shares) / 2 == pytest.approx(expected, rel=1e-5)


def other_tokenizers() -> dict[str, Tokenizer]:
    """Byte-level BPE with RoBERTa's special tokens, and a unigram model without any."""
    texts = [text for text, _ in TEXTS]
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    byte_level.train_from_iterator(texts, trainer)
    byte_level.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    unigram.train_from_iterator(texts, trainer)
    return {"byte-level": byte_level, "unigram": unigram}


@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
def test_a_models_own_tokenizer_is_used_as_it_is(kind: str, tmp_path: Path) -> None:
    """Settings that its file has for padding and cutting are not."""
    tokenizer = other_tokenizers()[kind]
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(tmp_path / TOKENIZER))
    source = f"{{kind: jsonl, path: {write_jsonl(tmp_path / 't.jsonl', TEXTS)}}}"
    root = prepared(recipe(tmp_path, source, "data.sequence_length=32", tokenizer=f"{{kind: file, path: {tmp_path}}}"))
    expected_file = json.loads((tmp_path / TOKENIZER).read_text()) | {"padding": None, "truncation": None}
    assert json.loads((root / TOKENIZER).read_text()) == expected_file
    tokenizer.no_padding()
    tokenizer.no_truncation()
    expected = {tuple(tokenizer.encode(text).ids) for text, _ in TEXTS}
    for tokens, _ in rows_of(root)["test"]:
        assert tuple(token for token in tokens if token != -1) in expected
    assert Manifest.read(root).details["padding"] == (1 if kind == "byte-level" else None)


def test_a_text_that_spells_a_special_token_is_text(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    tokenizer = truncating_tokenizer((folder / TOKENIZER).read_bytes(), "x", 16)
    (ids,) = encode_texts(tokenizer, ["cat [SEP] dog"]).tokens_RT.tolist()
    assert ids.count(tokenizer.token_to_id("[SEP]")) == 1


def spoiled(line: Any) -> bytes:
    return (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": "  ", "label": "food"}, r"t\.jsonl, line 121: the text is empty; expected one"),
        ({"text": None, "label": "food"}, r"line 121: the text is empty"),
        ({"text": 3, "label": "food"}, r"line 121: the text is int; expected a string"),
        ({"text": "a \ud800 b", "label": "food"}, r"line 121: the text holds half of a character"),
        ({"text": "soup", "label": None}, r"line 121: there is no class; expected its name or number"),
        ({"text": "soup", "label": " "}, r"line 121: there is no class"),
        ({"text": "soup", "label": 1.5}, r"line 121: the class is float; expected its name or number"),
        ({"txt": "soup", "label": "food"}, r"line 121: found txt, label; expected 'text' \(data\.source\.text\), near"),
        ({"text": "soup"}, r"line 121: found text; expected 'label' \(data\.source\.label\)"),
        (["soup", "food"], r"line 121: found \['soup', 'food'\]; expected an object"),
        (b'{"text": ', r"line 121: not JSON: "),
        (b'{"text": "\xff", "label": "food"}', r"line 121: not UTF-8: .*expected text in UTF-8"),
        (
            {"text": "of two", "label": ["food", "plant"]},
            r"line 121: the class is a list of 2; expected one class: .* 'multi_label_text_classification'",
        ),
        ({"text": "rare", "label": "alone"}, r"data: class 'alone' has 1 texts, and none falls into the train split"),
    ],
)
def test_what_is_no_labelled_text_is_named(line: Any, words: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + spoiled(line))
    with pytest.raises(InputError, match=words):
        prepared(recipe(tmp_path, f"{{kind: jsonl, path: {path}}}", "data.test_fraction=0.6"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"text,lable\nsoup,food\n", r"t\.csv: found text, lable; expected 'label' .*nearest is 'lable'"),
        ("t.csv", b"text,label,label\nsoup,food,plant\n", r"t\.csv: several columns are named 'label'"),
        ("t.csv", b"text,label\n\xff\xfe,food\n", r"t\.csv: not csv: .*UTF8"),
        ("t.csv", b'text,label\nsoup,food\n"",food\n', r"t\.csv, row 2: the text is empty"),
        ("t.parquet", b"PAR1 nothing", r"t\.parquet: not parquet"),
        ("t.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n', r"there is no class but 'x'; exp"),
        ("t.jsonl", b"\n", r"t\.jsonl: there is no text; expected texts of two classes"),
        ("other.txt", b"", r"other\.jsonl: not found; expected a folder that holds \*\.jsonl"),
        ("food/1.txt", b"\xff", r"food/1\.txt: not UTF-8"),
        ("1.txt", b"soup", r"1\.txt: lies beside the classes' folders; expected .*/CLASS/1\.txt"),
    ],
)
def test_files_that_cannot_be_used_are_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "in" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    kind = "folder" if file.suffix == ".txt" and name != "other.txt" else file.suffix[1:].replace("txt", "jsonl")
    path = tmp_path / "in" if kind == "folder" else file.with_suffix(f".{kind}")
    with pytest.raises(InputError, match=words):
        prepared(recipe(tmp_path, f"{{kind: {kind}, path: {path}}}"))


def test_a_weight_of_no_class_is_refused(tmp_path: Path) -> None:
    source = f"{{kind: jsonl, path: {write_jsonl(tmp_path / 't.jsonl', TEXTS)}}}"
    with pytest.raises(InputError, match=r"data\.class_weights\.fod: there is no such class, nearest is 'food'"):
        prepared(recipe(tmp_path, source, "data.class_weights={fod: 2.0}"))


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [("nothing", r"nothing: no tokenizer\.json there; expected the file or its folder"),
     ("t.jsonl", r"data\.tokenizer: not a tokenizer\.json: ")],
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused(tokenizer: str, words: str, tmp_path: Path) -> None:
    source = f"{{kind: jsonl, path: {write_jsonl(tmp_path / 't.jsonl', TEXTS)}}}"
    with pytest.raises(InputError, match=words):
        prepared(recipe(tmp_path, source, tokenizer=f"{{kind: file, path: {tmp_path}/{tokenizer}}}"))
