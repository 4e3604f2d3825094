"""One rank in training: its model and engine, the loop over its rows, and on rank 0 the artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from overproof.data.manifest import Manifest
from overproof.data.order import rows_hash
from overproof.data.parquet_reader import Columns, Shards, planned_shards
from overproof.errors import InputError
from overproof.files import local_cache
from overproof.models.hf_directory import Batch, count_parameters, save_model, to_tensors
from overproof.registry import TASKS
from overproof.stage_context import NOTICE
from overproof.train.checkpoint import Checkpoint
from overproof.train.checkpoint_callback import CheckpointCallback, CheckpointSignal
from overproof.train.checkpoint_writer import AsyncCheckpointWriter
from overproof.train.deepspeed_engine import DeepSpeedEngine, consolidated_weights, to_universal
from overproof.train.loop import CurveRow, LoopHooks, fit, shard_batches, validation_ids, validation_loss
from overproof.train.memory_errors import explain_memory
from overproof.train.metrics_logger import CURVE_FILE, ROWS_HASH, MetricsLogger
from overproof.train.throughput import ThroughputMeter
from overproof.train.train_job import ResumePoint, TrainJob

ROWS_NAMED = 8


class RankTrainer:
    """A rank's model, ready to train."""

    def __init__(self, job: TrainJob, start: ResumePoint, rank: int, world: int) -> None:
        """Raises:
        InputError: the starting model or the checkpoint cannot be used, or memory ran out.
        """
        self.job, self.start, self.rank, self.world = job, start, rank, world
        self.root = job.prepared.local()
        self.manifest = Manifest.read(self.root)
        self.task = TASKS[self.manifest.task]
        self.order = self.manifest.order(job.seed)
        torch.set_num_threads(max(1, int(job.train.cpus_per_worker)))
        found = start.checkpoint
        universal = found is not None and found.world != world and job.train.zero_stage > 0
        with explain_memory("building the model and the optimizer"):
            self.model = job.lesson.model(self.manifest, job.seed)
            self.parameters = count_parameters(self.model)  # before ZeRO-3 takes them apart
            self.engine = DeepSpeedEngine(self.model, job.train, job.seed, universal)
            self.objective = job.lesson.objective(self.task, self.engine.device)
        self.rows = self._restore(found, universal) if found else []
        self.batch: Batch = {}
        self.held_out = Shards(self.root, "validation")
        ids = validation_ids(self.held_out.rows, job.train.validation_rows)
        self.parts = shard_batches(ids, job.train.batch_size // world, rank, world)

    def fit(self, rows: Iterator[Columns], bell: CheckpointSignal) -> dict[str, Any] | None:
        """Train to the end. Rank 0 writes model/, curve.jsonl and events/ and gives back metrics."""
        watch = ThroughputMeter(self.job, self.manifest, self.world)
        if self.rank > 0:
            self.train(rows, bell, watch, ())
            return None
        with (
            self.job.draft.directory() as folder,
            MetricsLogger(_existing(folder) / CURVE_FILE, folder / "events") as curve,
        ):
            for row in self.rows:
                curve(row)
            self.train(rows, bell, watch, (curve, watch))
            self.write(folder / "model")
        return {"parameters": self.parameters, "steps": self.job.train.steps, **watch.metrics(self.rows)}

    def train(
        self,
        rows: Iterator[Columns],
        bell: CheckpointSignal,
        watch: ThroughputMeter,
        reports: Sequence[Callable[[CurveRow], None]],
    ) -> None:
        """Train to the end, until the last checkpoint is committed; ``reports`` are given every row of the curve."""
        saver = AsyncCheckpointWriter(self.job.checkpoints, self.start.attempt, self.rank, self.world)
        saving = CheckpointCallback(self.engine, self.job.train, saver, bell, self.rows)

        def report(row: CurveRow) -> None:
            measured = watch.measure(row)
            if "validation_loss" not in row:
                measured = {**measured, ROWS_HASH: float(saving.agree())}
            for each in (self.rows.append, *reports):
                each(measured)

        hooks = LoopHooks(self.start.step, saving, self._nonfinite, self.job.validated)
        with explain_memory("a training step"):
            batches = watch.timed(self._batches(rows, saving.tell))
            fit(self.engine, self.objective, self.job.train, batches, self.validate, report, hooks)
        saving.finish()

    def validate(self) -> float:
        """The validation loss over all ranks; the same rows each time."""
        batches = (to_tensors(self.held_out.take(part)) for part in self.parts)
        with self.engine.evaluating() as model:
            return validation_loss(model, self.task.predict, batches, self.engine.total)

    def _batches(self, rows: Iterator[Columns], seen: Callable[[int], None]) -> Iterator[Batch]:
        names = self.manifest.batch_columns
        for columns in rows:
            further = self.job.lesson.columns(columns["sample_id"])
            self.batch = to_tensors({name: columns[name] for name in names} | further)
            seen(rows_hash(columns["sample_id"]))
            yield self.batch

    def _restore(self, found: Checkpoint, universal: bool) -> list[CurveRow]:
        """Load the checkpoint; gives the curve up to it."""
        with found.local() as folder, explain_memory("loading the checkpoint"):
            converted = None
            if universal:
                converted = local_cache(f"universal-{found.key}", lambda out: to_universal(folder, out / "state"))
            self.engine.load(converted / "state" if converted else folder, found.step)
            lines = (folder / CURVE_FILE).read_text().splitlines()
        dist.barrier()
        if converted:
            shutil.rmtree(converted, ignore_errors=True)
        return [json.loads(line) for line in lines]

    def write(self, folder: Path) -> None:
        """The model as a Hugging Face directory: the weights of the last checkpoint, or of the best.

        Raises:
            InputError: that checkpoint is damaged.
        """
        train, checkpoints = self.job.train, self.job.checkpoints
        tokenizer = self.manifest.tokenizer(self.root)
        if train.steps == 0:
            save_model(self.job.lesson.model(self.manifest, self.job.seed), self.model.config, folder, tokenizer)
            return
        kept = checkpoints.best() if train.result == "best" else checkpoints.all()[-1]
        assert kept
        if fault := kept.fault():
            raise InputError(f"{kept.uri}: {fault}; run again: training goes on from the checkpoint before")
        with kept.local() as source:
            save_model(consolidated_weights(source), self.model.config, folder, tokenizer)

    def _nonfinite(self, step: int, error: InputError) -> None:
        """Name the rows of a step that went wrong; every rank gets here.

        Raises:
            InputError: the recipe does not leave such steps out.
        """
        size = self.job.train.batch_size
        share = size // self.world
        bad = torch.zeros(size, device=self.engine.device)
        with self.engine.evaluating() as model:
            for index in range(share):
                row = {name: values[index : index + 1] for name, values in self.batch.items()}
                bad[self.rank * share + index] = not torch.isfinite(
                    torch.tensor(validation_loss(model, self.task.predict, [row]))
                )
        flags = self.engine.total(bad).cpu().numpy() > 0
        ids = self.order.step_rows(step - 1, size)
        named = ids[flags] if flags.any() else ids
        shown = ", ".join(map(str, named[:ROWS_NAMED])) + (", ..." if len(named) > ROWS_NAMED else "")
        which = f"at fault by itself: row {shown}" if flags.any() else f"no row alone is at fault: {shown}"
        if self.job.train.on_nonfinite == "stop":
            raise InputError(
                f"{error}; {which} (sample_id of the train split). on_nonfinite: skip leaves such steps out"
            )
        if self.rank == 0:
            self.job.progress(NOTICE, step, self.job.train.steps, f"step {step} left out: {which}")


def read_own_rows(job: TrainJob, start: ResumePoint, rank: int, world: int) -> Iterator[Columns]:
    """A rank's planned rows of every step that is left, read by this process."""
    shards = planned_shards(job.prepared.local())
    order = shards.manifest.order(job.seed)
    return shards.steps(order, job.train.batch_size, start.step, job.train.steps, rank, world)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: not on the node of rank 0; on a cluster of several nodes the store must be a folder that "
            "they share, or a URI such as s3://bucket/store"
        )
    return folder
