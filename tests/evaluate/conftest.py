"""Small prepared data, small models really trained on it, and their exports."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from overproof.artifacts import Artifact, Store
from overproof.config import Recipe
from overproof.data import tokenization as bpe
from overproof.data.manifest import Column, Manifest, Split, shard_schema
from overproof.data.parquet_reader import Shards
from overproof.data.parquet_writer import write_shard
from overproof.data.token_parts import text_columns
from overproof.export.stage import export_models
from overproof.models import hf_directory
from overproof.models.llama import Llama
from overproof.models.vit import Vit
from overproof.registry import TASKS
from overproof.stage_context import StageContext, no_progress

LENGTH, GROUP, VOCABULARY = 64, 4, 512
END_ID = 0  # of tokenizers trained here
TASK = {"text": "language_modeling", "digits": "image_classification"}
BATCH = {"language_modeling": 16, "image_classification": 64}
PIXELS = (Column(name="pixels", dtype="<f4", shape=(1, 8, 8)), Column(name="label", dtype="<i4"))
TOKENS = text_columns(LENGTH, VOCABULARY)
TEXT_TEACHER = Llama(hidden_size=96, intermediate_size=192, layers=2, heads=3, kv_heads=1)  # heads of 32, as vLLM has
TEXT_STUDENT = Llama(hidden_size=64, intermediate_size=96, layers=1, heads=2, kv_heads=1)
IMAGE_TEACHER = Vit(hidden_size=32, intermediate_size=64, layers=2, heads=4)
IMAGE_STUDENT = Vit(hidden_size=16, intermediate_size=32, layers=1, heads=2)
RULES: tuple[dict[str, Any], ...] = (
    {"kind": "regression", "against": "student", "at_most": 0.05},
    {"kind": "smaller", "against": "teacher", "at_least": 1.5},
    {"kind": "parity", "at_most": 0.2},
)


def prepare_text(root: Path) -> Manifest:
    """Thirty modules of the standard library: twelve held out for the test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[20:50]
    texts = [file.read_text(encoding="utf-8")[:6000] for file in files]
    test, train = texts[:12], texts[12:]
    tokenizer = bpe.train_bpe(train, VOCABULARY)
    tokenizer.save(str(root / "tokenizer.json"))
    stream = np.concatenate([np.insert(ids, 0, END_ID) for ids in bpe.encode(tokenizer, train)])
    packed = bpe.pack_stream(stream, LENGTH, bpe.train_rows(len(stream), LENGTH, GROUP))
    held_out = [bpe.pack_document(document, LENGTH, END_ID, END_ID) for document in bpe.encode(tokenizer, test)]
    documents = np.repeat(np.arange(len(test)), [len(lengths) for _, lengths in held_out])
    columns = {
        "train": bpe.token_columns(0, packed, LENGTH, -1),
        "test": bpe.token_columns(
            0, np.concatenate([r for r, _ in held_out]), np.concatenate([n for _, n in held_out]), documents
        ),
    }
    splits = {}
    for name, values in columns.items():
        path, tokens = f"{name}/00000.parquet", int(values["length"].sum())
        shard = write_shard(str(root), path, values, shard_schema(TOKENS), GROUP, tokens)
        splits[name] = Split(shards=(shard,), rows=shard.rows, predictions=tokens, documents=len(test))
    sizes = [len(text.encode()) for text in test]
    table = {"document": pa.array(range(len(test)), pa.int32()), "split": ["test"] * len(test), "size_bytes": sizes}
    pq.write_table(pa.table(table), root / "documents.parquet")
    texts = pa.table({"document": pa.array(range(len(test)), pa.int32()), "text": [text[:4096] for text in test]})
    pq.write_table(texts, root / "test_texts.parquet")
    manifest = Manifest(
        task="language_modeling",
        columns=TOKENS,
        splits=splits,
        rows_per_group=GROUP,
        positions=LENGTH,
        outputs=tokenizer.get_vocab_size(),
        tokenizer_sha256=hashlib.sha256((root / "tokenizer.json").read_bytes()).hexdigest(),
        start_id=END_ID,
        end_id=END_ID,
        bos_id=END_ID,
    )
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


