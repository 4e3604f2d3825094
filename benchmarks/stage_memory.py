"""What each stage of a recipe holds in memory at most, beside what `overproof plan` says of it.

    .venv/bin/overproof train RECIPE        # once: the stages begin from the prepared data and the teacher
    .venv/bin/python benchmarks/stage_memory.py RECIPE [--phases capture student ...] [--set PATH=VALUE ...]

Prints one Markdown table. Each stage runs as a run has it, without Ray, in a process of its own, for a few rows or
steps: the teacher as the recipe has it, trained whole and with adapters (2 steps, a checkpoint each), capturing 2
batches, 2 steps of the first student with a validation and a checkpoint after each, exporting it in every variant, and
scoring 2 rows.

`measured` is the most anonymous memory of the process (RssAnon of /proc/PID/status, looked at every 5 ms from outside),
libraries and all, and `plan` what the plan says of it. Pages of files, such as weights that are mapped, do not count.
The last two columns are the same without what the libraries hold when they are loaded. In MB. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import environment, machine, printed, say, table

from overproof import pipeline
from overproof.artifacts import Artifact, ArtifactWriter, Store
from overproof.config import Lora, Recipe, Sweep, Train, load_recipe
from overproof.data.manifest import Manifest
from overproof.engines.base import ScoringLoader
from overproof.export.base import SizedFormat
from overproof.models import stage_memory
from overproof.models.base import shape_of
from overproof.models.sizes import student_size, trained_size
from overproof.registry import ENGINES, FORMATS
from overproof.stage_context import StageContext, no_progress

BATCHES = 2
LORA = Lora(rank=8)
FIELD = re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)
SAMPLE_S = 0.005


@dataclass(frozen=True)
class Peak:
    """Bytes that a phase held at most."""

    libraries: int
    held: int

    @property
    def own(self) -> int:
        """Beside the libraries."""
        return self.held - self.libraries


@dataclass(frozen=True)
class Setting:
    """What phases begin from, and where they write."""

    recipe: Recipe
    parents: dict[str, Artifact]
    scratch: Path

    def draft(self, stage: str) -> ArtifactWriter:
        name = f"{time.time_ns():x}".rjust(64, "0")[::-1]
        return Store(str(self.scratch / stage)).new_writer(self.recipe.name, stage, name, {}, {})

    @property
    def teacher(self) -> Path:
        return self.parents["train"].local() / "model"

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.parents["prepare"].local())

    @property
    def student(self) -> Path:
        """The trained student's directory, or the teacher's before there is one."""
        found = self.scratch / "student"
        return found if found.is_dir() else self.teacher


def few_steps(train: Train, steps: int, lora: Lora | None = None) -> Train:
    """With a checkpoint and a validation after each."""
    few = {"steps": steps, "lora": lora, "workers": 1, "validate_every": 1, "validation_rows": train.batch_size}
    return train.model_copy(update={**few, "checkpoint": train.checkpoint.model_copy(update={"every_steps": 1})})


def few_validations(sweep: Sweep) -> Sweep:
    """A validation, with its checkpoint, after each of some steps."""
    return sweep.model_copy(update={"steps": BATCHES, "validate_every": 1, "validation_rows": sweep.batch_size})


def train_teacher(setting: Setting, steps: int, lora: Lora | None = None) -> Iterator[None]:
    """One rank of the stage, for a few steps, and the model's directory."""
    import torch.distributed as dist

    from overproof.train.checkpoint import Checkpoints
    from overproof.train.checkpoint_writer import NoSignal
    from overproof.train.deepspeed_engine import import_deepspeed
    from overproof.train.rank_trainer import RankTrainer, read_rank_rows
    from overproof.train.train_job import ResumePoint, SupervisedSpec, TrainJob

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group(
        "gloo", init_method=f"file://{setting.scratch}/rendezvous-{os.getpid()}", rank=0, world_size=1
    )
    import_deepspeed("cpu")
    yield
    train, draft = few_steps(setting.recipe.train, steps, lora), setting.draft(f"train-{os.getpid()}")
    checkpoints = Checkpoints(draft.workspace, draft.fingerprint, draft.config, draft.parents, train.checkpoint)
    job = TrainJob(
        train, setting.recipe.seed, setting.parents["prepare"], draft, checkpoints, no_progress,
        SupervisedSpec(train.model, train.lora),
    )  # fmt: skip
    checkpoints.claim_folder()
    RankTrainer(job, ResumePoint(), 0, 1).fit(read_rank_rows(job, ResumePoint(), 0, 1), NoSignal())


