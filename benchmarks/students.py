"""What the benchmarks of distillation share: recipes, a store that keeps what is made, one student, held-out scores.

    students.py RECIPE.json STAGE

runs the pipeline up to a stage, and prints JSON: wall seconds, and CPU seconds of the process tree.

Shapes: B rows, P predictions in a row, V outputs, U held-out documents or images.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from measuring import HERE, TreeCpu, child
from numpy.typing import NDArray
from torch.nn.functional import log_softmax

from overproof.artifacts import Artifact, Store
from overproof.config import Cache, Recipe, Student, Sweep, Tune
from overproof.config import load_recipe as load_recipe
from overproof.config.search import TrialValues
from overproof.data.manifest import DOCUMENTS, Manifest
from overproof.data.parquet_reader import Shards
from overproof.distill.sweep import make_trial_job as job_of
from overproof.distill.sweep_state import SweepState
from overproof.distill.trial_job import TrialJob
from overproof.models.hf_directory import build_model, count_parameters, load_model, save_model, to_tensors
from overproof.models.llama import Llama
from overproof.models.vit import Vit
from overproof.pipeline import resolve_stages
from overproof.registry import TASKS
from overproof.stage_context import StageContext, no_progress
from overproof.tasks.text_evaluation import TestDocuments

SOURCES = f"{HERE.parent / 'platform'}{os.pathsep}{HERE}"  # what every process of a benchmark imports from
RECIPES = HERE.parent / "jobs" / "recipes"
TEACHER = {"hidden_size": 224, "intermediate_size": 640, "layers": 3, "heads": 7, "kv_heads": 7}  # 2.4M
STUDENT = {"hidden_size": 64, "intermediate_size": 192, "layers": 2, "heads": 2, "kv_heads": 2}  # a tenth
LARGE_TEACHER = {"hidden_size": 448, "intermediate_size": 1280, "layers": 5, "heads": 7, "kv_heads": 7}  # 13.5M
LARGE_STUDENT = {"hidden_size": 192, "intermediate_size": 512, "layers": 2, "heads": 6, "kv_heads": 6}  # a tenth
TINY_TEACHER = {"hidden_size": 64, "intermediate_size": 128, "layers": 1, "heads": 2, "kv_heads": 2}
TINY_STUDENT = {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2, "kv_heads": 2}
SCORED_ROWS = 32  # in a batch of the scores
Teaching = Literal["none", "cached", "live"]


def options(about: str | None, seeds: int = 3) -> argparse.ArgumentParser:
    """The switches that the benchmarks of distillation share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()) / "overproof-bench",
                        help="what is prepared, and the teacher, stay here for the next benchmark")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=seeds, help="of the students' initial weights")
    parser.add_argument("--steps", type=int, default=260, help="of a student")
    parser.add_argument("--teacher-steps", type=int, default=440)
    parser.add_argument("--documents", type=int, default=12, help="of the test split that are scored")
    parser.add_argument("--threads", type=int, default=1)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tiny", action="store_true", help="tiny models: to see that it runs")
    size.add_argument("--large", action="store_true", help="models of text five times as large")
    return parser


def llama(shape: dict[str, int]) -> Llama:
    return Llama(**shape, initializer_range=0.06)  # type: ignore[arg-type]


def text(given: argparse.Namespace) -> Recipe:
    """Python's own source code as stdlib-lm.yaml prepares it, and a teacher ten times the student's size.

    The cache covers what a student reads in ``given.steps``.
    """
    base = load_recipe(RECIPES / "stdlib-lm.yaml", (f"store={given.store.absolute()}", "name=text"))
    teacher, student = TEACHER, STUDENT
    if given.tiny:
        teacher, student = TINY_TEACHER, TINY_STUDENT
    if given.large:
        teacher, student = LARGE_TEACHER, LARGE_STUDENT
    train = {"model": llama(teacher), "steps": given.teacher_steps, "validate_every": max(1, given.teacher_steps)}
    return base.model_copy(
        update={
            "train": base.train.model_copy(update=train),
            "tune": Tune(),
            "cache": cache(base, rows=given.steps * base.sweep.batch_size),
            "sweep": sweep(base, (Student(name="only", model=llama(student)),), given.steps, given.threads),
        }
    )


