"""`overproof init` and `shrink`: what is found out, what is asked for, what is chosen, and a run to the package."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pyarrow import csv

from overproof.cli.main import main
from overproof.config import Recipe, load_recipe
from overproof.config.student_models import Pruned, TeacherLayers
from overproof.errors import InputError
from overproof.models.sizes import student_size
from overproof.registry import FAMILIES, FORMATS, TASKS
from overproof.shrink.choice import Asked
from overproof.shrink.estimate import choose_within
from overproof.shrink.given_model import inspect_model
from overproof.shrink.students import narrowed_students
from overproof.shrink.template import FEWEST_STEPS, change
from overproof.tasks.image_recognition import recognise_images
from overproof.tasks.recognition import ColumnFlags, Question, Shrinkable, look_at
from text_classes import labelled_texts, texts_of_several, write_base, write_jsonl

LAYERS = 4
ROWS = 200
Make = Callable[[Path], Path]


def png(value: int, edge: int = 16) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((edge, edge), value, np.uint8)).save(content, format="png")
    return content.getvalue()


def table(**columns: Any) -> Make:
    """A CSV file of numbers that tell the label, and further columns."""

    def make(folder: Path) -> Path:
        rows = np.random.default_rng(0).normal(size=(ROWS, 3))
        values = {f"x{i}": rows[:, i] for i in range(3)} | {
            name: column(rows) if callable(column) else column for name, column in columns.items()
        }
        path = folder / "my table.csv"
        csv.write_csv(pa.table(values), path)
        return path

    return make


def kinds(rows: np.ndarray) -> list[str]:
    return ["high" if total > 0 else "low" for total in rows.sum(axis=1)]


def amounts(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows.sum(axis=1) * 10)


def counts(rows: np.ndarray) -> np.ndarray:
    return np.arange(ROWS) % 7


def image_folders(edges: tuple[int, ...] = (16,)) -> Make:
    def make(folder: Path) -> Path:
        for name in ("cat", "dog"):
            (folder / "pets" / name).mkdir(parents=True)
            for i in range(40):
                content = png(i + 100 * (name == "dog"), edges[i % len(edges)])
                (folder / "pets" / name / f"{i}.png").write_bytes(content)
        return folder / "pets"

    return make


def image_parquet(folder: Path) -> Path:
    rows = [{"picture": {"bytes": png(i), "path": None}, "species": i % 3} for i in range(90)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "species.parquet")
    return folder / "species.parquet"


def images_of_one_class(folder: Path) -> Path:
    rows = [{"picture": png(i), "species": "cat"} for i in range(90)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "species.parquet")
    return folder / "species.parquet"


def texts(folder: Path) -> Path:
    rows = labelled_texts()
    csv.write_csv(
        pa.table({"review": [text for text, _ in rows], "about": [label for _, label in rows]}), folder / "texts.csv"
    )
    return folder / "texts.csv"


def texts_with_lists(folder: Path) -> Path:
    return write_jsonl(folder / "several.jsonl", texts_of_several())


def texts_with_separators(folder: Path) -> Path:
    rows = texts_of_several()
    columns = {"text": [text for text, _ in rows], "tags": ["; ".join(names) for _, names in rows]}
    csv.write_csv(pa.table(columns), folder / "several.csv")
    return folder / "several.csv"


def one_or_several(folder: Path) -> Path:
    rows = "".join(f"a text no. {i},{'ab'[i % 2]}{';c' * (i % 3 == 0)}\n" for i in range(90))
    return content("t.csv", f"text,label\n{rows}".encode())(folder)


def categories(folder: Path) -> Path:
    """As pandas writes columns of categories."""
    rows = np.random.default_rng(0).normal(size=(ROWS, 3))
    values: dict[str, Any] = {f"x{i}": rows[:, i] for i in range(3)}
    values["colour"] = pa.array(["red", "green"] * (ROWS // 2)).dictionary_encode()
    values["label"] = pa.array(kinds(rows)).dictionary_encode()
    pq.write_table(pa.table(values), folder / "categories.parquet")
    return folder / "categories.parquet"


def split_folders(folder: Path) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "pets" / split / name).mkdir(parents=True)
            (folder / "pets" / split / name / "1.png").write_bytes(png(9))
    return folder / "pets"


def content(name: str, data: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def half_of_a_parquet(folder: Path) -> Path:
    (folder / "parts").mkdir()
    pq.write_table(pa.table({"label": kinds(np.ones((ROWS, 3)))}), folder / "parts/a.parquet")
    (folder / "parts/b.parquet").write_bytes((folder / "parts/a.parquet").read_bytes()[:100])
    return folder / "parts"


def documents(folder: Path) -> Path:
    (folder / "notes").mkdir()
    for i in range(60):
        (folder / f"notes/{i}.md").write_text(f"document {i} tells of {i * i} things, one by one. " * 12)
    return folder / "notes"


def long_document(folder: Path) -> Path:
    """Longer than Arrow reads at once where it is not told to."""
    texts = ["one word after another " * 70_000, *(f"text of record {i}" for i in range(60))]
    path = folder / "records.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def jsonl(*names: str) -> Make:
    def make(folder: Path) -> Path:
        lines = [json.dumps({name: f"{name} of record {i}, and so on" for name in names}) for i in range(60)]
        (folder / "records.jsonl").write_text("\n".join(lines))
        return folder / "records.jsonl"

    return make


def write_llama(folder: Path, layers: int) -> Path:
    """A Llama directory with a tokenizer of its own and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from overproof.data.chat_template_files import CHAT_TEMPLATE
    from overproof.data.tokenization import train_bpe
    from overproof.models.hf_directory import save_model

    tokenizer = train_bpe([f"document {i} tells of {i * i} things, one by one. " for i in range(60)], 288)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        initializer_range=0.06, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), config, folder / "Tiny-Llama", folder / "tokenizer.json")
    (folder / "Tiny-Llama" / CHAT_TEMPLATE).write_text("{{ messages[0].content }}")
    return folder / "Tiny-Llama"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models"), LAYERS)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without a classifier."""
    return write_base(tmp_path_factory.mktemp("encoders") / "base", LAYERS)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command starts in, beside the data."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


