"""The stages in which the teacher runs once for all trials: `generate` writes its text, `cache` its targets."""

from __future__ import annotations

from typing import Any

from overproof.config import Dense, Served
from overproof.data.manifest import Manifest
from overproof.data.parquet_writer import PAGE_BYTES
from overproof.data.tokenizer_match import require_tokenizer
from overproof.distill.endpoint_worker import EndpointJob, EndpointTargetWorker, EndpointTextWorker, EndpointWorker
from overproof.distill.row_cache import teacher_folder
from overproof.distill.target_cache import TargetIndex, TargetKey, target_key
from overproof.distill.teacher_pool import CaptureResult, capture
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
    index = TextIndex.of(text_key(context.recipe, prepared, trained), Manifest.read(prepared), settings.rows)
    tokens_per_row = index.identity.tokens
    job = CaptureJob(settings, index, prepared, trained, context.draft)
    done = _capture(context, job, (TextWorker, EndpointTextWorker), tokens_per_row, "tokens")
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
    key = target_key(recipe, prepared, trained, teacher_text)
    check_scheme(key)
    index = TargetIndex.of(key, Manifest.read(prepared), recipe.rows_cached)
    job = CaptureJob(recipe.cache, index, prepared, trained, context.draft, teacher_text)
    done = _capture(context, job, (TargetWorker, EndpointTargetWorker), key.positions, "positions")
    positions = index.rows * key.positions
    return {
        "rows": index.rows,
        "positions": positions,
        "bytes_per_position": done.size_bytes / positions,
        "teacher_seconds": done.seconds,
        "actors": done.actors,
    }


def _capture(
    context: StageContext, job: CaptureJob, workers: tuple[type[TeacherWorker], type[EndpointWorker]],
    units_per_row: int, unit: str,
) -> CaptureResult:  # fmt: skip
    """What the teacher computes: that of the train stage by the first of the workers, a served one by the second.

    Raises:
        InputError: as ``cache_targets``.
    """
    served, (here, elsewhere) = context.recipe.train.model, workers
    if not isinstance(served, Served):
        require_tokenizer(teacher_folder(job.trained), job.prepared)
        return capture(context, job, here, units_per_row, unit)
    open_teacher(served, job.trained.local(), job.prepared.local_except("train/")).close()
    asked = EndpointJob(**vars(job), served=served, progress=context.progress)
    return capture(context, asked, elsewhere, units_per_row, unit)


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