def capture(setting: Setting) -> Iterator[None]:
    """An actor of the pool, over as many rows as the student reads."""
    from overproof.distill.target_cache import TargetIndex, target_key
    from overproof.distill.teacher_pool import finished_files, write_index
    from overproof.distill.teacher_worker import CaptureJob, TargetWorker

    yield
    recipe, prepared, trained = setting.recipe, setting.parents["prepare"], setting.parents["train"]
    rows = BATCHES * max(recipe.cache.batch_size, recipe.sweep.batch_size)
    index = TargetIndex.of(target_key(recipe, prepared, trained), setting.manifest, rows)
    job = CaptureJob(recipe.cache, index, prepared, trained, setting.draft("cache"))
    worker = TargetWorker(job)
    faults = [report["fault"][0] for report in worker({"file": np.arange(len(index.files))})]
    if any(faults):
        raise SystemExit(faults)
    write_index(job, {path: file.entry for path, file in finished_files(job).items()})
    job.draft.commit({}, 0)


def train_student(setting: Setting) -> Iterator[None]:
    """The recipe's first student: some steps, a validation and a checkpoint, as many steps again, its weights."""
    from ray import tune  # noqa: F401  as the process of a trial has it

    from overproof.distill.student_trainer import StudentTrainer
    from overproof.distill.sweep import make_trial_job
    from overproof.distill.sweep_state import SweepState

    yield
    recipe, draft = setting.recipe, setting.draft("sweep")
    sweep = few_validations(recipe.sweep)
    (cache,) = Store(str(setting.scratch / "cache")).artifacts()
    parents = {**setting.parents, "cache": cache}
    context = StageContext(recipe.model_copy(update={"sweep": sweep}), parents, draft, no_progress)
    name = sweep.students[0].name
    trainer = StudentTrainer(make_trial_job(context, SweepState(draft), name, {"student": name}))
    for _ in range(2):
        trainer.run_to_validation()
    trainer.save_weights()
    with draft.directory() as folder:
        (folder / trainer.job.folder).rename(setting.scratch / "student")


def export(setting: Setting) -> Iterator[None]:
    """The student's file in every variant; the unquantised one is held against the model, as the stage does it."""
    from overproof.export.base import ExportContext
    from overproof.export.stage import require_same_model

    recipe, written = setting.recipe, FORMATS[setting.recipe.compress.kind]
    import gguf  # noqa: F401

    import overproof.models.hf_directory  # noqa: F401

    yield
    tokenizer = setting.manifest.tokenizer(setting.parents["prepare"].local())
    given = ExportContext(recipe.compress, recipe.name, setting.teacher, tokenizer)
    unquantised = setting.scratch / f"student-{written.unquantised}{written.suffix}"
    written.write(setting.student, unquantised, written.unquantised, given, unquantised)
    require_same_model(written, setting.student, unquantised)
    for variant in recipe.compress.formats:
        file = setting.scratch / f"student-{variant}{written.suffix}"
        written.write(setting.student, file, variant, given, unquantised)


def score(setting: Setting, variant: str) -> Iterator[None]:
    """Rows of the recipe's length in the recipe's engine."""
    import overproof.tasks.text_evaluation  # noqa: F401

    engine = ENGINES[setting.recipe.engine]
    assert isinstance(engine, ScoringLoader)
    yield
    positions = setting.manifest.positions
    scorer = engine.scorer(setting.scratch / f"student-{variant}.gguf", positions, setting.recipe.evaluate.threads)
    rng = np.random.default_rng(0)
    list(scorer.score(rng.integers(0, setting.manifest.outputs, (BATCHES, positions + 1))))


def phases() -> dict[str, Any]:
    variants = ("f16", "q8_0", "q4_0")
    return {
        "teacher as it is": partial(train_teacher, steps=0),
        "teacher trained": partial(train_teacher, steps=BATCHES),
        "teacher trained, LoRA": partial(train_teacher, steps=BATCHES, lora=LORA),
        "capture": capture,
        "student": train_student,
        "export": export,
        **{f"scoring {variant}": partial(score, variant=variant) for variant in variants},
    }


PHASES = phases()


