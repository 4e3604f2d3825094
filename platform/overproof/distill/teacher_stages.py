"""The stages in which the teacher runs once for all trials: `generate` writes its text, `cache` its targets."""

from __future__ import annotations

from typing import Any

from overproof.config import Dense, Served
from overproof.data.manifest import Manifest
from overproof.data.parquet_writer import PAGE_BYTES
from overproof.data.tokenizer_match import require_tokenizer
from overproof.distill.endpoint_worker import EndpointJob, EndpointWorker
from overproof.distill.row_cache import teacher_folder
from overproof.distill.target_cache import TargetIndex, TargetKey, target_key
from overproof.distill.teacher_pool import capture
from overproof.distill.teacher_text import TextIndex, generate_settings, text_key
from overproof.distill.teacher_worker import CaptureJob, TargetWorker, TeacherWorker
from overproof.distill.text_worker import TextWorker
from overproof.engines.served_teacher import open_teacher
from overproof.errors import InputError
from overproof.stage_context import StageContext
from overproof.units import format_bytes


def generate_text(context: StageContext) -> dict[str, Any]:
    """Write one Parquet file of the teacher's text for each train shard, and text.json.

    Raises:
        InputError: the teacher's tokenizer or outputs are not those of the data.
    """
    settings = generate_settings(context.recipe)
    prepared, trained = context.parents["prepare"], context.parents["train"]
    manifest = Manifest.read(prepared)
    require_tokenizer(teacher_folder(trained), prepared)
    index = TextIndex.of(text_key(context.recipe, prepared, trained), manifest, settings.rows)
    tokens_per_row = index.identity.tokens
    job = CaptureJob(settings, index, prepared, trained, context.draft)
    done = capture(context, job, TextWorker, tokens_per_row, "tokens")
    return {
        "rows": index.rows,
        "tokens": index.rows * tokens_per_row,
        "teacher_seconds": done.seconds,
        "actors": done.actors,
    }


def cache_targets(context: StageContext) -> dict[str, Any]:
    """Write one Parquet file of targets for each train shard, and cache.json.

    Where there is text of the teacher, it takes the place of the rows.

    Raises:
        InputError: the teacher's tokenizer or outputs are not those of the data, or the scheme does not fit them.
    """
    recipe, prepared, trained = context.recipe, context.parents["prepare"], context.parents["train"]
    teacher_text = context.parents.get("generate")
    manifest, served = Manifest.read(prepared), recipe.train.model
    if isinstance(served, Served):
        open_teacher(served, trained.local(), prepared.local_except("train/")).close()
    else:
        require_tokenizer(teacher_folder(trained), prepared)
    key = target_key(recipe, prepared, trained, teacher_text)
    check_scheme(key)
    index = TargetIndex.of(key, manifest, recipe.rows_cached)
    job = CaptureJob(recipe.cache, index, prepared, trained, context.draft, teacher_text)
    worker: type[TeacherWorker] = TargetWorker
    if isinstance(served, Served):
        job, worker = EndpointJob(**vars(job), served=served, progress=context.progress), EndpointWorker
    done = capture(context, job, worker, key.positions, "positions")
    positions = index.rows * key.positions
    return {
        "rows": index.rows,
        "positions": positions,
        "bytes_per_position": done.size_bytes / positions,
        "teacher_seconds": done.seconds,
        "actors": done.actors,
    }


def check_scheme(cache: TargetKey) -> None:
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
            f"cache.scheme: {scheme.description} of {cache.rows_per_group} rows of {cache.positions} positions take "
            f"{format_bytes(page)}; expected at most {format_bytes(PAGE_BYTES)}: keep fewer, or lower "
            "data.rows_per_group"
        )
