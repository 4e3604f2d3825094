"""One rank in training: its model and engine, the loop over its rows, and on rank 0 the artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pyarrow import fs
from torch import Tensor
from transformers import PreTrainedModel

from overproof.artifacts import ArtifactWriter
from overproof.config import Training
from overproof.data.manifest import Manifest
from overproof.data.order import rows_hash
from overproof.data.parquet_reader import Columns, Shards, planned_shards
from overproof.errors import InputError
from overproof.files import filesystem, join_uri, local_cache
from overproof.models.adapters import count_weights, merge_adapters
from overproof.models.compute import start_compute
from overproof.models.hf_directory import Batch, save_description, to_tensors, written_names
from overproof.models.safetensors_writer import TensorShape
from overproof.models.zero_parts import full_shape, is_apart, model_parts
from overproof.registry import TASKS
from overproof.stage_context import Notice, TaskProgress
from overproof.train.checkpoint import CURVE_FILE, Checkpoint
from overproof.train.checkpoint_writer import AsyncCheckpointWriter, CheckpointCallback, CheckpointSignal
from overproof.train.deepspeed_engine import DeepSpeedEngine, sharded_construction, to_universal
from overproof.train.engine import explain_memory
from overproof.train.heap import mapped_blocks
from overproof.train.loop import CurveRow, LoopHooks, fit, shard_batches, validation_ids, validation_loss
from overproof.train.metrics import ROWS_HASH, MetricsLogger, ThroughputMeter
from overproof.train.rank_files import files_of, find_damage_together, own_files, ranks_of
from overproof.train.read_ahead import for_device
from overproof.train.sharded_state import ShardedState, needed_ranks
from overproof.train.train_job import ResumePoint, TrainJob
from overproof.train.weights_writer import write_weights
from overproof.train.zero_files import weight_parts

LISTED_ROWS = 8  # of a step that went wrong, in a message


class RankTrainer:
    """A rank's model, ready to train."""

    def __init__(self, job: TrainJob, resume: ResumePoint, rank: int, world: int) -> None:
        """Raises:
        InputError: the starting model or the checkpoint cannot be used, or memory ran out.
        """
        self.job, self.resume, self.rank, self.world = job, resume, rank, world
        self.manifest = Manifest.read(job.prepared)
        self.task = TASKS[self.manifest.task]
        self.order = self.manifest.order(job.seed)
        torch.set_num_threads(max(1, int(job.train.cpus_per_worker)))
        start_compute(job.train.gpus_per_worker, "fp32" if job.train.precision == "fp32" else "tf32")
        checkpoint = resume.checkpoint
        universal = checkpoint is not None and checkpoint.world != world and job.train.zero_stage in (1, 2)
        self._report_phase("building the model")
        with mapped_blocks(), explain_memory("building the model and the optimizer"):
            self.model = self._build(job.train)
            self.parameters, self.trained_parameters = count_weights(self.model)
            self.engine = DeepSpeedEngine(self.model, job.train, job.seed, universal)
            self.objective = job.spec.objective(self.task, self.engine.device)
        self.curve = self._restore(checkpoint, universal) if checkpoint else []
        self.batch: Batch = {}
        self.validation_shards = Shards(job.prepared, "validation")
        ids = validation_ids(self.validation_shards.rows, job.train.validation_rows)
        self.validation_batches = shard_batches(ids, job.train.batch_size // world, rank, world)

    def fit(self, rows: Iterator[Columns], signal: CheckpointSignal) -> dict[str, Any] | None:
        """Train to the end. Rank 0 writes model/, curve.jsonl and events/, hands in what all wrote, and gives back
        metrics.
        """
        meter = ThroughputMeter(self.job, self.manifest, self.world)
        require_shared(self.job.draft)
        if self.rank > 0:
            self.train(rows, signal, meter, ())
            self.write_model("model")
            return None
        self.job.draft.clear()  # what a group before this one has begun
        with (
            self.job.draft.directory() as folder,
            MetricsLogger(folder / CURVE_FILE, folder / "events") as logger,
        ):
            for row in self.curve:
                logger(row)
            self.train(rows, signal, meter, (logger, meter.report))
        self.write_model("model")
        trained = {} if self.job.train.lora is None else {"trained_parameters": self.trained_parameters}
        return {"parameters": self.parameters, **trained, "steps": self.job.train.steps, **meter.metrics(self.curve)}

    def train(
        self,
        rows: Iterator[Columns],
        signal: CheckpointSignal,
        meter: ThroughputMeter,
        listeners: Sequence[Callable[[CurveRow], None]],
    ) -> None:
        """Train to the end, until the last checkpoint is committed; ``listeners`` are given every row of the curve."""
        writer = AsyncCheckpointWriter(self.job.checkpoints, self.resume.attempt, self.rank, self.world)
        callback = CheckpointCallback(self.engine, self.job.train, writer, signal, self.curve)

        def report(row: CurveRow) -> None:
            measured = meter.measure(row)
            if "validation_loss" not in row:
                measured = {**measured, ROWS_HASH: float(callback.finish_sync())}
            for listener in (self.curve.append, *listeners):
                listener(measured)

        hooks = LoopHooks(self.resume.step, callback, self._handle_nonfinite, self.job.extra_validation_steps)
        with explain_memory("a training step"):
            batches = meter.timed(self._batches(rows, callback.start_sync))
            fit(self.engine, self.objective, self.job.train, batches, self.validate, report, hooks)
        self._report_phase("writing the last checkpoint", self.job.train.steps)
        callback.flush()

    def validate(self) -> float:
        """The validation loss over all ranks; the same rows each time."""
        batches = (to_tensors(self.validation_shards.take(ids)) for ids in self.validation_batches)
        with self.engine.eval_mode() as model:
            return validation_loss(model, self.task.predict, batches, self.engine.all_reduce)

    def write_model(self, folder: str) -> None:
        """Write the model as a Hugging Face directory into a folder of the draft: the weights of the last checkpoint,
        or of the best. Every rank calls it, and writes files of its own; rank 0 hands all in.

        Raises:
            InputError: that checkpoint is damaged.
        """
        train, uri = self.job.train, join_uri(self.job.draft.uri, folder)
        self._report_phase("writing the model", train.steps)
        model: PreTrainedModel | None = self.model
        parts = self._trained_parts() if train.steps else {}
        if train.steps == 0 or train.lora is not None:
            model = self._start_with(parts)
            parts = {} if model is None else model_parts(model, self.rank)
        described: list[dict[str, TensorShape]] = [{}]
        if model is not None and self.rank == 0:
            state = model.state_dict(keep_vars=True)
            names = written_names(model.config, [type(model).__name__], list(state))
            types = {name: torch.float32 if state[name].is_floating_point() else state[name].dtype for name in names}
            described = [{name: TensorShape(types[name], tuple(full_shape(state[name]))) for name in names}]
            with self.job.draft.directory(folder) as written:
                tokenizer = self.manifest.tokenizer(self.job.prepared)
                save_description(model.config, [type(model).__name__], written, tokenizer)
        dist.broadcast_object_list(described)

        def report(begun: int, files: int) -> None:
            self._report_phase(f"writing the model: file {begun} of {files}", train.steps)

        with mapped_blocks():
            weights = write_weights(parts, described[0], uri, self.engine.device, report)
        if self.rank == 0:
            self.job.draft.hand_in({f"{folder}/{name}": entry for name, entry in weights.items()})

    def _trained_parts(self) -> dict[str, Tensor]:
        """What this rank's files of the checkpoint that is given on hold of the weights."""
        checkpoints = self.job.checkpoints
        chosen: list[Checkpoint | None] = [None]
        if self.rank == 0:
            best = self.job.train.result == "best"
            chosen = [checkpoints.best() if best else checkpoints.all_committed()[-1]]
        dist.broadcast_object_list(chosen)
        checkpoint = chosen[0]
        assert checkpoint
        if damage := find_damage_together(checkpoint):
            raise InputError(f"{checkpoint.uri}: {damage}; run again: training goes on from the checkpoint before")
        with checkpoint.local(own_files(checkpoint)) as folder:
            return weight_parts(folder, ranks_of(self.rank, self.world, checkpoint.world), checkpoint.world)

    def _start_with(self, adapters: dict[str, Tensor]) -> PreTrainedModel | None:
        """The model from before the first step, in fp32, with what all ranks' adapters add; in parts where it is built
        so, or else on rank 0 alone.
        """
        train = self.job.train
        whole = train.zero_stage < 3 or self.job.spec.sharding is None
        gathered: list[dict[str, Tensor]] = [{}] * self.world
        dist.all_gather_object(gathered, adapters)
        if whole and self.rank > 0:
            return None
        unchanged = train.steps == 0 and all(
            p.dtype == torch.float32 and is_apart(p) != whole for p in self.model.parameters()
        )
        model = self.model if unchanged else self._build(train.model_copy(update={"precision": "fp32"}))
        names, state = {name for parts in gathered for name in parts}, model.state_dict()
        flat = {name: torch.cat([parts[name] for parts in gathered if name in parts]) for name in names}
        return merge_adapters(model, {name: values.view(state[name].shape) for name, values in flat.items()})

    def _build(self, train: Training) -> PreTrainedModel:
        """The model from before the first step; at stage 3 this rank's part of it, where it can be built so."""
        with sharded_construction(train, self.world, self.job.spec.sharding):
            return self.job.spec.model(self.manifest, self.job.seed)

    def _batches(self, rows: Iterator[Columns], start_sync: Callable[[int], None]) -> Iterator[Batch]:
        made = ((rows_hash(columns["sample_id"]), self._batch(columns)) for columns in rows)
        for hashed, batch in for_device(made, self.engine.device):
            self.batch = batch
            start_sync(hashed)
            yield batch

    def _batch(self, columns: Columns) -> Batch:
        further = self.job.spec.columns(columns["sample_id"])
        planned = {name: columns[name] for name in self.manifest.batch_columns}
        return to_tensors(planned | further, pinned=self.engine.device.type == "cuda")

    def _restore(self, checkpoint: Checkpoint, universal: bool) -> list[CurveRow]:
        """Load the checkpoint; gives the curve up to it."""
        self._report_phase(f"restoring the checkpoint of step {checkpoint.step}")
        resharded = checkpoint.world != self.world and self.job.train.zero_stage == 3
        ranks = {self.rank}
        if resharded:
            ranks = needed_ranks(self.engine.trained, self.rank, self.world, checkpoint.world)
        names = None if universal else files_of(checkpoint.files, ranks, common=True)
        with checkpoint.local(names) as folder, mapped_blocks(), explain_memory("loading the checkpoint"):
            converted = None
            if universal:
                key = f"universal-{checkpoint.content_sha256}"
                converted = local_cache(key, lambda out: to_universal(folder, out / "state"))
            if resharded:
                self.engine.load_resharded(folder, checkpoint.step, ShardedState(folder, checkpoint.world))
            else:
                self.engine.load(converted / "state" if converted else folder, checkpoint.step)
            lines = (folder / CURVE_FILE).read_text().splitlines()
        dist.barrier()
        if converted:
            shutil.rmtree(converted, ignore_errors=True)
        return [json.loads(line) for line in lines]

    def _report_phase(self, note: str, step: int | None = None) -> None:
        if self.rank == 0:
            done = self.resume.step if step is None else step
            self.job.progress(TaskProgress("train", done, self.job.train.steps, note))

    def _handle_nonfinite(self, step: int, error: InputError) -> None:
        """Name the rows of a step that went wrong; every rank gets here.

        Raises:
            InputError: the recipe does not leave such steps out.
        """
        size = self.job.train.batch_size
        share = size // self.world
        nonfinite_B = torch.zeros(size, device=self.engine.device)
        with self.engine.eval_mode() as model:
            for index in range(share):
                row = {name: values[index : index + 1] for name, values in self.batch.items()}
                loss = validation_loss(model, self.task.predict, [row])
                nonfinite_B[self.rank * share + index] = not torch.isfinite(torch.tensor(loss))
        flags_B = self.engine.all_reduce(nonfinite_B).cpu().numpy() > 0
        ids_B = self.order.step_rows(step - 1, size)
        listed = ids_B[flags_B] if flags_B.any() else ids_B
        shown = ", ".join(map(str, listed[:LISTED_ROWS])) + (", ..." if len(listed) > LISTED_ROWS else "")
        rows = f"at fault by itself: row {shown}" if flags_B.any() else f"no row alone is at fault: {shown}"
        if self.job.train.on_nonfinite == "stop":
            raise InputError(
                f"{error}; {rows} (sample_id of the train split). on_nonfinite: skip leaves such steps out"
            )
        if self.rank == 0:
            self.job.progress(Notice(f"step {step} left out: {rows}"))


def read_rank_rows(job: TrainJob, resume: ResumePoint, rank: int, world: int) -> Iterator[Columns]:
    """A rank's planned rows of every step that is left, read by this process."""
    shards = planned_shards(job.prepared)
    order = shards.manifest.order(job.seed)
    return shards.steps(order, job.train.batch_size, resume.step, job.train.steps, rank, world)


def require_shared(draft: ArtifactWriter) -> None:
    """Raises InputError if the draft's folder is not there, on this rank's node."""
    files, path = filesystem(draft.uri)
    if isinstance(files, fs.LocalFileSystem) and not Path(path).is_dir():
        raise InputError(
            f"{path}: not on the node of rank {dist.get_rank()}; on a cluster of several nodes the store must be a "
            "folder that they share, or a URI such as s3://bucket/store"
        )
