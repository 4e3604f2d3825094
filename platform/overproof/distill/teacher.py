"""The cache stage: the teacher looks once at every row the sweep will read, in a Ray Data actor pool.

See `replica` for what each actor does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from overproof.data.manifest import Manifest
from overproof.data.plan import Order
from overproof.data.write import PAGE_BYTES
from overproof.distill.replica import Job, Teacher
from overproof.distill.targets import INDEX, CacheFile, CacheIndex, Identity, identity
from overproof.errors import InputError
from overproof.files import FileEntry, filesystem, unlike
from overproof.models import check_tokenizer
from overproof.progress import NOTICE
from overproof.recipe import Dense
from overproof.stage import Context
from overproof.train.checkpoint import unseal
from overproof.units import size


def cache(context: Context) -> dict[str, Any]:
    """Write one Parquet file of targets for each train shard, and cache.json.

    Files that an attempt which was killed has finished are taken from the draft's workspace.

    Raises:
        InputError: the teacher's tokenizer or outputs are not those of the data, or the scheme does not fit them.
    """
    settings, prepared, trained = context.recipe.cache, context.parents["prepare"], context.parents["train"]
    manifest = Manifest.read(prepared.local())
    check_tokenizer(trained.local() / "model", manifest)
    whole = identity(context.recipe, prepared, trained)
    check_fits(whole)
    files = cover(manifest, manifest.order(context.recipe.seed), settings.rows)
    rows = sum(len(file.groups) for file in files) * manifest.rows_per_group
    index = CacheIndex(identity=whole, rows=rows, files=files)
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
            "cache", done, index.rows, f"{done * whole.positions / max(seconds, 1e-9) * actors:,.0f} positions/s"
        )
    publish(job)
    positions = index.rows * whole.positions
    return {
        "rows": index.rows,
        "positions": positions,
        "bytes_per_position": size / positions,
        "teacher_seconds": seconds,
        "actors": actors,
    }


def check_fits(cache: Identity) -> None:
    """Refuse a scheme that cannot be written.

    Raises:
        InputError: it keeps more than there are outputs, or than one page of Parquet holds.
    """
    scheme, layout = cache.scheme, cache.layout
    if not isinstance(scheme, Dense) and scheme.k > cache.outputs:
        raise InputError(
            f"cache.scheme.k: found {scheme.k}; the data has {cache.outputs} outputs: expected at most that"
        )
    page = max(layout.column_bytes.values()) * cache.rows_per_group
    if page > PAGE_BYTES:
        raise InputError(
            f"cache.scheme: {scheme.words} of {cache.rows_per_group} rows of {cache.positions} positions take "
            f"{size(page)}; expected at most {size(PAGE_BYTES)}: keep fewer, or lower data.rows_per_group"
        )


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
