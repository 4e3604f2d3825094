"""The cache stage: the teacher looks once at every row the sweep will read, in a Ray Data actor pool.

Shapes: B rows in a forward pass, P predictions in a row, V outputs, K kept for each prediction.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext
from transformers import PreTrainedModel

from overproof.artifact import Artifact, Draft
from overproof.data.manifest import MANIFEST, Manifest
from overproof.data.plan import Order
from overproof.data.read import Columns, Shards
from overproof.data.write import to_table
from overproof.distill.losses import top_k
from overproof.distill.targets import INDEX, TEACHER, CacheFile, CacheIndex, schema
from overproof.errors import InputError
from overproof.files import FileEntry, file_sha256, filesystem, join, unlike, write_at_once
from overproof.models import check_tokenizer, forward, load, to_tensors
from overproof.progress import NOTICE
from overproof.recipe import Cache
from overproof.stage import Context
from overproof.train.checkpoint import seal, unseal
from overproof.train.engine import default_device

ZSTD_LEVEL = 1


@dataclass(frozen=True)
class Job:
    """What every teacher replica is given."""

    settings: Cache
    index: CacheIndex
    prepared: Artifact
    trained: Artifact
    draft: Draft

    @property
    def uri(self) -> str:
        """Where finished files wait for the others: what a killed attempt has captured is not captured again."""
        return join(self.draft.workspace, self.draft.fingerprint)


def cache(context: Context) -> dict[str, Any]:
    """Write one Parquet file of targets for each train shard, and cache.json.

    Files that an attempt which was killed has finished are taken from the draft's workspace.

    Raises:
        InputError: the teacher's tokenizer or outputs are not those of the data, or k is larger than the outputs.
    """
    settings, prepared, trained = context.recipe.cache, context.parents["prepare"], context.parents["train"]
    root = prepared.local()
    manifest = Manifest.read(root)
    check_tokenizer(trained.local() / "model", manifest)
    if settings.k > manifest.outputs:
        raise InputError(f"cache.k: found {settings.k}; the data has {manifest.outputs} outputs: expected at most that")
    order = manifest.order(context.recipe.seed)
    files = cover(manifest, order, settings.rows)
    index = CacheIndex(
        k=settings.k,
        temperatures=tuple(sorted({1.0, *settings.temperatures})),
        outputs=manifest.outputs,
        positions=manifest.positions,
        rows=sum(len(file.groups) for file in files) * manifest.rows_per_group,
        rows_per_group=manifest.rows_per_group,
        files=files,
        teacher_sha256=trained.record.files[TEACHER].sha256,
        tokenizer_sha256=manifest.tokenizer_sha256,
        manifest_sha256=prepared.record.files[MANIFEST].sha256,
    )
    job = Job(settings, index, prepared, trained, context.draft)
    before = finished(job)
    todo = [number for number, file in enumerate(files) if file.path not in before]
    actors = min(settings.actors, len(todo))
    seconds, size = (sum(part[name] for part in before.values()) for name in ("seconds", "size_bytes"))
    done = sum(len(file.groups) for file in files if file.path in before) * manifest.rows_per_group
    if before:
        context.progress(NOTICE, done, index.rows, f"{len(before)} of {len(files)} files were captured before")
    context.progress("cache", done, index.rows, f"starting {actors} teachers")
    for part in _capture(job, todo, actors) if todo else ():
        done, seconds, size = done + part["rows"], seconds + part["seconds"], size + part["size_bytes"]
        context.progress(
            "cache", done, index.rows, f"{done * index.positions / max(seconds, 1e-9) * actors:,.0f} positions/s"
        )
    publish(job)
    positions = index.rows * index.positions
    return {
        "rows": index.rows,
        "positions": positions,
        "bytes_per_position": size / positions,
        "teacher_seconds": seconds,
        "actors": actors,
    }


def cover(manifest: Manifest, order: Order, rows: int | None) -> tuple[CacheFile, ...]:
    """The row groups that the first ``rows`` rows of the order touch, by train shard; a shard without any is out."""
    wanted = order.rows_at(0, order.rows if rows is None else min(rows, order.rows))
    groups = np.unique(wanted // order.rows_per_group)
    files, first = [], 0
    for number, shard in enumerate(manifest.splits["train"].shards):
        last = first + shard.rows // order.rows_per_group
        here = groups[(first <= groups) & (groups < last)]
        if len(here):
            files.append(CacheFile(path=f"{number:05d}.parquet", groups=tuple(here.tolist())))
        first = last
    return tuple(files)


def finished(job: Job) -> dict[str, dict[str, Any]]:
    """The files in the workspace that are all there, by name, with the seconds and bytes they took; each is hashed."""
    store, root = filesystem(job.uri)
    found = {}
    for file in job.index.files:
        sealed = unseal(store, f"{root}/{file.path}.json")
        if not isinstance(sealed, str) and not any(unlike(store, root, {file.path: FileEntry(**sealed["entry"])})):
            found[file.path] = {"seconds": sealed["seconds"], "size_bytes": sealed["entry"]["size_bytes"]}
    return found


def publish(job: Job) -> None:
    """Move every file into the draft, and write the index."""
    store, path = filesystem(job.draft.uri)
    waiting = filesystem(job.uri)[1]
    for file in job.index.files:
        store.move(f"{waiting}/{file.path}", f"{path}/{file.path}")
    with store.open_output_stream(f"{path}/{INDEX}") as stream:
        stream.write(job.index.model_dump_json(indent=1).encode())


def _capture(job: Job, todo: list[int], actors: int) -> Iterator[dict[str, Any]]:
    """Run the pool over the files with these numbers; yields what each forward pass and each file reports meanwhile."""
    with _streaming():
        items = [{"file": number} for number in todo]
        reports = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Teacher,
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


class Teacher:
    """One replica: reads train rows, runs the model, writes whole files."""

    def __init__(self, job: Job) -> None:
        self.job, index = job, job.index
        self.columns = schema(index.positions, index.k, len(index.temperatures), index.outputs)
        self.numbers = {f.name: f.type.value_type.to_pandas_dtype() for f in self.columns if f.name != "sample_id"}
        torch.set_num_threads(max(1, int(job.settings.cpus_per_actor)))
        self.device = default_device()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        """Write the files with these numbers; a file is complete or absent. Bad input is reported, not raised."""
        try:
            for number in batch["file"]:
                yield from self._write(self.job.index.files[int(number)])
        except InputError as error:
            yield _report(fault=str(error))

    @cached_property
    def rows(self) -> Shards:
        return Shards(self.job.prepared.local(), "train")

    @cached_property
    def model(self) -> PreTrainedModel:
        folder = self.job.trained.local() / "model"
        check_tokenizer(folder, self.rows.manifest)
        return load(folder).to(self.device)

    def _write(self, file: CacheFile) -> Iterator[dict[str, NDArray[Any]]]:
        index = self.job.index
        store, root = filesystem(self.job.uri)
        store.create_dir(root, recursive=True)
        path, in_all = f"{root}/{file.path}", 0.0
        groups = np.asarray(file.groups, np.int64)
        ids = (groups[:, None] * index.rows_per_group + np.arange(index.rows_per_group)).ravel()
        # As many whole row groups at a time as fit a forward pass, and at least one.
        rows = max(1, self.job.settings.batch_size // index.rows_per_group) * index.rows_per_group
        with (
            store.open_output_stream(f"{path}.part") as stream,
            pq.ParquetWriter(
                stream, self.columns, compression="zstd", compression_level=ZSTD_LEVEL, use_dictionary=False,
                use_byte_stream_split=True,
            ) as writer,
        ):  # fmt: skip
            for start in range(0, len(ids), rows):
                here = ids[start : start + rows]
                began = time.perf_counter()
                found = self._targets(here)
                seconds = time.perf_counter() - began
                in_all += seconds
                table = to_table({"sample_id": here, **found}, self.columns)
                writer.write_table(table, row_group_size=index.rows_per_group)
                yield _report(rows=len(here), seconds=seconds)
        store.move(f"{path}.part", path)
        entry = FileEntry(sha256=file_sha256(path, store), size_bytes=store.get_file_info(path).size)
        write_at_once(store, f"{path}.json", seal({"entry": entry.model_dump(), "seconds": in_all}))
        yield _report(size_bytes=entry.size_bytes)

    def _targets(self, sample_ids: NDArray[np.int64]) -> Columns:
        size = self.job.settings.batch_size
        parts = [self._forward(sample_ids[start : start + size]) for start in range(0, len(sample_ids), size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @torch.inference_mode()
    def _forward(self, sample_ids: NDArray[np.int64]) -> Columns:
        index = self.job.index
        batch = {name: value.to(self.device) for name, value in to_tensors(self.rows.take(sample_ids)).items()}
        logits_BPV = forward(self.model, batch).logits_BPV
        if logits_BPV.shape[-1] != index.outputs:
            raise InputError(f"the teacher has {logits_BPV.shape[-1]} outputs; expected the data's {index.outputs}")
        found = top_k(logits_BPV, index.k, index.temperatures)
        return {name: value.cpu().numpy().astype(self.numbers[name]) for name, value in found.items()}


def _report(rows: int = 0, seconds: float = 0.0, size_bytes: int = 0, fault: str = "") -> dict[str, NDArray[Any]]:
    values = {"rows": rows, "seconds": seconds, "size_bytes": size_bytes, "fault": fault}
    return {name: np.array([value]) for name, value in values.items()}