CASES: dict[str, tuple[str, Make, tuple[str, ...], str, dict[str, Any]]] = {
    "classes of a CSV": (
        "-", table(label=kinds, day=pa.array([None] * ROWS, pa.date32()), note=[f"note {i}" for i in range(ROWS)]),
        (), "tabular_classification", {"target": "label", "drop": ("day", "note")},
    ),
    "categories of a Parquet": ("-", categories, (), "tabular_classification", {"target": "label", "drop": ()}),
    "a column whose name ends a line": (
        "-", table(**{"label": kinds, "odd\u2028name: x": [f"note {i}" for i in range(ROWS)]}), (),
        "tabular_classification", {"drop": ("odd\u2028name: x",)},
    ),
    "amounts of a CSV": ("-", table(price=amounts), ("--label", "price"), "tabular_regression", {"target": "price"}),
    "whole numbers as classes": (
        "-", table(stars=counts), ("--label", "stars", "--task", "tabular_classification"),
        "tabular_classification", {"target": "stars"},
    ),
    "a folder of images": ("-", image_folders(), (), "image_classification", {"height": None}),
    "images that are scaled": (
        "-", image_folders((16, 20)), ("--image-size", "12"), "image_classification", {"height": 12, "width": 12},
    ),
    "images in Parquet": ("-", image_parquet, (), "image_classification", {"height": None}),
    "a folder of text": ("LLAMA", documents, (), "language_modeling", {"sequence_length": 64}),
    "JSONL": ("LLAMA", jsonl("id", "text"), (), "language_modeling", {"sequence_length": 64}),
    "JSONL with a long line": ("LLAMA", long_document, (), "language_modeling", {"sequence_length": 256}),
    "JSONL with a column that is named": ("LLAMA", jsonl("q", "a"), ("--text", "a"), "language_modeling", {}),
    "texts with classes": ("BASE", texts, ("--text", "review"), "text_classification", {"sequence_length": 16}),
    "texts with lists of classes": (
        "BASE", texts_with_lists, (), "multi_label_text_classification", {"separator": None, "threshold": 0.5},
    ),
    "texts with separated classes": (
        "BASE", texts_with_separators, (), "multi_label_text_classification", {"separator": ";"},
    ),
}  # fmt: skip


