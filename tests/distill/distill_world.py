"""Small prepared data, a teacher really trained on it, and what a stage is given, as artifacts of a store.

Helpers of every test of distillation, and the fixtures that those of tests/trials share.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray._private.state import actors
from transformers import PreTrainedModel

from overproof.artifacts import Artifact, ArtifactWriter, Store
from overproof.config import Generate, Optimization, Recipe
from overproof.data.manifest import MANIFEST, START, TOKENIZER, Manifest, Split, shard_schema
from overproof.data.order import Order
from overproof.data.parquet_reader import Shards
from overproof.data.parquet_writer import write_shard
from overproof.data.token_parts import text_columns
from overproof.distill.optuna_study import STUDENT
from overproof.distill.row_cache import cache_key_fields
from overproof.distill.sweep import make_trial_job
from overproof.distill.sweep_state import SweepState
from overproof.distill.target_cache import TargetIndex, target_key
from overproof.distill.teacher_pool import finished_files, write_index
from overproof.distill.teacher_text import TextIndex, TextKey
from overproof.distill.teacher_worker import CaptureJob, TargetWorker, TeacherWorker
from overproof.distill.text_worker import TextWorker
from overproof.distill.trial_job import TrialJob
from overproof.models.base import Prediction
from overproof.models.hf_directory import Batch, build_model, save_model, to_tensors
from overproof.models.llama import Llama
from overproof.models.vit import Vit
from overproof.registry import TASKS
from overproof.stage_context import Progress, StageContext, no_progress
from overproof.train.engine import TorchEngine
from overproof.train.loop import fit
from overproof.train.objective import CrossEntropy

SEED = 3
LENGTH, VOCABULARY = 16, 320
TASK = {"digits": "image_classification", "text": "language_modeling"}
DIGITS = {"validation_fraction": 0.1, "test_fraction": 0.1, "shards": 3, "rows_per_group": 8}
WRITING = {"prompt_tokens": 5, "batch_size": 24}
ROWS = {"train": 96, "validation": 24, "test": 8}
TEACHERS: dict[str, Llama | Vit] = {
    "digits": Vit(hidden_size=32, intermediate_size=64, layers=2, heads=2),
    "text": Llama(hidden_size=32, intermediate_size=64, layers=1, heads=2, kv_heads=1),
}


def text_like(root: Path, apart: bool = False) -> Manifest:
    """A walk over the vocabulary that a model can learn; held-out rows differ in length. Where documents are kept
    ``apart``, token 0 begins each, and rows hold two or three.
    """
    rng = np.random.default_rng(0)
    (root / TOKENIZER).write_text('{"made": "for a test"}')
    splits: dict[str, Split] = {}
    described = text_columns(LENGTH, VOCABULARY, apart)
    fields = shard_schema(described)
    for split, rows in ROWS.items():
        strides = rng.integers(1, 4, (rows, LENGTH)).cumsum(1)
        tokens = np.concatenate([np.zeros((rows, 1)), strides], 1) + rng.integers(1, VOCABULARY, (rows, 1))
        if apart:
            tokens[:, 4] = tokens[::2, 9] = 0
        lengths = np.full(rows, LENGTH) if split == "train" else 1 + np.arange(rows) % LENGTH
        shards = []
        for number, part in enumerate(np.array_split(np.arange(rows), 3 if split == "train" else 1)):
            columns = {
                "sample_id": part,
                "document": np.full(len(part), -1 if split == "train" else 0, np.int32),
                "tokens": (tokens[part] % VOCABULARY).astype(np.int32),
                "length": lengths[part].astype(np.int32),
                START: np.zeros(len(part), np.int32),
            }
            shards.append(
                write_shard(str(root), f"{split}/{number:05d}.parquet", columns, fields, 8, int(lengths[part].sum()))
            )
        splits[split] = Split(shards=tuple(shards), rows=rows, predictions=int(lengths.sum()), documents=1)
    return Manifest(
        task="language_modeling",
        columns=described,
        splits=splits,
        rows_per_group=8,
        positions=LENGTH,
        outputs=VOCABULARY,
        tokenizer_sha256=hashlib.sha256((root / TOKENIZER).read_bytes()).hexdigest(),
        start_id=0,
    )


def recipe_of(kind: str, **changes: Any) -> Recipe:
    """A recipe whose cache and sweep parts are what a test needs; ``changes`` are sections of it."""
    teacher = TEACHERS[kind].model_dump()
    steps = {"steps": 4, "batch_size": 16, "learning_rate": 5e-3}
    tree: dict[str, Any] = {
        "name": f"test-{kind}",
        "seed": SEED,
        "data": {"kind": TASK[kind]},
        "train": {**steps, "model": teacher},
        "generate": changes.get("generate"),
        "cache": {"scheme": {"kind": "topk", "k": 4}, "temperatures": [0.5, 2.0], "batch_size": 24},
        "sweep": {
            **steps,
            "students": [{"name": "only", "temperature": 2.0, "model": teacher}],
        },
        "tune": {},
        "compress": {"kind": "gguf" if kind == "text" else "onnx"},
        "gate": {"rules": [{"kind": "smaller", "at_least": 1.0}]},
    }
    return Recipe.parse(
        {name: value | changes.get(name, {}) if isinstance(value, dict) else value for name, value in tree.items()}
    )


@dataclass
class World:
    """A store with prepared data and a teacher, where a test runs the next stages."""

    kind: str
    store: Store
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    numbers: Any = field(default_factory=count)

    @property
    def root(self) -> Path:
        return self.artifacts["prepare"].local()

    def predict(self, model: PreTrainedModel, batch: Batch) -> Prediction:
        """A model on columns of this world's rows."""
        return TASKS[TASK[self.kind]].predict(model, batch)

    def draft(self, stage: str, store: Store | None = None) -> ArtifactWriter:
        """A fresh draft in its own folder, with a workspace of its own."""
        number = next(self.numbers)
        name = hashlib.sha256(f"{stage} {number}".encode()).hexdigest()
        return (store or self.store).new_writer(f"test-{self.kind}-{number}", stage, name, {"number": number}, {})

    def context(
        self,
        stage: str,
        progress: Progress = no_progress,
        cached: Artifact | None = None,
        written: Artifact | None = None,
        **changes: Any,
    ) -> StageContext:
        """What the stage is given; ``changes`` are sections of the recipe."""
        beside = {"generate": written, "cache": cached}
        parents = self.artifacts | {name: artifact for name, artifact in beside.items() if artifact}
        return StageContext(recipe_of(self.kind, **changes), parents, self.draft(stage), progress)


