"""What is seen of data before their task is known, and what is told of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from PIL import Image
from pyarrow import parquet as pq

from overproof.models.encoder import MULTI_LABEL
from overproof.tasks.image_recognition import recognise_images
from overproof.tasks.multi_label_text_classification import TASK as SEVERAL
from overproof.tasks.recognition import ColumnFlags, Fit, Misfit, Question, look_at
from overproof.tasks.table_recognition import recognise_table
from overproof.tasks.table_samples import SAMPLE_ROWS
from overproof.tasks.text_classification import TASK
from overproof.tasks.text_recognition import recognise_text
from text_classes import labelled_texts, texts_of_several, write_base, write_jsonl

LLAMA = {"architectures": ["LlamaForCausalLM"], "_name_or_path": "teacher"}
RECORDS = [{"text": f"text of record {i}, and so on", "number": i} for i in range(60)]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda i: {"further": i if i % 2 else i / 2}, "double"),
        (lambda i: {"further": 2**70 if i % 2 else 1}, "double"),
        (lambda i: {"further": f"2026-01-{i % 28 + 1:02}"}, "string"),
        (lambda i: {"further": None, "i": i}, "null"),
        (lambda i: {"further": {"a": i}}, "struct<>"),
        (lambda i: {"further": i if i % 2 else str(i)}, "texts (line 1) and whole numbers (line 2)"),
        (lambda i: {"further": {"a": 1} if i else [1.5]}, "lists (line 1) and objects (line 2)"),
        (lambda i: {"further": ["a", i] if i else []}, "list<item: string>"),
        (lambda i: {"further": [["a"]] if i else []}, "list<item: null>"),
        (lambda i: {"further": "a" if i else [1]}, "lists of names or whole numbers (line 1) and texts (line 2)"),
        (lambda i: {"further": True if i else 0}, "whole numbers (line 1) and true or false (line 2)"),
        (lambda i: {"further": {"a": i if i % 2 else str(i)}}, "struct<>"),
    ],
)
def test_a_column_of_json_is_of_the_kind_of_all_its_values(
    change: Callable[[int], dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    """And what another column holds does not matter to who does not read it."""
    path = write(tmp_path / "t.jsonl", [record | change(i) for i, record in enumerate(RECORDS)])
    look = look_at(str(path))
    assert f"further ({kind})" in look.tables[".jsonl"].listed
    found = recognise_text(look, LLAMA, ColumnFlags(text="text"))
    assert isinstance(found, Fit)
    assert found.units == len(RECORDS)


@pytest.mark.parametrize(("architecture", "across"), [("LlamaForCausalLM", "false"), ("StableLmForCausalLM", "true")])
def test_documents_are_kept_apart_where_the_models_family_is_known_to(
    architecture: str, across: str, tmp_path: Path
) -> None:
    look = look_at(str(write(tmp_path / "t.jsonl", RECORDS)))
    found = recognise_text(look, LLAMA | {"architectures": [architecture]}, ColumnFlags())
    assert isinstance(found, Fit)
    assert found.values["cross_document_attention"] == across


def test_a_text_column_of_several_kinds_is_named(tmp_path: Path) -> None:
    look = look_at(str(write(tmp_path / "t.jsonl", [*RECORDS, {"text": 5, "title": "a"}])))
    found = recognise_text(look, LLAMA, ColumnFlags())
    assert isinstance(found, Question)
    assert found.text.startswith("column 'text' holds texts (line 1) and whole numbers (line 61); ")
    assert isinstance(recognise_text(look, LLAMA, ColumnFlags(text="title")), Fit)
    asked = recognise_text(look, LLAMA, ColumnFlags(text="text"))
    assert isinstance(asked, Misfit)
    assert "whole numbers (line 61); expected one kind" in asked.why


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n[1]\n', "t.jsonl: not jsonl: line 2 is no object"),
        (b'[\n{"text": "a"}\n]', "t.jsonl: not jsonl: line 1: "),
        (b"[" * 100_000, "t.jsonl: not jsonl: line 1 is nested too deeply"),
        ('{"text": "größe"}'.encode("latin-1"), "t.jsonl: not UTF-8: "),
    ],
)
def test_jsonl_that_is_none_is_told_by_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(content)
    found = recognise_text(look_at(str(tmp_path)), LLAMA, ColumnFlags())
    assert isinstance(found, Misfit)
    assert words in found.why


def test_a_bad_file_of_a_kind_that_is_not_needed_refuses_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe,\n")
    (tmp_path / "empty.parquet").write_bytes(b"")
    for i in range(60):
        (tmp_path / f"{i}.TXT").write_text(f"document {i} tells of {i * i} things")
    found = recognise_text(look_at(str(tmp_path)), LLAMA, ColumnFlags(pattern=("*.TXT",)))
    assert isinstance(found, Fit)
    (tmp_path / "empty.parquet").unlink()
    found = recognise_text(look_at(str(tmp_path)), LLAMA, ColumnFlags())
    assert isinstance(found, Fit)
    assert (found.units, found.data["source"]["pattern"]) == (60, "*.txt")
    (tmp_path / "60.txt").write_text("a document")
    found = recognise_text(look_at(str(tmp_path)), LLAMA, ColumnFlags())
    assert isinstance(found, Fit)
    assert (found.units, found.data["source"]["pattern"]) == (61, "*.txt")
    table = recognise_table(look_at(str(tmp_path)), None, ColumnFlags(), regression=False)
    assert isinstance(table, Misfit)
    assert "bad.csv: not UTF-8" in table.why
    (tmp_path / "records.jsonl").write_bytes(b"[")
    asked = recognise_text(look_at(str(tmp_path)), LLAMA, ColumnFlags())
    assert isinstance(asked, Question)
    assert (asked.flag, "records.jsonl: not jsonl" in asked.text) == ("--pattern", True)


def test_files_beside_a_table_are_told_of(tmp_path: Path) -> None:
    write(tmp_path / "records.jsonl", RECORDS)
    (tmp_path / "README.md").write_text("a note")
    found = recognise_text(look_at(str(tmp_path)), LLAMA, ColumnFlags())
    assert isinstance(found, Fit)
    assert "1 .md beside are left out: --pattern takes files" in found.reasons["documents"]


def test_which_rows_were_looked_at_is_told_where_they_are_not_all(tmp_path: Path) -> None:
    lines = "".join(f'"a note\nof two lines",{"ab"[i % 2]},{i}\n' for i in range(220_000))
    (tmp_path / "t.csv").write_text(f"note,label,x\n{lines}")
    sample = look_at(str(tmp_path)).tables[".csv"]
    assert 100_000 < sample.rows.num_rows < sample.total_rows
    assert sample.total_rows == pytest.approx(220_000, rel=0.05)
    found = recognise_table(look_at(str(tmp_path)), None, ColumnFlags(), regression=False)
    assert isinstance(found, Fit)
    assert f"2 classes, in the first {sample.rows.num_rows:,} of about " in found.reasons["target"]


def test_a_csv_that_is_not_utf8_is_named_by_its_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("x,colour\n1,grün\n2,rot\n".encode("latin-1"))
    assert "t.csv: not csv: column 'colour' is not UTF-8" in look_at(str(tmp_path)).unreadable[".csv"]


def base(folder: Path, **changes: Any) -> dict[str, Any]:
    """The configuration of a directory, as `shrink` hands it over."""
    path = write_base(folder / "base")
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config | {"_name_or_path": str(path)} | changes


def labelled(names: dict[str, str]) -> list[tuple[str, str]]:
    return [(text, names[label]) for text, label in labelled_texts()]


NAMED = {"animal": "animal", "food": "food", "plant": "plant"}
NUMBERED = {"animal": "0", "food": "1", "plant": "2"}
UNNAMED = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


@pytest.mark.parametrize(
    ("classes", "head", "refit"),
    [
        (NAMED, {"0": "animal", "1": "food", "2": "plant"}, None),
        (NAMED, {"0": "plant", "1": "food", "2": "animal"}, None),
        (NAMED, UNNAMED, "its own classes (LABEL_0, LABEL_1, LABEL_2) are not the data's, by name; if they are"),
        (NUMBERED, UNNAMED, None),
        (NAMED, {"0": "animal", "1": "food"}, "its own classes (animal, food) are not the data's"),
        (NAMED, None, "its own classes (unnamed) are not the data's"),
    ],
)
def test_a_head_is_the_datas_by_the_names_of_its_classes(
    classes: dict[str, str], head: dict[str, str] | None, refit: str | None, tmp_path: Path
) -> None:
    model = base(tmp_path, architectures=["BertForSequenceClassification"], id2label=head)
    path = write_jsonl(tmp_path / "t.jsonl", labelled(classes))
    found = TASK.recognise(look_at(str(path)), model, ColumnFlags())
    assert isinstance(found, Fit)
    assert (found.refit is None) == (refit is None)
    assert (refit or "of the data's classes, by their names") in found.reasons["head"]


def test_texts_and_classes_are_found_by_what_columns_hold(tmp_path: Path) -> None:
    texts = labelled_texts()
    columns = {"id": range(len(texts)), "a": [text for text, _ in texts], "b": [label for _, label in texts]}
    pa.csv.write_csv(pa.table({name: list(values) for name, values in columns.items()}), tmp_path / "t.csv")
    model = base(tmp_path)
    found = TASK.recognise(look_at(str(tmp_path / "t.csv")), model, ColumnFlags())
    assert isinstance(found, Fit)
    assert found.data["source"] | {"path": ""} == {"kind": "csv", "path": "", "text": "a", "label": "b"}
    assert (found.units, found.data["sequence_length"], found.flags) == (120, 16, {"--text", "--label"})
    assert found.refit == "BertModel has no classifier yet"
    twice = {name: list(values) for name, values in columns.items()} | {"c": list(columns["b"])}
    pa.csv.write_csv(pa.table(twice), tmp_path / "t.csv")
    asked = TASK.recognise(look_at(str(tmp_path / "t.csv")), model, ColumnFlags())
    assert isinstance(asked, Question)
    assert asked.flag == "--label"
    named = TASK.recognise(look_at(str(tmp_path / "t.csv")), model, ColumnFlags(label="c", text="a"))
    assert isinstance(named, Fit)
    assert named.data["source"]["label"] == "c"


@pytest.mark.parametrize(
    ("lists", "why"),
    [
        (lambda i: [i % 2, 1, 0], "holds lists in which the same value stands twice, as numbers of a vector do"),
        (lambda i: [f"a text of its own {i}"], "holds lists; what stands in them has 120 different texts in 120 rows"),
        (lambda _: ["one"], "holds lists; what stands in them has 1 value; expected two classes or more"),
    ],
)
def test_lists_that_are_no_classes_are_told_of(lists: Callable[[int], list[Any]], why: str, tmp_path: Path) -> None:
    """Asked for by their column; a column beside that is one of classes is taken without asking."""
    records = [
        {"text": text, "vector": lists(i), "embedding": [0.5], "about": names}
        for i, (text, names) in enumerate(texts_of_several())
    ]
    look, model = look_at(str(write(tmp_path / "t.jsonl", records))), base(tmp_path)
    found = SEVERAL.recognise(look, model, ColumnFlags(label="vector"))
    assert isinstance(found, Misfit)
    assert f"column 'vector' {why}" in found.why
    found = SEVERAL.recognise(look, model, ColumnFlags())
    assert isinstance(found, Fit)
    assert (found.data["source"]["label"], found.refit) == ("about", "BertModel has no classifier yet")
    assert isinstance(TASK.recognise(look, model, ColumnFlags()), Misfit)


def test_a_head_for_one_class_is_not_the_datas_of_several(tmp_path: Path) -> None:
    named = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "animal", "1": "food", "2": "plant"}}
    model = base(tmp_path, **named)
    pq.write_table(
        pa.table(
            {"text": [text for text, _ in texts_of_several()], "labels": [names for _, names in texts_of_several()]}
        ),
        tmp_path / "t.parquet",
    )
    for problem, refit in ((None, "its classifier is of one class a text, the data several"), (MULTI_LABEL, None)):
        found = SEVERAL.recognise(
            look_at(str(tmp_path / "t.parquet")), model | {"problem_type": problem}, ColumnFlags()
        )
        assert isinstance(found, Fit)
        assert found.refit == refit
    single = write_jsonl(tmp_path / "t.jsonl", labelled(NAMED))
    found = TASK.recognise(look_at(str(single)), model | {"problem_type": MULTI_LABEL}, ColumnFlags())
    assert isinstance(found, Fit)
    assert found.refit == "its classifier is of several, the data one"


def test_folders_of_texts_are_classes_and_rare_ones_are_told(tmp_path: Path) -> None:
    texts = [*labelled_texts(), ("a rare text", "stone"), ("a long text " * 40, "stone")]
    for i, (text, label) in enumerate(texts):
        (tmp_path / "texts" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / label / f"{i}.txt").write_text(text)
    model = base(tmp_path)
    found = TASK.recognise(look_at(str(tmp_path / "texts")), model, ColumnFlags())
    assert isinstance(found, Fit)
    assert found.reasons["rare classes"].startswith("stone (2): too few texts")
    assert "a folder for each class" in found.reasons["texts"]
    assert found.reasons["length"].startswith("16 tokens a row, by 122 of the texts, of which about 0.82 % are cut")
    assert isinstance(TASK.recognise(look_at(str(tmp_path / "texts/food")), model, ColumnFlags()), Misfit)


def test_one_class_alone_is_no_classification(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [(text, "one") for text, _ in labelled_texts()])
    found = TASK.recognise(look_at(str(path)), base(tmp_path), ColumnFlags(label="label"))
    assert isinstance(found, Misfit)
    assert "column 'label' has 1 value; expected two classes or more" in found.why


def test_classes_of_images_are_those_of_every_row(tmp_path: Path) -> None:
    """The first rows of a sorted table have one class alone."""
    content = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(content, format="png")
    rows, classes = SAMPLE_ROWS + 10, ["cat"] * SAMPLE_ROWS + ["dog"] * 10
    pq.write_table(
        pa.table({"image": pa.array([content.getvalue()] * rows), "label": pa.array(classes).dictionary_encode()}),
        tmp_path / "t.parquet",
    )
    model = {"image_size": 8, "num_channels": 1, "id2label": {"0": "cat", "1": "dog"}}
    found = recognise_images(look_at(str(tmp_path)), model, ColumnFlags())
    assert isinstance(found, Fit)
    assert "2 classes in 'label'" in found.reasons["images"]
    assert found.refit is None