def test_there_is_a_case_for_every_task_that_has_a_template() -> None:
    assert {case[3] for case in CASES.values()} == {k for k, task in TASKS.items() if isinstance(task, Shrinkable)}


@pytest.mark.parametrize("case", CASES)
def test_init_writes_a_recipe_that_fits_the_data(
    case: str, here: Path, llama: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, make, flags, kind, fields = CASES[case]
    data = make(here.parent)
    given = {"LLAMA": str(llama), "BASE": str(base)}.get(model, model)
    assert main(["init", given, "--data", str(data), *flags]) == 0
    printed = told(capsys)
    (path,) = here.iterdir()
    assert f"overproof run {path.name}" in printed
    for what in ("task", "teacher", "students", "formats", "gate", "time", "memory"):
        assert f"{what} " in printed
    recipe = load_recipe(path)
    assert recipe.data.kind == kind
    assert {name: getattr(recipe.data, name) for name in fields} == fields
    assert (recipe.train.steps > 0) == (model != "LLAMA")
    assert {"keep", "smaller", "parity"} == {rule.kind for rule in recipe.gate.rules}
    text = path.read_text()
    assert text.startswith("# Written by `overproof init ")
    assert f"# task: {kind}" in text
    assert main(["plan", str(path), "--set", f"store={here / 'store'}"]) == 0
    planned = told(capsys)
    assert "are not fewer than the teacher's" not in planned
    assert "gate warning" not in planned
    assert ("the teacher is taken as it is" in planned) == (model == "LLAMA")


def test_looking_loads_neither_torch_nor_ray(here: Path, llama: Path, base: Path) -> None:
    code = (
        "import sys; from overproof.cli.main import main\n"
        f"assert main(['init', {str(llama)!r}, '--data', {str(documents(here.parent))!r}]) == 0\n"
        f"assert main(['init', {str(base)!r}, '--data', {str(texts(here.parent))!r}]) == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_found_is_told_with_its_reason(here: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = documents(here.parent)
    assert (
        main(["init", str(llama), "--data", str(data), "--max-mb", "0.5", "--max-p95-ms", "40", "--keep", "0.9"]) == 0
    )
    printed = told(capsys)
    assert "LlamaForCausalLM, " in printed
    assert "with a tokenizer and a chat template" in printed
    assert "the given model as it is" in printed
    assert "60, about " in printed
    assert "the largest within 0.5 MB" in printed
    recipe = load_recipe(here / "tiny-llama-small.yaml")
    whole, half = (student.model for student in recipe.sweep.students)
    assert whole.model_dump() == {"kind": "teacher_layers", "layers": LAYERS}
    assert isinstance(half, Pruned)
    assert half.layers == 3  # the root of half of 4 times 4, each of them narrower
    shape = TASKS["language_modeling"].shape(recipe.data)
    sizes = [
        student_size(model, recipe.train.model, shape).parameters for model in (half, TeacherLayers(layers=LAYERS // 2))
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)
    assert [rule.model_dump() for rule in recipe.gate.rules[:3]] == [
        {"kind": "keep", "against": "teacher", "at_least": 0.9},
        {"kind": "size", "at_most_mb": 0.5},
        {"kind": "latency", "percentile": 95, "at_most_ms": 40},
    ]
    assert main(["init", str(llama), "--data", str(data), "--finetune", "7", "--name", "tuned"]) == 0
    assert load_recipe(here / "tuned.yaml").train.steps == 7


def test_a_tighter_budget_leaves_smaller_students_and_variants(
    here: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = documents(here.parent)

    def students(max_mb: float) -> tuple[list[Any], tuple[str, ...]]:
        name = f"n{max_mb}"
        assert main(["init", str(llama), "--data", str(data), "--max-mb", f"{max_mb}", "--name", name]) == 0
        recipe = load_recipe(here / f"{name}.yaml")
        return [s.model.layers for s in recipe.sweep.students], recipe.compress.formats  # type: ignore[attr-defined]

    assert students(0.5) == ([4, 3], ("q8_0", "q4_0", "mixed-gptq"))
    assert main(["init", str(llama), "--data", str(data), "--max-mb", "0.001"]) == 2
    error = capsys.readouterr().err
    assert "--max-mb 0.001: no student's file would be as small; the nearest is pruned-25 in q4_0, about 0.0" in error
    needed = float(error.split("give --max-mb ")[1].split(",")[0])
    layers, formats = students(needed)
    assert (layers[-1], "q4_0" in formats) == (2, True)


ERRORS: dict[str, tuple[str, Make, tuple[str, ...], tuple[str, ...]]] = {
    "no data": ("-", lambda folder: folder / "none", (), ("--data", "no such file or folder")),
    "an empty folder": ("-", lambda folder: folder / "here", (), ("--data", "is empty")),
    "no column with a usual name": (
        "-", table(a=kinds, b=kinds), (), ("--label: which column is the one to predict", "none is called like it",
                                           "x0 (double)"),
    ),
    "two columns with usual names": (
        "-", table(target=kinds, label=kinds), (), ("--label: which column", "target, label are all called like it"),
    ),
    "a column that is not there": ("-", table(a=kinds), ("--label", "z"), ("--label: found no column 'z'",)),
    "classes or amounts": (
        "-", table(label=counts), (), ("--task: the data may be for tabular_classification or tabular_regression",),
    ),
    "a task that does not fit": (
        "-", table(label=kinds), ("--task", "tabular_regression"), ("column 'label' is string", "predicts numbers"),
    ),
    "an unknown task": ("-", table(label=kinds), ("--task", "tabular"), ("task 'tabular': there is none",)),
    "text without a model": ("-", documents, (), ("language_modeling: a language model starts from one: give MODEL",)),
    "text in no column": (
        "LLAMA", table(label=counts), (), ("language_modeling: no text files: 1 .csv; name them",),
    ),
    "which text": ("LLAMA", jsonl("question", "answer"), (), ("--text: which column is the text", "answer (string)")),
    "a pattern of nothing": ("LLAMA", documents, ("--pattern", "*.rst"), ("--pattern: no file's name matches *.",)),
    "images of two sizes": (
        "-", image_folders((16, 20)), (), ("--image-size: images differ in size (16 x 16, 20 x 20)",),
    ),
    "images without patches": ("-", image_folders((17,)), (), ("--image-size: images of 17 x 17 pixels",)),
    "a model of another task": (
        "LLAMA", table(label=kinds), ("--task", "tabular_classification"), ("is a llama model, for language_modeling",),
    ),
    "a header that is not UTF-8": (
        "-", content("t.csv", "größe,label\n1,a\n".encode("latin-1")), (), ("t.csv: not ", "; expected "),
    ),
    "two columns of one name": (
        "-", content("t.csv", b"x,x,label\n1,2,a\n"), (), ("t.csv: not csv: several columns are named 'x', expected",),
    ),
    "a damaged part": ("-", half_of_a_parquet, (), ("parts/b.parquet: not parquet: ",)),
    "only the first rows are looked at": (
        "-", content("t.csv", b"x,label\n" + b"1,a\n" * (5 << 18) + b"2,b\n" * 100), (),
        ("column 'label', in the first 1,048,574 of about 1,310,", "rows, has 1 value; expected two classes or more"),
    ),
    "a flag that tables do not use": (
        "-", table(label=kinds), ("--image-size", "12"),
        ("--image-size: found 12, which tabular_classification of these data does not use: leave it out; what other",
         "image_classification: no images: 1 .csv"),
    ),
    "a flag that files of text do not use": (
        "LLAMA", documents, ("--text", "a"), ("--text: found 'a', which language_modeling of these data does not use",),
    ),
    "images of one class": ("-", images_of_one_class, (), ("column 'species' has 1 value; expected two classes or",)),
    "classes of texts without a model": (
        "-", texts, (), ("text_classification: a classifier of texts starts from an encoder: give MODEL",),
    ),
    "one class each or several": (
        "BASE", one_or_several, (),
        ("--task: the data may be for text_classification or multi_label_text_classification; give the one you mean",),
    ),
    "a budget for texts": (
        "BASE", texts, ("--max-mb", "0.01"),
        ("the nearest is pruned-25 in int8, about ", " of it its largest table, "),
    ),
    "folders of splits": ("-", split_folders, (), ("the folders are called like splits (test, train); expected one",)),
    "a name that is none": ("-", table(label=kinds), ("--name", "a: b"), ("name: found 'a: b'; ",)),
    "nowhere to write": (
        "-", table(label=kinds), ("--out", "none/a.yaml"), ("none/a.yaml: No such file or directory; give a file you",),
    ),
    "no budget": ("-", table(label=kinds), ("--max-mb", "0"), ("--max-mb: found 0; expected a number above 0",)),
    "a share above one": ("-", table(label=kinds), ("--keep", "97"), ("--keep: found 97; expected a share of up to",)),
    "an unknown field": ("-", table(label=kinds), ("--set", "train.stepz=1"), ("train.stepz: unknown field",)),
    "a budget for tables": ("-", table(label=kinds), ("--max-mb", "0.001"), ("the nearest is small in int8, about ",)),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_found_out_is_asked_for(
    case: str, here: Path, llama: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, make, flags, words = ERRORS[case]
    data = make(here.parent)
    given = {"LLAMA": str(llama), "BASE": str(base)}.get(model, model)
    assert main(["init", given, "--data", str(data), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("overproof: ")
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert list(here.iterdir()) == []


def _gguf(folder: Path) -> Path:
    (folder / "model-q4_0.gguf").write_bytes(b"GGUF")
    return folder / "model-q4_0.gguf"


def _folder_of_gguf(folder: Path) -> Path:
    (folder / "files").mkdir()
    _gguf(folder / "files")
    return folder / "files"


def _unknown_family(folder: Path) -> Path:
    (folder / "unknown").mkdir()
    (folder / "unknown/config.json").write_text('{"architectures": ["NovelForMaskedLM"]}')
    (folder / "unknown/model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    return folder / "unknown"


def _changed_llama(**changes: Any) -> Make:
    def make(folder: Path) -> Path:
        path = write_llama(folder, LAYERS)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
        for name in ("tokenizer_config.json", "generation_config.json"):
            (path / name).unlink(missing_ok=True)
        return path

    return make


def _cut_off(folder: Path) -> Path:
    path = write_llama(folder, LAYERS)
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:-100])
    return path


def _pickle(folder: Path) -> Path:
    (_unknown_family(folder) / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return folder / "unknown"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none", ("no such folder", "or - where a teacher is to be trained")),
        (_gguf, ("is a GGUF file", "expected a Hugging Face directory")),
        (_folder_of_gguf, ("holds a GGUF file", "model-q4_0.gguf", "expected a Hugging Face directory")),
        (documents, ("MODEL ", "expected a Hugging Face directory")),
        (_unknown_family, ("architecture NovelForMaskedLM", "; expected LlamaForCausalLM")),
        (_pickle, ("pytorch_model.bin, a pickle",)),
        (_changed_llama(num_hidden_layers=9), ("Tiny-Llama: its files hold 4 layers, and config.json says 9: ",)),
        (
            _changed_llama(hidden_size=64),
            (
                "embed_tokens.weight holds ",
                "and config.json says 288 x 64: expected ",
            ),
        ),
        (
            _changed_llama(eos_token_id=None),
            (
                "nothing says by which token a text ends",
                "--set data.tokenizer.end_",
            ),
        ),
        (_cut_off, ("model.safetensors: not whole: ", "; fetch it again")),
    ],
)
def test_what_is_no_model_is_named(
    make: Make, words: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = make(here.parent), jsonl("text")(here.parent)
    assert main(["init", str(model), "--data", str(data)]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


def test_what_is_missing_may_be_said_by_set(here: Path) -> None:
    model, data = _changed_llama(eos_token_id=None)(here.parent), documents(here.parent)
    end = "data.tokenizer.end_token=<|endoftext|>"
    assert main(["init", str(model), "--data", str(data), "--set", end]) == 0
    assert load_recipe("tiny-llama-small.yaml").data.tokenizer.end_token == "<|endoftext|>"  # type: ignore[attr-defined]


def test_a_classifier_of_the_datas_classes_teaches_as_it_is(here: Path, base: Path) -> None:
    data = texts(here.parent)
    for number, (names, steps) in enumerate(
        ((["plant", "animal", "food"], 0), (["LABEL_0", "LABEL_1", "LABEL_2"], 150), (["plant", "animal"], 150))
    ):
        model = here.parent / f"head-{number}"
        shutil.copytree(base, model)
        config = json.loads((model / "config.json").read_text()) | {"architectures": ["BertForSequenceClassification"]}
        (model / "config.json").write_text(json.dumps(config | {"id2label": dict(enumerate(names))}))
        assert main(["init", str(model), "--data", str(data)]) == 0
        assert load_recipe(f"head-{number}-small.yaml").train.steps == steps


def test_the_same_weights_under_another_name_count_once(here: Path, llama: Path) -> None:
    """As Mistral's directories have them."""
    model = here.parent / "twice"
    shutil.copytree(llama, model)
    before = inspect_model(str(model))
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    assert inspect_model(str(model)).size_bytes == before.size_bytes == (model / "model.safetensors").stat().st_size


def test_a_recipe_that_was_edited_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(label=kinds)(here.parent)
    argv = ["init", "--data", str(data)]
    assert main(argv) == 0
    assert main(argv) == 0  # the same again
    path = here / "my-table-small.yaml"
    path.write_text(path.read_text().replace("keep: 2", "keep: 1"))
    assert main(argv) == 2
    assert "my-table-small.yaml: lies there already and says something else" in capsys.readouterr().err
    assert "keep: 1" in path.read_text()
    assert main([*argv, "--out", "other.yaml"]) == 0
    assert load_recipe("other.yaml").sweep.keep == 2
    assert main([*argv, "--name", "007"]) == 0
    assert load_recipe("007.yaml").name == "007"


def test_a_model_of_one_layer_needs_a_budget(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There are no fewer layers, and the whole teacher is a student only of a budget."""
    data, one = documents(here.parent), write_llama(here.parent, layers=1)
    argv = ["init", str(one), "--data", str(data)]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "no --max-mb was given, and no student of fewer layers would be 2 times smaller than the teacher" in error
    assert main([*argv, "--max-mb", error.split("give --max-mb ")[1].split(",")[0]]) == 0


def test_a_decoder_that_cannot_be_exported_is_named(
    here: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = here.parent / "other"
    shutil.copytree(llama, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["NovelForCausalLM"]}))
    assert main(["init", str(other), "--data", str(documents(here.parent))]) == 2
    assert "MODEL: NovelForCausalLM cannot be written as gguf, as language_modeling needs" in capsys.readouterr().err


def test_no_more_test_units_are_told_than_are_scored(
    here: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = here.parent / "records.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text of record {i}, and so on"}) for i in range(600)))
    assert main(["init", str(llama), "--data", str(path)]) == 0
    assert "of about 100 test documents" in told(capsys)  # evaluate.max_documents of the template


def test_as_many_steps_are_written_as_fit_into_the_minutes(here: Path, llama: Path) -> None:
    path = here.parent / "records.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the text of record {i}, and so on " * 20}) for i in range(3000)))
    asked = Asked(data=str(path), model=str(llama), max_mb=1.0, finetune=30)
    speed = 2e7  # of a slow machine: floating-point operations a second
    unlimited, whole = choose_within(asked, speed)
    steps, longest = [unlimited.recipe.sweep.steps], whole.total_s / 60
    for minutes in (int(0.9 * longest), int(0.7 * longest)):
        limited = replace(asked, max_minutes=minutes)
        choice, needed = choose_within(limited, speed)
        assert 0.95 * minutes < needed.total_s / 60 <= minutes
        assert choice.recipe.train.steps == 30  # as asked
        assert "of what there would be without --max-minutes" in choice.reasons["students"]
        assert f"--max-minutes {minutes}" in limited.command
        steps.append(choice.recipe.sweep.steps)
    assert steps == sorted(set(steps), reverse=True)
    assert choose_within(replace(asked, max_minutes=2 * longest), speed)[0].recipe == unlimited.recipe
    with pytest.raises(
        InputError, match=r"--max-minutes 1: the shortest trainings .* about .*; give --max-minutes"
    ) as e:
        choose_within(replace(asked, max_minutes=1), speed)
    enough = float(str(e.value).partition("give --max-minutes ")[2].partition(",")[0])
    assert choose_within(replace(asked, max_minutes=enough), speed)[0].recipe.sweep.steps == FEWEST_STEPS


def test_a_teacher_that_is_trained_is_shortened_less_than_its_students(here: Path, base: Path) -> None:
    asked, speed = Asked(data=str(texts(here.parent)), model=str(base), flags=ColumnFlags(text="review")), 2e7
    whole, needed = choose_within(asked, speed)
    choice, _ = choose_within(replace(asked, max_minutes=0.5 * needed.total_s / 60), speed)
    left = choice.recipe.sweep.steps / whole.recipe.sweep.steps
    assert left < 0.6
    assert choice.recipe.train.steps / whole.recipe.train.steps == pytest.approx(left**0.5, abs=0.01)
    assert f"(the teacher has {100 * left**0.5:.0f} %)" in choice.reasons["students"]


def test_the_cache_follows_the_steps_that_were_set(here: Path, llama: Path) -> None:
    assert main(["init", str(llama), "--data", str(documents(here.parent)), "--set", "sweep.steps=777"]) == 0
    recipe = load_recipe(here / "tiny-llama-small.yaml")
    assert recipe.rows_cached == recipe.rows_read == 777 * recipe.sweep.batch_size


def test_pixels_that_the_model_does_not_take_are_refused(tmp_path: Path) -> None:
    look = look_at(str(image_folders()(tmp_path)))
    model = {"image_size": 16, "num_channels": 1, "id2label": {"0": "cat", "1": "dog"}}
    found = recognise_images(look, model, ColumnFlags(image_size=12))
    assert found == Question("--image-size", "MODEL takes 16 x 16 pixels; leave the flag out")
    assert recognise_images(look, model, ColumnFlags(image_size=16)) == recognise_images(look, model, ColumnFlags())


TEXT = """# first
name: a
train:          # why
  steps: 10     # few
  model: {kind: mlp, layers: 2}
sweep:
  steps: 3
  students:
    - {name: one, weight: 0.5}  # small
    - {name: two, weight: 0.5}
compress: {kind: onnx, formats: [int8]}
"""


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.steps=20", "  steps: 20     # few"),
        ("train.model.layers=3", "  model: {kind: mlp, layers: 3}"),
        ("train.batch=4", "  batch: 4"),
        ("sweep.students.1.weight=0.9", "    - {name: two, weight: 0.9}"),
        ("sweep.students=[{name: three}]", "  students: [{name: three}]"),
        ("serve.port=0", "serve: {port: 0}"),
        ("train={steps: 1}", "train: {steps: 1}"),
        ("compress.formats=[q8_0, q4_0]", "compress: {kind: onnx, formats: [q8_0, q4_0]}"),
    ],
)
def test_an_override_changes_its_own_line(override: str, line: str) -> None:
    from overproof.config.overrides import set_override

    tree = yaml.safe_load(TEXT)
    set_override(tree, override)
    changed = change(TEXT, override)
    assert yaml.safe_load(changed) == tree
    assert line in changed.splitlines()
    assert changed.startswith("# first\n") or override.startswith("serve")
    kept = [before for before in TEXT.splitlines() if before in changed.splitlines()]
    assert len(kept) >= len(TEXT.splitlines()) - 3 - 3 * override.startswith("train={")


def test_every_variant_that_a_template_sizes_is_one_that_its_format_writes() -> None:
    from overproof.shrink.template import read_settings, render

    for kind, task in TASKS.items():
        if not isinstance(task, Shrinkable):
            continue
        settings = read_settings(task.template, {"patch_size": 4})
        names = {"name": "a", "data": "", "students": "    []", "rules": ""}
        blank = render(task.template, _Blank(names))
        written = FORMATS[yaml.safe_load(blank)["compress"]["kind"]]
        assert list(settings.bytes)[-1] == written.unquantised, kind
        variants = get_args(get_args(written.section.model_fields["formats"].annotation)[0])
        assert set(variants) >= set(list(settings.bytes)[:-1]), kind


class _Blank(dict[str, str]):
    """Values of a template of which only some matter."""

    def __missing__(self, name: str) -> str:
        return "0"


FEW = (
    "evaluate.timed_requests=5", "evaluate.probe_prompts=2", "evaluate.bootstrap_samples=200", "sweep.keep=1",
)  # fmt: skip


def _sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


@pytest.mark.trial
def test_a_language_model_is_shrunk_from_its_directory_as_it_is(
    ray_cluster: str, here: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher takes no step: every stage must do without its curve."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    data = documents(here.parent)
    few = _sets(
        *FEW, "data.sequence_length=32", "sweep.steps=4", "sweep.warmup_steps=1", "sweep.validate_every=2",
        "sweep.validation_rows=16", "train.validation_rows=16", "evaluate.max_documents=6", "evaluate.decode_tokens=8",
        "compress.formats=[q8_0]",
    )  # fmt: skip
    assert main(["shrink", str(llama), "--data", str(data), "--keep", "0.3", *few]) == 0
    out = capsys.readouterr().out
    recipe: Recipe = load_recipe("tiny-llama-small.yaml")
    assert recipe.train.steps == 0
    store = here / "store/tiny-llama-small"
    (page,) = store.glob("report-*/report.html")
    assert '"role":"teacher"' in page.read_text()
    assert next(store.glob("report-*/report.png")).read_bytes().startswith(b"\x89PNG")
    (package,) = store.glob("package-*")
    assert out.splitlines()[-1] == f"serve it: overproof serve tiny-llama-small/{package.name}"
    assert "taken as it is" in (package / "README.md").read_text()


def test_students_of_a_given_resnet_have_fewer_channels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    from overproof.models.hf_directory import save_model

    config = ResNetConfig(
        num_channels=1, embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic",
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    save_model(ResNetForImageClassification(config), config, here.parent / "pets-resnet")
    data = image_folders()(here.parent)
    assert main(["init", str(here.parent / "pets-resnet"), "--data", str(data), "--max-mb", "0.4"]) == 0
    assert "ResNetForImageClassification" in told(capsys)
    recipe = load_recipe(here / "pets-resnet-small.yaml")
    models = [student.model for student in recipe.sweep.students]
    assert all(isinstance(model, Pruned) for model in models)
    assert models[0].model_dump()["hidden_sizes"] == (32, 64)
    sizes = [
        student_size(model, recipe.train.model, TASKS["image_classification"].shape(recipe.data)).parameters
        for model in models
    ]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.3)
    assert sizes == sorted(sizes, reverse=True)


def test_a_stage_that_would_be_as_wide_as_the_stem_is_a_step_narrower() -> None:
    config = {
        "architectures": ["ResNetForImageClassification"], "embedding_size": 32, "hidden_sizes": [64, 128, 256],
        "depths": [1, 1, 1], "layer_type": "basic", "downsample_in_first_stage": False, "num_channels": 1,
    }  # fmt: skip
    settings = SimpleNamespace(shares=(1, 0.25, 0.24))
    found = narrowed_students(settings, config, FAMILIES["resnet"])  # type: ignore[arg-type]
    kept = [model["hidden_sizes"] for model in found.values()]
    assert kept == [[64, 128, 256], [24, 64, 128]]  # a quarter would be [32, 64, 128], twice
    narrow = config | {"embedding_size": 8, "hidden_sizes": [8, 8, 8]}
    alone = narrowed_students(settings, narrow, FAMILIES["resnet"])  # type: ignore[arg-type]
    assert [*alone] == ["whole"]  # the others would be the teacher once more
