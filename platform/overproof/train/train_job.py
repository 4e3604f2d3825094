"""One training as its workers are given it: the job, the checkpoint it goes on from, and what it learns."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from overproof.artifacts import Artifact, ArtifactWriter
from overproof.config import Lora, ModelSection, OfTeacher, Pretrained, Training
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Columns
from overproof.models import pretrained
from overproof.models.base import BaseFamily
from overproof.models.sizes import directory_config, family_of
from overproof.stage_context import Progress, no_progress
from overproof.train.checkpoint import Checkpoint, Checkpoints

if TYPE_CHECKING:  # seconds of imports, which a worker spends after it has asked for its first rows
    import torch
    from transformers import PreTrainedModel

    from overproof.tasks.base import Task
    from overproof.train.objective import Objective


Sharding = Literal["drawn", "read"]  # weights: drawn at random, or out of a directory


@dataclass(frozen=True)
class TrainJob:
    """One training: its settings, its data, what it learns, where it writes. Picklable."""

    train: Training
    seed: int
    prepared: Artifact
    draft: ArtifactWriter
    checkpoints: Checkpoints
    progress: Progress
    spec: TrainSpec
    extra_validation_steps: frozenset[int] = frozenset()  # beside those of ``train``


@dataclass(frozen=True)
class ResumePoint:
    """Where one attempt at a training begins; every restart of the workers is a new attempt."""

    checkpoint: Checkpoint | None = None
    attempt: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.checkpoint.step if self.checkpoint else 0


class TrainSpec(Protocol):
    """What a training learns. Picklable; its methods are called in a worker, on every rank alike."""

    def model(self, manifest: Manifest, seed: int) -> PreTrainedModel:
        """The model with its weights from before the first step."""

    @property
    def sharding(self) -> Sharding | None:
        """How ``model`` comes to be where ZeRO-3 shards it at construction; None if it must be made whole."""

    def objective(self, task: Task, device: torch.device) -> Objective:
        """What is minimised."""

    def columns(self, sample_ids: NDArray[np.int64]) -> Columns:
        """What the objective reads of these rows of the train split beside the data's own columns."""


def sharding_of(start: ModelSection) -> Sharding | None:
    """Of a model that starts so. A directory that is fitted to the data's classes is changed as a whole, and layers are
    taken from a whole teacher.
    """
    if isinstance(start, OfTeacher):
        return None
    if not isinstance(start, Pretrained):
        return "drawn"
    _, family = family_of(directory_config(start.path), start.path)
    return None if isinstance(family, BaseFamily) else "read"


@dataclass(frozen=True)
class SupervisedSpec:
    """The labels alone."""

    start: ModelSection
    lora: Lora | None = None  # adapters beside its weights, which alone learn
    progress: Progress = no_progress
    compiled: bool = False  # whether the model runs through torch.compile

    def model(self, manifest: Manifest, seed: int) -> PreTrainedModel:
        from overproof.models.hf_directory import build_model, load_start

        if not isinstance(self.start, Pretrained):
            return build_model(self.start, manifest, seed)
        model = load_start(pretrained.fetch_pretrained(self.start.path, self.progress), manifest, seed)
        if self.lora is not None:
            from overproof.models.adapters import add_adapters

            add_adapters(model, self.lora, seed)
        return model

    @property
    def sharding(self) -> Sharding | None:
        return sharding_of(self.start)

    def objective(self, task: Task, device: torch.device) -> Objective:
        from overproof.train.objective import CrossEntropy

        del device
        return CrossEntropy(task.predict, task.counted, self.compiled)

    def columns(self, sample_ids: NDArray[np.int64]) -> Columns:
        del sample_ids
        return {}
