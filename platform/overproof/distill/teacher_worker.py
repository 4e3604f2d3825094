"""A replica of the teacher: what it makes of train rows, written as whole files. Knows nothing of Ray.

`Teacher` writes what it sees of the rows, the files of the cache; `writer.Writer` goes on from their beginnings.

Shapes: B rows in a forward pass, P predictions in a row, V outputs, K slots for each prediction.
"""

from __future__ import annotations

import secrets
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
from overproof.distill.row_cache import CachedFile, CacheIndex
from overproof.distill.target_cache import TargetIndex
from overproof.distill.target_encoder import DRAW_KEY, encode_targets
from overproof.distill.teacher_text import TeacherText
from overproof.errors import InputError
from overproof.files import FileEntry, atomic_write, file_sha256, filesystem, join_uri
from overproof.models.hf_directory import check_tokenizer, load_model, to_tensors
from overproof.registry import TASKS
from overproof.train.checkpoint import with_checksum
from overproof.train.engine import default_device


@dataclass(frozen=True)
class CaptureJob:
    """What every teacher replica is given."""

    settings: Cache | Generate
    index: CacheIndex[Any]
    prepared: Artifact
    trained: Artifact
    draft: ArtifactWriter
    written: Artifact | None = None  # what the teacher reads in place of the rows

    @property
    def uri(self) -> str:
        """Where finished files wait for the others: what a killed attempt has captured is not captured again."""
        return join_uri(self.draft.workspace, self.draft.fingerprint)


class TeacherWorker:
    """Reads train rows, runs the model, writes whole files."""

    def __init__(self, job: CaptureJob) -> None:
        self.job, self.index = job, job.index
        torch.set_num_threads(max(1, int(job.settings.cpus_per_actor)))
        self.device = default_device()

    def made(self, sample_ids: NDArray[np.int64]) -> Columns:
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
        return Shards(self.job.prepared.local(), "train")

    @cached_property
    def model(self) -> PreTrainedModel:
        folder = self.job.trained.local() / "model"
        check_tokenizer(folder, self.rows.manifest)
        return load_model(folder).to(self.device)

    def check_outputs(self, outputs: int) -> None:
        """Refuse a teacher of other data.

        Raises:
            InputError: it has another number of outputs.
        """
        if outputs != self.index.identity.outputs:
            raise InputError(f"the teacher has {outputs} outputs; expected the data's {self.index.identity.outputs}")

    def _write(self, file: CachedFile) -> Iterator[dict[str, NDArray[Any]]]:
        rows_per_group, columns = self.index.identity.rows_per_group, self.index.identity.schema
        store, root = filesystem(self.job.uri)
        store.create_dir(root, recursive=True)
        path, in_all = f"{root}/{file.path}", 0.0
        part = f"{path}.{secrets.token_hex(4)}.part"  # nobody else's: another job may capture the same file
        groups = np.asarray(file.groups, np.int64)
        ids = (groups[:, None] * rows_per_group + np.arange(rows_per_group)).ravel()
        # As many whole row groups at a time as fit a forward pass, and at least one.
        rows = max(1, self.job.settings.batch_size // rows_per_group) * rows_per_group
        with store.open_output_stream(part) as stream, open_writer(stream, columns, rows_per_group) as writer:
            for start in range(0, len(ids), rows):
                here = ids[start : start + rows]
                began = time.perf_counter()
                found = self._made(here)
                seconds = time.perf_counter() - began
                in_all += seconds
                writer.write_table(to_table(found, columns), row_group_size=rows_per_group)
                yield _report(rows=len(here), seconds=seconds)
        entry = FileEntry(sha256=file_sha256(part, store), size_bytes=store.get_file_info(part).size)
        store.move(part, path)
        atomic_write(store, f"{path}.json", with_checksum({"entry": entry.model_dump(), "seconds": in_all}))
        yield _report(size_bytes=entry.size_bytes)

    def _made(self, sample_ids: NDArray[np.int64]) -> Columns:
        size = self.job.settings.batch_size
        parts = [self.made(sample_ids[start : start + size]) for start in range(0, len(sample_ids), size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class TargetWorker(TeacherWorker):
    """What it sees of the rows, as the cache keeps it."""

    index: TargetIndex

    @cached_property
    def text(self) -> TeacherText | None:
        return TeacherText(self.job.written.local()) if self.job.written else None

    @torch.inference_mode()
    def made(self, sample_ids: NDArray[np.int64]) -> Columns:
        cache, rows = self.index.identity, self.rows.take(sample_ids)
        if self.text is not None:
            rows |= self.text.take(sample_ids)
        predict = TASKS[cache.task].predict
        prediction = predict(self.model, {name: value.to(self.device) for name, value in to_tensors(rows).items()})
        self.check_outputs(prediction.logits_BPV.shape[-1])
        uniform_BP = None
        if isinstance(cache.scheme, Sampled):
            uniform_BP = torch.from_numpy(uniforms(cache.seed, DRAW_KEY, sample_ids, cache.positions)).to(self.device)
        kept = encode_targets(
            prediction.logits_BPV, prediction.targets_BP, cache.scheme, cache.temperatures, uniform_BP
        )
        found = {name: value.cpu().numpy() for name, value in kept.items()}
        if np.isnan(found["label_logprob"]).any():
            raise InputError(f"the teacher's outputs for row {sample_ids[0]} and after are not finite; train it anew")
        own = {cache.layout.label_column: rows[cache.layout.label_column]}
        mask = prediction.mask_BP.cpu().numpy()
        return cache.layout.encode({"sample_id": sample_ids, **own, "mask": mask, **found})


def _report(rows: int = 0, seconds: float = 0.0, size_bytes: int = 0, fault: str = "") -> dict[str, NDArray[Any]]:
    values = {"rows": rows, "seconds": seconds, "size_bytes": size_bytes, "fault": fault}
    return {name: np.array([value]) for name, value in values.items()}
