"""A teacher that computes columns of train rows and writes them as whole files. Knows nothing of Ray.

`TargetWorker` writes the files of the cache; `text_worker.TextWorker` those of the teacher's text.

Shapes: B rows in a forward pass, P predictions in a row, V outputs, K slots for each prediction.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from overproof.artifacts import Artifact, ArtifactWriter
from overproof.config import Cache, Generate, Sampled
from overproof.data.order import uniforms
from overproof.data.parquet_reader import Columns, Shards
from overproof.data.parquet_writer import open_writer, to_table
from overproof.data.tokenizer_match import require_tokenizer
from overproof.distill.row_cache import CachedFile, CacheIndex, teacher_folder
from overproof.distill.target_cache import TargetIndex
from overproof.distill.target_encoder import DRAW_KEY, encode_targets
from overproof.distill.teacher_text import TeacherText
from overproof.errors import InputError
from overproof.files import atomic_write, filesystem, whole_file
from overproof.models.compute import Compute, start_compute
from overproof.models.hf_directory import load_model, to_tensors
from overproof.registry import TASKS
from overproof.train.checkpoint import with_checksum


@dataclass(frozen=True)
class CaptureJob:
    """What every worker of a capture is given."""

    settings: Cache | Generate
    index: CacheIndex[Any]
    prepared: Artifact
    trained: Artifact
    draft: ArtifactWriter
    teacher_text: Artifact | None = None  # what the teacher reads in place of the rows


class TeacherWorker:
    """Reads train rows, runs the model, writes whole files."""

    def __init__(self, job: CaptureJob) -> None:
        self.job, self.index = job, job.index
        torch.set_num_threads(max(1, int(job.settings.cpus_per_actor)))

    def compute(self, sample_ids: NDArray[np.int64]) -> Columns:
        """The columns of a file for these rows, ``settings.batch_size`` at most."""
        raise NotImplementedError

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        """Write the files with these numbers; a file is complete or absent. Bad input is reported, not raised."""
        try:
            for number in batch["file"]:
                yield from self._write(self.index.files[int(number)])
        except InputError as error:
            yield _report(fault=str(error))

    @cached_property
    def rows(self) -> Shards:
        return Shards(self.job.prepared, "train")

    @cached_property
    def text(self) -> TeacherText | None:
        return TeacherText(self.job.teacher_text) if self.job.teacher_text else None

    def take(self, sample_ids: NDArray[np.int64]) -> Columns:
        """Rows as the teacher reads them: with its own text where it wrote some."""
        rows = self.rows.take(sample_ids)
        return rows if self.text is None else rows | self.text.take(sample_ids)

    @cached_property
    def model(self) -> PreTrainedModel:
        folder = teacher_folder(self.job.trained)
        require_tokenizer(folder, self.job.prepared)
        return self.where.place(load_model(folder))

    @cached_property
    def where(self) -> Compute:
        return start_compute(self.job.settings.gpus_per_actor, self.job.settings.precision)

    def check_outputs(self, outputs: int) -> None:
        """Refuse a teacher of other data.

        Raises:
            InputError: it has another number of outputs.
        """
        if outputs != self.index.identity.outputs:
            raise InputError(f"the teacher has {outputs} outputs; expected the data's {self.index.identity.outputs}")

    def _write(self, file: CachedFile) -> Iterator[dict[str, NDArray[Any]]]:
        rows_per_group, schema = self.index.identity.rows_per_group, self.index.identity.schema
        store, root = filesystem(self.job.draft.uri)
        path, marks, total_s = f"{root}/{file.path}", filesystem(self.job.draft.marks)[1], 0.0
        store.create_dir(marks, recursive=True)
        groups = np.asarray(file.groups, np.int64)
        ids = (groups[:, None] * rows_per_group + np.arange(rows_per_group)).ravel()
        # As many whole row groups at a time as fit a forward pass, and at least one.
        rows = max(1, self.job.settings.batch_size // rows_per_group) * rows_per_group
        with whole_file(store, path) as stream, open_writer(stream, schema, rows_per_group) as writer:
            for start in range(0, len(ids), rows):
                batch_ids = ids[start : start + rows]
                began = time.perf_counter()
                columns = self._compute_batched(batch_ids)
                seconds = time.perf_counter() - began
                total_s += seconds
                writer.write_table(to_table(columns, schema), row_group_size=rows_per_group)
                yield _report(rows=len(batch_ids), seconds=seconds)
        entry = stream.entry()
        atomic_write(
            store, f"{marks}/{file.path}.json", with_checksum({"entry": entry.model_dump(), "seconds": total_s})
        )
        yield _report(path=file.path, **entry.model_dump())

    def _compute_batched(self, sample_ids: NDArray[np.int64]) -> Columns:
        size = self.job.settings.batch_size
        parts = [self.compute(sample_ids[start : start + size]) for start in range(0, len(sample_ids), size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class TargetWorker(TeacherWorker):
    """Computes the teacher's targets, as the cache keeps them."""

    index: TargetIndex

    @torch.inference_mode()
    def compute(self, sample_ids: NDArray[np.int64]) -> Columns:
        cache, rows = self.index.identity, self.take(sample_ids)
        device = self.where.device
        batch = {name: value.to(device) for name, value in to_tensors(rows).items()}
        prediction = TASKS[cache.task].predict(self.model, batch)
        self.check_outputs(prediction.logits_BPV.shape[-1])
        uniform_BP = None
        if isinstance(cache.scheme, Sampled):
            uniform_BP = torch.from_numpy(uniforms(cache.seed, DRAW_KEY, sample_ids, cache.positions)).to(device)
        targets = encode_targets(
            prediction.logits_BPV, prediction.targets_BP, cache.scheme, cache.temperatures, uniform_BP
        )
        found = {name: value.cpu().numpy() for name, value in targets.items()}
        if np.isnan(found["label_logprob"]).any():
            raise InputError(f"the teacher's outputs for row {sample_ids[0]} and after are not finite; train it again")
        inputs = {cache.layout.label_column: rows[cache.layout.label_column]}
        mask = (prediction.mask_BP > 0).cpu().numpy()
        return cache.layout.encode({"sample_id": sample_ids, **inputs, "mask": mask, **found})


def _report(
    rows: int = 0, seconds: float = 0.0, path: str = "", sha256: str = "", size_bytes: int = 0, fault: str = ""
) -> dict[str, NDArray[Any]]:
    """Of rows that are computed, or of a file that is written, or what is wrong."""
    values = {
        "rows": rows, "seconds": seconds, "path": path, "sha256": sha256, "size_bytes": size_bytes, "fault": fault,
    }  # fmt: skip
    return {name: np.array([value]) for name, value in values.items()}