def digits(given: argparse.Namespace) -> Recipe:
    """The handwritten digits with the teacher of digits.yaml, whose ten outputs are cached whole for every row."""
    base = load_recipe(RECIPES / "digits.yaml", (f"store={given.store.absolute()}", "name=digits"))
    student = Student(name="only", model=vit(24), temperature=2.0, teacher_weight=0.9)
    return base.model_copy(update={"tune": Tune(), "sweep": sweep(base, (student,), given.steps, given.threads)})


def cache(recipe: Recipe, **changes: Any) -> Cache:
    return Cache.model_validate(recipe.cache.model_dump() | changes)


def sweep(recipe: Recipe, students: tuple[Student, ...], steps: int, threads: int) -> Sweep:
    """Every student runs every step, and is validated once."""
    changes = {"students": students, "steps": steps, "validate_every": steps, "cpus_per_trial": threads}
    return recipe.sweep.model_copy(update=changes)


def made(recipe: Recipe, until: str) -> dict[str, Artifact]:
    """The artifacts up to a stage; what the store lacks is made first."""
    found = [step.artifact for step in resolve_stages(recipe, Store(recipe.store), until)]
    if not all(found):
        run_stages(recipe, until)
        found = [step.artifact for step in resolve_stages(recipe, Store(recipe.store), until)]
    return {artifact.record.stage: artifact for artifact in found if artifact}


def remade(recipe: Recipe, stages: tuple[str, ...]) -> dict[str, Any]:
    """Make these stages anew, and measure it; what comes before them is made first where it is missing."""
    before = [step.stage.name for step in resolve_stages(recipe, Store(recipe.store), stages[0])][-2]
    made(recipe, before)
    for step in resolve_stages(recipe, Store(recipe.store), stages[-1]):
        if step.stage.name in stages and step.artifact:
            shutil.rmtree(step.artifact.local())
    return run_stages(recipe, stages[-1])


def run_stages(recipe: Recipe, until: str) -> dict[str, Any]:
    """Run what is not done in a process and on a cluster of its own; gives its wall and CPU seconds."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(recipe.model_dump_json())
        file.flush()
        return child([sys.executable, __file__, file.name, until], threads=1, PYTHONPATH=SOURCES)


@dataclass(frozen=True)
class Trial:
    """A student of a recipe's sweep to train: picklable, so that a process of its own may do it."""

    recipe: Recipe
    parents: dict[str, Artifact]
    teaching: Teaching
    seed: int  # of the initial weights; the rows are those of the recipe's seed
    out: str  # folder of the weights
    values: TrialValues = field(default_factory=dict)  # what differs from the recipe, see tune.space


def train(trial: Trial) -> dict[str, Any]:
    """Train and save; gives the CPU seconds of the training alone, and its validation losses by step."""
    with tempfile.TemporaryDirectory() as scratch:
        model, curve, cpu_s = _train(job(trial, scratch), trial.seed)
    if trial.out:
        save_model(model, model.config, Path(trial.out))
    return {"cpu_s": cpu_s, "parameters": count_parameters(model), "curve": curve}


def job(trial: Trial, store: str, name: str = "only") -> TrialJob:
    """What the product's sweep would hand to the process of a trial."""
    draft = Store(store).new_writer("bench", "sweep", "c" * 64, {}, {})
    context, journal = StageContext(trial.recipe, trial.parents, draft, no_progress), SweepState(draft)
    values = {"student": trial.recipe.sweep.students[0].name, **trial.values}
    made = job_of(context, journal, name, values)
    made.checkpoints.claim_folder()
    if trial.teaching == "none":
        return replace(made, distilled=False)
    return replace(made, distilled=True, student=made.student.model_copy(update={"teacher": trial.teaching}))


def _train(own: TrialJob, seed: int) -> tuple[Any, dict[int, float], float]:
    """As the product trains a student of a sweep."""
    from overproof.distill.student_trainer import StudentTrainer

    began, curve = time.process_time(), {}
    run = StudentTrainer(own)
    run.model.load_state_dict(build_model(own.student.model, run.manifest, seed).state_dict())  # type: ignore[arg-type]
    while max(curve, default=0) < own.settings.steps:
        chunk = run.run_to_validation()
        curve[chunk.steps] = chunk.validation_loss
    run.checkpoint_writer.wait()
    return run.model, curve, time.process_time() - began


