"""The train stage: starts the workers under Ray Train, starts them again until the last step is done; and what each
worker does.

A worker begins with its first rows, which it reads itself while Ray Data has not yet begun to stream.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
from ray.data import DataIterator
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import RunConfig
from ray.train.collective import broadcast_from_rank_zero

from overproof.artifacts import ArtifactWriter
from overproof.cluster.ray_cluster import is_remote, preserve_handler
from overproof.config import ModelSection, Pretrained, Served
from overproof.data.feed import planned_dataset
from overproof.data.manifest import Manifest
from overproof.data.order import Order
from overproof.data.parquet_reader import Columns, planned_shards, table_to_numpy
from overproof.data.tokenizer_match import require_tokenizer
from overproof.errors import InputError
from overproof.files import FileEntry
from overproof.models import pretrained
from overproof.stage_context import StageContext, TaskProgress
from overproof.train.checkpoint import Checkpoints
from overproof.train.rank_files import newest_sound_together
from overproof.train.ray_elastic import (
    ElasticScaling,
    RetryPolicy,
    WorkerCheckpointSignal,
    describe_error,
    root_causes,
)
from overproof.train.ray_train_private import (
    PolicyTrainer,
    QuietTorchConfig,
    ScalingConfig,
    start_data_stats_actor,
)
from overproof.train.served_teacher import record_teacher
from overproof.train.train_job import ResumePoint, SupervisedSpec, TrainJob
from overproof.units import format_count

RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # at 2 s the end of a short run, or a kill, is noticed late
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # of the seconds that a drained node has left
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # to find room, nothing else; then the nodes are counted again
}
PREFETCHED_BATCHES = 2
STREAM_STEPS = 8192  # of one stream; the next is opened half-way. Ray Data holds a task for each block of a stream
OWN_STEPS = 16  # whose rows a rank reads itself: Ray Data starts meanwhile, and its processes want the same cores


def train_teacher(context: StageContext) -> dict[str, Any]:
    """Train the teacher; writes model/, curve.jsonl and events/. Of one that is served, see ``record_teacher``.

    What an attempt that was killed has left in the draft's workspace is gone on from.

    Raises:
        InputError: the starting model does not fit the data, a shard cannot be read, the loss is not finite, memory
            does not suffice, or the workspace holds a training of another recipe or no sound checkpoint.
        RuntimeError: the workers failed ``max_failures`` times in a row without a new checkpoint.
    """
    settings, prepared, draft = context.recipe.train, context.parents["prepare"], context.draft
    if isinstance(settings.model, Served):
        keep_chat_template(prepared.local_except("train/"), settings.model, draft)
        return record_teacher(context, settings.model)
    if isinstance(settings.model, Pretrained):
        # With transformers: seconds to import, and not needed otherwise.
        from overproof.models.hf_directory import require_outputs

        context.progress(TaskProgress("train", 0, settings.steps, f"fetching {settings.model.path}"))
        start = pretrained.absolute_pretrained(settings.model)
        fetched = pretrained.fetch_pretrained(start.path, context.progress)
        require_tokenizer(fetched, prepared)
        if not settings.steps:
            require_outputs(fetched, Manifest.read(prepared))
        settings = settings.model_copy(update={"model": start})
    checkpoints = Checkpoints(draft.workspace, draft.fingerprint, draft.config, draft.parents, settings.checkpoint)
    checkpoints.claim_folder()
    spec = SupervisedSpec(settings.model, settings.lora, context.progress, settings.compile)
    job = TrainJob(
        settings, context.recipe.seed, prepared, draft, checkpoints, context.progress, spec, settings.scored_checkpoints
    )
    metrics: dict[str, Any]
    metrics, files = run_workers(job, train_rank)
    draft.hand_in(files)
    keep_chat_template(prepared.local_except("train/"), settings.model, draft)
    return metrics


def keep_chat_template(prepared: Path, start: ModelSection, draft: ArtifactWriter) -> None:
    """Copy the chat template that the data was written by, or else the starting model's: students are asked alike."""
    from overproof.data.chat_template_files import CHAT_TEMPLATE
    from overproof.models.hf_directory import chat_template

    template = chat_template(prepared)
    if template is None and isinstance(start, Pretrained):
        template = chat_template(pretrained.fetch_pretrained(start.path))
    if template is not None:
        draft.write(f"model/{CHAT_TEMPLATE}", template.encode())


def run_workers(job: TrainJob, work: Callable[[TrainJob], Any]) -> Any:
    """Have a group of workers each do ``work``, started again as the job says; gives what rank 0 returned.

    Raises:
        InputError: as a worker raised it, out of what Ray wrapped around it; or for what Ray killed a worker.
        RuntimeError: the workers failed ``max_failures`` times in a row, or Ray's controller died.
    """
    settings = job.train
    for name, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    most = format_count(settings.most, "worker")
    size = f"{settings.fewest} to {most}" if settings.fewest < settings.most else most
    committed = job.checkpoints.committed_step()
    job.progress(TaskProgress("train", committed, settings.steps, f"starting {size}"))
    if is_remote():
        start_data_stats_actor()
    try:
        # Ray's own files of the run; none is needed afterwards.
        with tempfile.TemporaryDirectory(prefix="overproof-train-") as scratch, preserve_handler(signal.SIGINT):
            return make_trainer(job, work, scratch).fit().return_value  # type: ignore[attr-defined]
    except RayActorError as error:
        raise RuntimeError(
            f"train: the controller of the run died: {describe_error([error])}; run again: training goes on from step "
            f"{job.checkpoints.committed_step()}"
        ) from error
    except ray.train.TrainingFailedError as error:
        causes = root_causes(error)
        for cause in causes:
            if isinstance(cause, InputError):
                raise cause from None
            if isinstance(cause, OutOfMemoryError):
                raise InputError(_out_of_memory(cause)) from None
        raise RuntimeError(
            f"train: {settings.max_failures} failures in a row without a new checkpoint after step "
            f"{job.checkpoints.committed_step()}; the last one: {describe_error(causes)}"
        ) from error


