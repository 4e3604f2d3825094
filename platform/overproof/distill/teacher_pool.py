"""Teachers in a Ray Data actor pool, which write one file for each train shard: the cache, or text of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, DataContext

from overproof.distill.teacher_worker import CaptureJob, TeacherWorker
from overproof.errors import InputError
from overproof.files import FileEntry, filesystem, mismatched_files
from overproof.stage_context import Notice, StageContext, TaskProgress
from overproof.train.checkpoint import Damage, read_checksummed


@dataclass(frozen=True)
class CaptureResult:
    """What came of it, in all attempts."""

    seconds: float  # of the teachers
    size_bytes: int
    actors: int  # of the last attempt


def capture(
    context: StageContext, job: CaptureJob, replica: type[TeacherWorker], each: int, unit: str
) -> CaptureResult:
    """Write the files of the job's index, and the index. ``each`` is how many ``unit`` the teacher does for a row.

    Files that an attempt which was killed has finished are taken from the draft's workspace.

    Raises:
        InputError: what a teacher could not do.
    """
    index, before = job.index, finished_files(job)
    task, rows_per_group = index.STAGE, index.identity.rows_per_group
    todo = [number for number, file in enumerate(index.files) if file.path not in before]
    actors = min(job.settings.actors, len(todo))
    seconds, size = (sum(part[name] for part in before.values()) for name in ("seconds", "size_bytes"))
    done = sum(len(file.groups) for file in index.files if file.path in before) * rows_per_group
    if before:
        context.progress(Notice(f"{len(before)} of {len(index.files)} files were captured before"))
    context.progress(TaskProgress(task, done, index.rows, f"starting {actors} teachers"))
    for part in _reports(job, replica, todo, actors) if todo else ():
        done, seconds, size = done + part["rows"], seconds + part["seconds"], size + part["size_bytes"]
        rate = done * each / max(seconds, 1e-9) * actors
        context.progress(TaskProgress(task, done, index.rows, f"{rate:,.0f} {unit}/s"))
    publish_files(job)
    return CaptureResult(seconds, size, actors)


def finished_files(job: CaptureJob) -> dict[str, dict[str, Any]]:
    """The files in the workspace that are all there, by name, with the seconds and bytes they took; each is hashed."""
    store, root = filesystem(job.uri)
    found = {}
    for file in job.index.files:
        sealed = read_checksummed(store, f"{root}/{file.path}.json")
        if not isinstance(sealed, Damage) and not any(
            mismatched_files(store, root, {file.path: FileEntry(**sealed["entry"])})
        ):
            found[file.path] = {"seconds": sealed["seconds"], "size_bytes": sealed["entry"]["size_bytes"]}
    return found


def publish_files(job: CaptureJob) -> None:
    """Move every file into the draft, and write the index."""
    store, path = filesystem(job.draft.uri)
    waiting = filesystem(job.uri)[1]
    for file in job.index.files:
        store.move(f"{waiting}/{file.path}", f"{path}/{file.path}")
    with store.open_output_stream(f"{path}/{job.index.FILE}") as stream:
        stream.write(job.index.model_dump_json(indent=1).encode())


def _reports(job: CaptureJob, replica: type[TeacherWorker], todo: list[int], actors: int) -> Iterator[dict[str, Any]]:
    """Run the pool over the files with these numbers; yields what each part and each file reports meanwhile."""
    with _streaming():
        items = [{"file": number} for number in todo]
        reports = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            replica,
            batch_size=1,
            compute=ActorPoolStrategy(size=actors),
            fn_constructor_args=(job,),
            num_cpus=job.settings.cpus_per_actor,
            num_gpus=job.settings.gpus_per_actor,
        )
        for report in reports.iter_rows():
            if report["fault"]:
                raise InputError(report["fault"])
            yield report


@contextmanager
def _streaming() -> Iterator[None]:
    """Every report leaves its actor at once, and Ray Data draws and logs nothing of its own."""
    settings, logger = DataContext.get_current().copy(), logging.getLogger("ray.data")
    settings.enable_progress_bars = False
    settings.print_on_execution_start = False
    settings.target_max_block_size = 1  # bytes
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with DataContext.current(settings):
            yield
    finally:
        logger.setLevel(level)