@dataclass(frozen=True)
class Scores:
    """Sums of one model over each held-out document or image: (U,)."""

    nats: NDArray[np.float64]
    right: NDArray[np.float64]  # first choices that are the label
    divergence: NDArray[np.float64]  # forward KL to the teacher, nats
    predictions: NDArray[np.float64]
    size_bytes: NDArray[np.float64]  # of the text; 1 for an image

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / self.size_bytes.sum() / np.log(2))

    @property
    def accuracy(self) -> float:
        return float(self.right.sum() / self.predictions.sum())

    @property
    def kl(self) -> float:
        """Nats in a prediction."""
        return float(self.divergence.sum() / self.predictions.sum())


@torch.inference_mode()
def scores(parents: dict[str, Artifact], folders: dict[str, str], documents: int | None) -> dict[str, Scores]:
    """Every model and, under "teacher", the teacher on the same units of the test split; on every thread there is."""
    torch.set_num_threads(os.cpu_count() or 1)
    root = parents["prepare"].local()
    predict = TASKS[Manifest.read(root).task].predict
    teacher = load_model(parents["train"].local() / "model")
    known = {"teacher": teacher} | {name: load_model(Path(folder)) for name, folder in folders.items()}
    ids, places, sizes = _units(root, documents)
    sums = {name: np.zeros((4, len(sizes))) for name in known}
    shards = Shards(root, "test")
    for start in range(0, len(ids), SCORED_ROWS):
        here = slice(start, start + SCORED_ROWS)
        batch, place = to_tensors(shards.take(ids[here])), places[here]
        log_q_BPV = log_softmax(predict(teacher, batch).logits_BPV, -1)
        q_BPV = log_q_BPV.exp()
        negative_entropy_BP = torch.einsum("bpv,bpv->bp", q_BPV, log_q_BPV)
        for name, model in known.items():
            prediction = predict(model, batch)
            log_p_BPV = log_softmax(prediction.logits_BPV, -1)
            nats_BP = -log_p_BPV.gather(-1, prediction.targets_BP[..., None])[..., 0]
            kl_BP = negative_entropy_BP - torch.einsum("bpv,bpv->bp", q_BPV, log_p_BPV)
            right_BP = log_p_BPV.argmax(-1) == prediction.targets_BP
            for row, values_BP in enumerate((nats_BP, right_BP, kl_BP, torch.ones_like(kl_BP))):
                np.add.at(sums[name][row], place, (values_BP * prediction.mask_BP).sum(1).double().numpy())
    return {name: Scores(*found, sizes) for name, found in sums.items()}


def _units(root: Path, most: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Row ids of the test split, the unit that each belongs to, and every unit's size."""
    if Manifest.read(root).task == "image_classification":
        count = Manifest.read(root).splits["test"].rows
        return np.arange(count), np.arange(count), np.ones(count)
    rows = TestDocuments.of(root, most)
    table = pq.read_table(root / DOCUMENTS, columns=["document", "size_bytes"]).to_pydict()
    size_bytes = dict(zip(table["document"], table["size_bytes"], strict=True))
    return rows.sample_ids, rows.places, np.array([size_bytes[int(d)] for d in rows.documents], np.float64)


def vit(width: int, layers: int = 1) -> Vit:
    return Vit(hidden_size=width, intermediate_size=2 * width, layers=layers, heads=2, patch_size=4,
               initializer_range=0.12)  # fmt: skip


def main(file: Path, until: str) -> None:
    from overproof import pipeline

    recipe = Recipe.model_validate_json(file.read_text())
    began = time.monotonic()
    with TreeCpu() as cpu:
        artifacts = pipeline.run(recipe, until)
    last = artifacts[until].record
    found = {
        "wall_s": time.monotonic() - began,
        "cpu_s": cpu.seconds,
        "stage_s": last.seconds,
        "id": artifacts[until].id,
    }
    print("\n" + json.dumps({**found, "metrics": last.metrics}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
