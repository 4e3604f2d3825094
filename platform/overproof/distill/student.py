"""One student in training, on one process and without Ray, a chunk of steps at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from overproof.data.manifest import TOKENIZER
from overproof.data.read import Shards, planned_shards
from overproof.distill.job import Job, rungs
from overproof.distill.losses import Distill
from overproof.distill.targets import Targets
from overproof.models import Batch, build, parameters, save, to_tensors
from overproof.train.engine import TorchEngine
from overproof.train.loop import Row, rows, shares, validation_ids, validation_loss
from overproof.train.objective import CrossEntropy, Objective


@dataclass(frozen=True)
class Chunk:
    """What came of some steps."""

    steps: int  # finished since the start
    validation_loss: float  # of the labels alone, nats: comparable between temperatures and weights
    curve: tuple[Row, ...]


class Run:
    """Trains a student on the rows of the planned order; every trial of a sweep reads the same ones."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.job, self.root = job, job.prepared.local()
        validation = Shards(self.root, "validation")
        self.manifest = validation.manifest
        self.train = planned_shards(self.root)
        self.order = self.manifest.order(job.seed)
        self.targets = Targets(job.cached.local()) if job.distilled else None
        ids = validation_ids(validation.rows, job.settings.validation_rows)
        parts = shares(ids, job.settings.batch_size, rank=0, world=1)
        self.validation = [to_tensors(validation.take(part)) for part in parts]
        self.model = build(job.student.model, self.manifest, job.seed)
        self.engine = TorchEngine(self.model, job.settings)
        self.rungs = frozenset(rungs(job.settings))
        self._rows = rows(self.engine, self._objective(), job.settings, self._batches(), self._validate)

    @property
    def parameters(self) -> int:
        return parameters(self.model)

    def advance(self) -> Chunk:
        """Train up to the next validation: every ``validate_every`` steps, at each rung, and after the last step.

        Raises:
            InputError: the loss is no longer finite.
        """
        settings, curve = self.job.settings, list[Row]()
        for row in self._rows:
            curve.append(row)
            step = int(row["step"])
            if step in self.rungs and step % settings.validate_every:  # the loop validates at all other stops
                curve.append({"step": step, "validation_loss": self._validate()})
            if "validation_loss" in curve[-1]:
                break
        return Chunk(int(curve[-1]["step"]), curve[-1]["validation_loss"], tuple(curve))

    def save(self) -> None:
        """Write a Hugging Face directory into the job's folder of the draft."""
        tokenizer = self.root / TOKENIZER if self.manifest.kind == "text" else None
        with self.job.draft.directory() as folder:
            save(self.engine.state_dict(), self.model.config, folder / self.job.folder, tokenizer)

    def _objective(self) -> Objective:
        if self.targets is None:
            return CrossEntropy()
        student, index = self.job.student, self.targets.index
        return Distill(
            student.temperature, student.teacher_weight, index.column(student.temperature), index.column(1.0)
        )

    def _batches(self) -> Iterator[Batch]:
        for columns in self.train.steps(self.order, self.job.settings.batch_size, 0, self.job.settings.steps):
            ids = columns.pop("sample_id")
            if self.targets is not None:
                columns |= {f"teacher_{name}": values for name, values in self.targets.take(ids).items()}
            yield to_tensors(columns)

    def _validate(self) -> float:
        with self.engine.evaluating() as model:
            return validation_loss(model, self.validation)