def make_trainer(job: TrainJob, work: Callable[[TrainJob], Any], scratch: str) -> PolicyTrainer:
    """Ray's trainer with the job's numbers of workers and its patience."""
    settings = job.train
    scaling = ScalingConfig(
        num_workers=(settings.fewest, settings.most),
        use_gpu=settings.gpus_per_worker > 0,
        resources_per_worker={"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker},
    )
    return PolicyTrainer(
        partial(work, job),  # Train V2 hands on what it returns
        RetryPolicy(job.checkpoints, settings.max_failures, job.progress),
        ElasticScaling(scaling, settings.worlds),
        torch_config=QuietTorchConfig(backend="nccl" if settings.gpus_per_worker else "gloo"),
        scaling_config=scaling,
        run_config=RunConfig(name="train", storage_path=scratch),
    )


def _out_of_memory(error: OutOfMemoryError) -> str:
    from overproof.train.engine import MEMORY_ADVICE

    reason = describe_error([error])
    return f"out of memory in a training worker: a node's memory was nearly full: {reason}; {MEMORY_ADVICE}"


def train_rank(job: TrainJob) -> tuple[dict[str, Any], dict[str, FileEntry]] | None:
    """Train as one rank from the newest checkpoint; rank 0 returns the stage's metrics, and the files of the artifact
    that all ranks wrote.
    """
    began_s = time.monotonic()
    resume, rank, world = join_group(job)
    rows = planned_rows(job, resume.step, rank, world)
    first_rows, first_batch_s = list(islice(rows, 1)), time.monotonic() - began_s
    from overproof.train.rank_trainer import RankTrainer  # seconds of imports

    trainer = RankTrainer(job, resume, rank, world)
    metrics = trainer.fit(chain(first_rows, rows), WorkerCheckpointSignal())
    return None if metrics is None else ({"first_batch_s": first_batch_s, **metrics}, job.draft.handed_in)


def join_group(job: TrainJob) -> tuple[ResumePoint, int, int]:
    """Where this group begins, as its ranks have found it; this worker's rank and the size of its world."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    attempt = None
    if rank == 0:
        attempt = ResumePoint().attempt
        steps = job.train.steps
        job.progress(
            TaskProgress("train", job.checkpoints.committed_step(), steps, f"{format_count(world, 'worker')} up")
        )
    attempt = broadcast_from_rank_zero(attempt)
    return ResumePoint(newest_sound_together(job.checkpoints, job.progress), attempt), rank, world


def planned_rows(job: TrainJob, first: int, rank: int, world: int) -> Iterator[Columns]:
    """This rank's rows of every step from ``first`` on; they must be the planned ones.

    The first ``OWN_STEPS`` are read here, and after the first of them Ray Data is started to bring the others, a stream
    of ``STREAM_STEPS`` at a time.
    """
    steps, batch_size = job.train.steps, job.train.batch_size
    shards = planned_shards(job.prepared)
    order = shards.manifest.order(job.seed)
    step, stop = first, min(steps, first + OWN_STEPS)
    tables = shards.steps(order, batch_size, step, stop, rank, world)
    while step < steps:
        next_tables: Future[Iterator[Columns]] = Future()
        for columns in tables:
            planned = order.step_rows(step, batch_size, rank, world)
            if not np.array_equal(columns["sample_id"], planned):
                raise RuntimeError(f"step {step}, rank {rank}: rows {columns['sample_id']}, {planned} were planned")
            yield columns
            if step == max(first, stop - STREAM_STEPS // 2) and stop < steps:
                stream = (job, order, stop, min(steps, stop + STREAM_STEPS), rank, world)
                threading.Thread(target=_open_stream, args=(next_tables, *stream), name="feed", daemon=True).start()
            step += 1
        if step < steps:
            tables, stop = next_tables.result(), min(steps, stop + STREAM_STEPS)


def _open_stream(opened: Future[Iterator[Columns]], *stream: Any) -> None:
    try:
        opened.set_result(_stream_rows(*stream))
    except BaseException as error:  # surfaces in the thread that trains
        opened.set_exception(error)


def _stream_rows(job: TrainJob, order: Order, first: int, last: int, rank: int, world: int) -> Iterator[Columns]:
    """A rank's rows of the steps ``[first, last)``; those of the first have arrived.

    Rank 0 opens the stream and hands out the parts. It belongs to rank 0's process and ends with it, so that no
    reader outlives its group of workers.
    """
    parts: list[DataIterator] | None = None
    if rank == 0:
        rows = planned_dataset(job.prepared, order, job.train.batch_size, first, last, world)
        rows.context.enable_progress_bars = False
        parts = list(rows.streaming_split(world, equal=True))
    feed = broadcast_from_rank_zero(parts)[rank]
    tables = iter(
        feed.iter_batches(
            batch_size=job.train.batch_size // world, batch_format="pyarrow", prefetch_batches=PREFETCHED_BATCHES
        )
    )
    return map(table_to_numpy, chain(list(islice(tables, 1)), tables))