def train_teacher(kind: str, root: Path, folder: Path, steps: int = 60) -> None:
    manifest, shards = Manifest.read(root), Shards(root, "train")
    settings = Optimization(steps=steps, batch_size=32, learning_rate=5e-3, warmup_steps=5, validate_every=1000)
    model = build_model(TEACHERS[kind], manifest, 0)
    order = Order(manifest.groups, manifest.rows_per_group, 0)
    batches = (to_tensors(shards.take(order.step_rows(step, 32))) for step in range(steps))
    fit(
        TorchEngine(model, settings),
        CrossEntropy(TASKS[manifest.task].predict),
        settings,
        batches,
        lambda: 0.0,
        lambda _: None,
    )
    save_model(model, model.config, folder / "model", root / TOKENIZER if kind == "text" else None)


def make(kind: str, store: Store, apart: bool = False) -> World:
    world = World(kind, store)
    draft = world.draft("prepare")
    with draft.directory() as root:
        if kind == "text":
            manifest = text_like(root, apart)
        else:
            context = StageContext(recipe_of(kind, data=DIGITS), {}, draft, no_progress)
            manifest = TASKS[TASK[kind]].prepare(context)
        (root / MANIFEST).write_text(manifest.model_dump_json())
    world.artifacts["prepare"] = draft.commit({}, 0)
    draft = world.draft("train")
    with draft.directory() as folder:
        train_teacher(kind, world.root, folder)
    world.artifacts["train"] = draft.commit({}, 0)
    return world


def replica(
    world: World, rows: int | None, written: Artifact | None = None, **changes: Any
) -> tuple[TargetWorker, TargetIndex]:
    """A teacher as an actor has it, and the plan of the first ``rows`` rows; ``changes`` are to the cache's section."""
    recipe, draft = recipe_of(world.kind, cache=changes), world.draft("cache")
    prepared, trained = world.artifacts["prepare"], world.artifacts["train"]
    index = TargetIndex.of(target_key(recipe, prepared, trained, written), Manifest.read(world.root), rows)
    return TargetWorker(CaptureJob(recipe.cache, index, prepared, trained, draft, written)), index


def writer(world: World, rows: int | None, seed: int = SEED, **changes: Any) -> TextWorker:
    """A teacher that writes, as an actor has it; ``changes`` are to the section that asks for it."""
    settings = Generate.model_validate({**WRITING, **changes})
    origins = cache_key_fields(seed, world.artifacts["prepare"], world.artifacts["train"])
    given = {name: getattr(settings, name) for name in ("prompt_tokens", "temperature", "precision")}
    whole = TextKey(**origins, **given)
    index = TextIndex.of(whole, Manifest.read(world.root), rows)
    parents = world.artifacts["prepare"], world.artifacts["train"]
    return TextWorker(CaptureJob(settings, index, *parents, world.draft("generate")))


def capture(world: World, rows: int | None, written: Artifact | None = None, **changes: Any) -> Artifact:
    """What the stage writes, by one replica and without Ray."""
    return finish(replica(world, rows, written, **changes)[0])


def finish(one: TeacherWorker) -> Artifact:
    """Every file of its index, as an artifact."""
    reports = list(one({"file": np.arange(len(one.index.files))}))
    assert sum(int(report["rows"][0]) for report in reports) == one.index.rows
    assert not any(report["fault"][0] for report in reports)
    write_index(one.job, {path: file.entry for path, file in finished_files(one.job).items()})
    return one.job.draft.commit({}, 0)


def jobs(context: StageContext) -> list[TrialJob]:
    """Of the recipe's students, as the sweep makes them."""
    state = SweepState(context.draft)
    return [make_trial_job(context, state, each.name, {STUDENT: each.name}) for each in context.recipe.sweep.students]


def alive(*names: str) -> list[int]:
    """Processes of the cluster's living actors whose class has one of these names in its own."""
    living = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
    return [actor["Pid"] for actor in living if any(name in actor["ActorClassName"] for name in names)]


@pytest.fixture(scope="session")
def digits_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make("digits", Store(str(tmp_path_factory.mktemp("digits"))))


@pytest.fixture(scope="session")
def text_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make("text", Store(str(tmp_path_factory.mktemp("text"))))


@pytest.fixture(scope="session")
def digits_cache(digits_world: World) -> Artifact:
    return capture(digits_world, 400)