def prepare_digits(root: Path) -> Manifest:
    """The bundled digits: 1,200 to train on, 597 held out."""
    digits = load_digits()
    pixels = (digits.images[:, None] / 16).astype(np.float32)
    splits = {}
    for name, part in {"train": slice(0, 1200), "test": slice(1200, None)}.items():
        labels = digits.target[part].astype(np.int32)
        columns = {"sample_id": np.arange(len(labels)), "pixels": pixels[part], "label": labels}
        shard = write_shard(str(root), f"{name}/00000.parquet", columns, shard_schema(PIXELS), GROUP)
        splits[name] = Split(shards=(shard,), rows=shard.rows, predictions=shard.rows, documents=shard.rows)
    manifest = Manifest(
        task="image_classification",
        columns=PIXELS,
        splits=splits,
        rows_per_group=GROUP,
        positions=1,
        outputs=10,
        details={"channels": 1, "height": 8, "width": 8, "classes": [str(number) for number in range(10)]},
    )
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


def train(config: Llama | Vit, root: Path, path: Path, steps: int) -> Path:
    """Train a model for a few steps and write it as a Hugging Face directory."""
    manifest, shards = Manifest.read(root), Shards(root, "train")
    model = hf_directory.build_model(config, manifest, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=15)
    generator = np.random.default_rng(0)
    for _ in range(steps):
        batch = hf_directory.to_tensors(shards.take(generator.integers(0, shards.rows, BATCH[manifest.task])))
        prediction = TASKS[manifest.task].predict(model, batch)
        chosen = prediction.mask_BP
        loss = torch.nn.functional.cross_entropy(prediction.logits_BPV[chosen], prediction.targets_BP[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
    hf_directory.save_model(model, model.config, path, manifest.tokenizer(root))
    return path


def recipe(kind: str, rules: Sequence[dict[str, Any]] = RULES) -> Recipe:
    """A recipe whose compress, evaluate and gate parts are what a test needs."""
    model = (TEXT_STUDENT if kind == "text" else IMAGE_STUDENT).model_dump()
    optimization = {"steps": 1, "batch_size": 2, "learning_rate": 0.1}
    return Recipe.model_validate(
        {
            "name": f"test-{kind}",
            "data": {"kind": TASK[kind]},
            "train": {**optimization, "model": model},
            "sweep": {**optimization, "students": [{"name": "student", "model": model}]},
            "compress": {"kind": "gguf" if kind == "text" else "onnx"},
            "evaluate": {"bootstrap_samples": 500, "threads": 1, "decode_tokens": 16, "timed_requests": 20},
            "gate": {"rules": list(rules)},
        }
    )


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    return recipe


def artifact(store: Store, stage: str, config: Any = None) -> tuple[Any, Path]:
    """A draft and the folder to fill."""
    draft = store.new_writer("test", stage, hashlib.sha256(f"{stage} {config}".encode()).hexdigest(), config, {})
    return draft, Path(draft.uri)


def _compressed(kind: str, store: Store) -> dict[str, Artifact]:
    draft, root = artifact(store, "prepare", kind)
    (prepare_text if kind == "text" else prepare_digits)(root)
    done = {"prepare": draft.commit({}, 0.0)}
    big, small = (TEXT_TEACHER, TEXT_STUDENT) if kind == "text" else (IMAGE_TEACHER, IMAGE_STUDENT)
    draft, folder = artifact(store, "train", kind)
    train(big, root, folder / "model", 120)
    (folder / "curve.jsonl").touch()
    done["train"] = draft.commit({}, 0.0)
    draft, folder = artifact(store, "sweep", kind)
    kept = ["student", "brief"] if kind == "digits" else ["student"]
    for name, steps in zip(kept, (100, 70), strict=False):
        train(small, root, folder / "students" / name, steps)
    trial = {"name": "student", "student": "student", "values": {}, "teacher_weight": 0.5}
    trial |= {"parameters": 1, "steps": 1, "validation_loss": 1.5}
    control = trial | {"name": "control"}
    trials = {"winner": "student", "kept": kept, "trials": [trial], "control": control}
    (folder / "trials.json").write_text(json.dumps(trials))
    train(small, root, folder / "control", 40)
    done["sweep"] = draft.commit({}, 0.0)
    draft, _ = artifact(store, "compress", kind)
    metrics = export_models(StageContext(recipe(kind), done, draft, no_progress))
    done["compress"] = draft.commit(metrics, 0.0)
    return done


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A text run up to and including compress."""
    return _compressed("text", Store(str(tmp_path_factory.mktemp("text"))))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A digits run up to and including compress."""
    return _compressed("digits", Store(str(tmp_path_factory.mktemp("digits"))))