def planned(setting: Setting, phase: str) -> int:
    """What `overproof plan` says of it, beside the libraries."""
    recipe, (kind, *_) = setting.recipe, phase.split()
    shape, written, engine = shape_of(setting.manifest), FORMATS[recipe.compress.kind], ENGINES[recipe.engine]
    student = student_size(recipe.sweep.students[0].model, recipe.train.model, shape)
    if kind == "teacher":
        train = few_steps(recipe.train, **PHASES[phase].keywords)
        return stage_memory.teacher_memory(trained_size(train, shape), train, 1)
    if kind == "capture":
        return stage_memory.capture_memory(trained_size(recipe.train, shape), recipe.cache)
    if kind == "student":
        return stage_memory.student_memory(student, few_validations(recipe.sweep))
    assert isinstance(written, SizedFormat)
    assert isinstance(engine, ScoringLoader)
    return (
        written.export_memory(recipe.compress, student)
        if kind == "export"
        else engine.scoring_memory(student, shape.positions)
    )


def anonymous(pid: int | str = "self") -> int:
    """Bytes of a process that no file backs; 0 where it is no more."""
    try:
        return 1024 * int(FIELD.findall(Path(f"/proc/{pid}/status").read_text())[0])
    except (OSError, IndexError):
        return 0


def multiply() -> None:
    """Have torch make room for the products of matrices, which it keeps."""
    import torch

    torch.mm(torch.ones(512, 1024), torch.ones(1024, 1024))


def run_phase(setting: Setting, phase: str) -> int:
    """Run it to its end; gives what its libraries hold."""
    running = PHASES[phase](setting)
    next(running)  # they are loaded
    multiply()
    libraries = anonymous()
    next(running, None)
    return libraries


def measure(command: list[Any]) -> Peak:
    nice = ["nice", "-n", "10"]  # on a busy machine this process must come to look
    process = subprocess.Popen([*nice, *map(str, command)], env=environment(1), stdout=subprocess.PIPE, text=True)
    highest = 0
    while process.poll() is None:
        highest = max(highest, anonymous(process.pid))
        time.sleep(SAMPLE_S)
    assert process.stdout is not None
    said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{command}: {process.returncode}\n{said}")
    libraries = int(printed(said)["libraries"])
    return Peak(libraries, highest)


def setting_of(file: str, overrides: list[str], scratch: Path, rows: int | None) -> Setting:
    recipe = load_recipe(file, tuple(overrides))
    steps = pipeline.resolve_stages(recipe, Store(recipe.store), "train")
    parents = {step.stage.name: step.artifact for step in steps}
    done = {name: artifact for name, artifact in parents.items() if artifact is not None}
    if len(done) != len(parents):
        raise SystemExit(f"run `overproof train {file}` first")
    batch = {} if rows is None else {"batch_size": rows}
    parts = {name: getattr(recipe, name).model_copy(update=batch) for name in ("train", "cache", "sweep")}
    return Setting(recipe.model_copy(update=parts), done, scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--rows", type=int, help="in every batch, in place of the recipe's")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help="folder for what phases write, which is kept")
    given = parser.parse_args()

    def begin(scratch: Path) -> Setting:
        return setting_of(given.recipe, given.overrides, scratch, given.rows)

    if given.phase:
        print(json.dumps({"libraries": run_phase(begin(given.scratch), given.phase)}))
        return
    told = [word for override in given.overrides for word in ("--set", override)]
    told += [] if given.rows is None else ["--rows", str(given.rows)]
    with tempfile.TemporaryDirectory() as folder:
        scratch = (given.scratch or Path(folder)).absolute()
        rows, setting = [], begin(scratch)
        for phase in given.phases:
            command = [sys.executable, __file__, given.recipe, "--phase", phase, "--scratch", scratch, *told]
            peak = measure(command)
            own = planned(setting, phase)
            said = stage_memory.LIBRARIES_BYTES + own
            said_MB, held_MB, own_MB, measured_MB = (f"{n / 1e6:,.0f}" for n in (said, peak.held, own, peak.own))
            rows.append([phase, said_MB, held_MB, f"{said / peak.held:.2f}", own_MB, measured_MB])
            say(f"{rows[-1]}")
    print(f"{machine(1)}\n")
    table(("stage", "plan", "measured", "plan ÷ measured", "plan, own", "measured, own"), rows)


if __name__ == "__main__":
    main()
