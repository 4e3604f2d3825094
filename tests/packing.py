"""Small packages made by the real package stage, from tiny models really exported and reports made by hand."""

from __future__ import annotations

import hashlib
import json
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from overproof.artifacts import Artifact, Store
from overproof.config import Recipe, load_recipe
from overproof.data import tokenization as bpe
from overproof.data.manifest import Column, Manifest, Shard, Split
from overproof.data.token_parts import text_columns
from overproof.errors import InputError
from overproof.evaluate.gate import judge
from overproof.evaluate.metrics import Comparison, MeasuredFile, Report
from overproof.evaluate.outcome import find_outcome, read_training
from overproof.export.gguf_file import export_gguf
from overproof.export.onnx_file import export_onnx
from overproof.export.onnx_int8 import quantize_onnx
from overproof.files import file_sha256
from overproof.models import hf_directory
from overproof.package.package import build_package, open_package
from overproof.registry import FORMATS
from overproof.stage_context import StageContext, no_progress
from overproof.tasks.base import Metric

RECIPES = Path(__file__).parents[1] / "jobs/recipes"
LENGTH, VOCABULARY, STEPS = 32, 512, 60
TEXT_MODEL = {"kind": "llama", "hidden_size": 64, "intermediate_size": 96, "layers": 1, "heads": 2, "kv_heads": 1}
IMAGE_MODEL = {"kind": "vit", "hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2}
PIXELS = (Column(name="pixels", dtype="<f4", shape=(1, 8, 8)), Column(name="label", dtype="<i4"))
DIGITS = {"channels": 1, "height": 8, "width": 8, "classes": [str(number) for number in range(10)]}


def make_recipe(kind: str, store: Path, *overrides: str) -> Recipe:
    """A recipe of the repository with a model small enough for a test."""
    name, model = ("stdlib-lm", TEXT_MODEL) if kind == "text" else ("digits", IMAGE_MODEL)
    student = {"name": "student", "model": model, "temperature": 1.0}
    settings = (f"store={store}", f"sweep.students={json.dumps([student])}", f"train.model={json.dumps(model)}")
    return load_recipe(RECIPES / f"{name}.yaml", (*settings, *overrides))


def make_parents(recipe: Recipe) -> dict[str, Artifact]:
    """Every parent of a package, as each stage leaves it."""
    store, done = Store(recipe.store), dict[str, Artifact]()

    def add(stage: str, write: Callable[[Path], Any]) -> None:
        draft = store.new_writer(recipe.name, stage, hashlib.sha256(stage.encode()).hexdigest(), {}, {})
        write(Path(draft.uri))
        done[stage] = draft.commit({}, 1.0)

    add("prepare", lambda folder: _prepare(recipe, folder))
    manifest = Manifest.read(done["prepare"].local())
    tokenizer = manifest.tokenizer(done["prepare"].local())

    def save(folder: Path, seed: int) -> None:
        model = hf_directory.build_model(recipe.sweep.students[0].model, manifest, seed + 10 * recipe.seed)
        if tokenizer is not None:
            _train(model, Tokenizer.from_file(str(tokenizer)))
        hf_directory.save_model(model, model.config, folder, tokenizer)

    add("train", lambda folder: (save(folder / "model", 0), (folder / "curve.jsonl").touch()))
    add("cache", lambda folder: (folder / "cache.json").write_text("{}"))
    add("sweep", lambda folder: (save(folder / "students/student", 1), save(folder / "control", 2), _trials(folder)))
    add("compress", lambda folder: _compress(recipe, done, folder))
    add("evaluate", lambda folder: _evaluate(recipe, manifest, done["compress"].local(), folder))
    add("gate", lambda folder: _gate(recipe, done, folder))
    return done


def make_package(kind: str, store: Path, *overrides: str) -> Path:
    """A package's folder."""
    recipe = make_recipe(kind, store, *overrides)
    return pack(recipe, make_parents(recipe)).local()


def pack(recipe: Recipe, parents: dict[str, Artifact]) -> Artifact:
    """Run the package stage."""
    draft = Store(recipe.store).new_writer(
        recipe.name, "package", hashlib.sha256(f"package {recipe.seed}".encode()).hexdigest(), {}, {}
    )
    return draft.commit(build_package(StageContext(recipe, parents, draft, no_progress)), 1.0)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file of a package and forge its hash in package.json."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    listing = path.with_name("package.json")
    content = json.loads(listing.read_text())
    if path.name in content["files"]:
        content["files"][path.name] |= {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
        listing.write_text(json.dumps(content))


def copy(package_folder: Path, folder: Path) -> Path:
    """A package to spoil."""
    return Path(shutil.copytree(package_folder, folder / "package"))


def assert_refused(package_folder: Path, folder: Path, spoil: Callable[[Path], Any], message: str) -> None:
    """A package that opens is refused once it is spoiled."""
    copied = copy(package_folder, folder)
    open_package(copied)
    spoil(copied)
    with pytest.raises(InputError, match=message):
        open_package(copied)


def break_model(package_folder: Path, folder: Path) -> Path:
    """A copy that every check of the package lets pass and llama.cpp does not: its model is cut off."""
    broken = copy(package_folder, folder)
    model = broken / json.loads((broken / "package.json").read_text())["model"]
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    now = {"sha256": file_sha256(model), "size_bytes": model.stat().st_size}
    before = file_sha256(package_folder / model.name)

    def measured(report: Any) -> None:
        for each in report["measured"]:
            if each["sha256"] == before:
                each.update(now)

    def listed(content: Any) -> None:
        content["files"][model.name].update(now)
        content["id"] += "-broken"

    edit(broken / "package.json", listed)
    edit(broken / "report.json", measured)
    return broken


def _prepare(recipe: Recipe, folder: Path) -> None:
    text = recipe.data.kind == "language_modeling"
    if text:
        bpe.train_bpe(_texts(), VOCABULARY).save(str(folder / "tokenizer.json"))
    shards = {name: (Shard(path=f"{name}/00000.parquet", sha256=name * 8, size_bytes=9, rows=4, predictions=128),)
              for name in ("train", "validation", "test")}  # fmt: skip
    manifest = Manifest(
        task=recipe.data.kind,
        columns=text_columns(LENGTH, VOCABULARY) if text else PIXELS,
        splits={name: Split(shards=shard, rows=4, predictions=128, documents=4) for name, shard in shards.items()},
        rows_per_group=4,
        positions=LENGTH if text else 1,
        outputs=VOCABULARY if text else 10,
        tokenizer_sha256=file_sha256(folder / "tokenizer.json") if text else None,
        **(dict.fromkeys(("start_id", "end_id", "bos_id"), 0) if text else {}),
        dropped={"empty": 2, "duplicate": 0},
        details={} if text else DIGITS,
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())


def _texts() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[20:40]
    return [file.read_text(encoding="utf-8")[:4000] for file in files]


def _train(model: Any, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([i for text in _texts() for i in tokenizer.encode(text).ids])
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - LENGTH, (16,), generator=generator)
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _trials(folder: Path) -> None:
    trial = {"name": "student", "student": "student", "values": {}, "parameters": 12345, "steps": 30}
    trial |= {"validation_loss": 1.5, "teacher_weight": 0.5}
    (folder / "trials.json").write_text(
        json.dumps(
            {"winner": "student", "kept": ["student"], "trials": [trial], "control": trial | {"name": "control"}}
        )
    )


def _compress(recipe: Recipe, done: dict[str, Artifact], folder: Path) -> None:
    """As the compress stage does, with one slow export where that makes three."""
    text, student = recipe.data.kind == "language_modeling", done["sweep"].local() / "students/student"
    tokenizer, exports = done["prepare"].local() / "tokenizer.json", []
    whole = folder / ("student.gguf" if text else "student.onnx")
    if text:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        export = partial(export_gguf, student, tokenizer, name=recipe.name, chat_template=recipe.compress.chat_template)
        export(whole, format="f16")
    else:
        export_onnx(student, whole)
    for name in ("teacher", "control"):
        shutil.copyfile(whole, whole.with_stem(name))
    for format in recipe.compress.formats:
        file = whole.with_stem(f"student-{format}")
        if text:
            export(file, format=format)
        else:
            quantize_onnx(whole, file)
    for file in sorted((*folder.glob("*.gguf"), *folder.glob("*.onnx")), key=lambda f: f.stem, reverse=True):
        _, _, format = file.stem.partition("-")
        student = None if file.stem in ("teacher", "control") else "student"
        listed = {
            "name": file.stem,
            "student": student,
            "file": file.name,
            "format": format or ("f16" if text else "fp32"),
        }
        listed |= {"companions": ["tokenizer.json"] if text else []}
        exports.append(listed | {"size_bytes": file.stat().st_size, "candidate": bool(format)})
    (folder / "exports.json").write_text(json.dumps(exports))


def _evaluate(recipe: Recipe, manifest: Manifest, compressed: Path, folder: Path) -> None:
    """A report in which every candidate is a little worse and far smaller than the teacher."""
    quality = "bits_per_byte" if recipe.data.kind == "language_modeling" else "accuracy"
    exports = json.loads((compressed / "exports.json").read_text())
    measured = [
        MeasuredFile(
            **{key: export[key] for key in ("name", "student", "format", "size_bytes", "candidate")}
            | ({"size_bytes": 100 * export["size_bytes"]} if export["name"] == "teacher" else {}),
            sha256=file_sha256(compressed / export["file"]),
            metrics={
                quality: Metric(value=0.9, low=0.89, high=0.91, unit="", n=300),
                "agreement": Metric(value=0.95, low=0.94, high=0.96, unit="share", n=300),
                "parity_nats": Metric(value=0.001, unit="nats", n=16),
            },
        )
        for export in exports
    ]
    comparisons = [
        Comparison(
            name=m.name,
            against=against,
            value=value,
            low=value - 0.005,
            high=value + 0.005,
            kept=1 - value,
            kept_low=0.995 - value,
            kept_high=1.005 - value,
        )
        for m in measured
        for against, value in (("student", 0.01), ("teacher", 0.04), ("control", -0.05))
    ]
    report = Report(
        task=recipe.data.kind,
        quality=quality,
        engine=recipe.engine,
        computes_with=FORMATS[recipe.compress.kind].engines[recipe.engine],
        kv_cache=recipe.evaluate.kv_cache,
        confidence=0.95,
        tokenizer_sha256=manifest.tokenizer_sha256,
        measured=tuple(measured),
        comparisons=tuple(comparisons),
    )
    (folder / "report.json").write_text(report.model_dump_json())


def _gate(recipe: Recipe, done: dict[str, Artifact], folder: Path) -> None:
    report = Report.model_validate_json((done["evaluate"].local() / "report.json").read_bytes())
    verdict = judge(recipe.gate, report)
    training = read_training(recipe, done["train"].local(), done["sweep"].local())
    (folder / "verdict.json").write_text(verdict.model_dump_json())
    (folder / "outcome.json").write_text(find_outcome(recipe, report, verdict, training).model_dump_json())
