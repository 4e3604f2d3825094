"""What a student learns: from its teacher or, as a control, from the labels alone. For one process and for groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from overproof.artifacts import Artifact
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Columns
from overproof.distill.losses import Divergence
from overproof.distill.objectives import DistillObjective, LiveTeacherObjective, OnPolicyObjective
from overproof.distill.row_cache import TEACHER_WEIGHTS
from overproof.distill.student_init import initial_student
from overproof.distill.student_validation import check_student
from overproof.distill.target_cache import TargetCache
from overproof.distill.teacher_text import TeacherText
from overproof.distill.trial_job import TrialJob
from overproof.models.hf_directory import load_model
from overproof.train.objective import CrossEntropy, Objective


@dataclass(frozen=True)
class DistillSpec:
    """A ``TrainSpec``."""

    job: TrialJob

    def model(self, manifest: Manifest, seed: int) -> PreTrainedModel:
        """The student with its weights from before the first step; its control starts from the same.

        Raises:
            InputError: it cannot start from what its settings name.
        """
        check_student(self.job.student, self.job.prepared, self.job.trained)
        return initial_student(self.job.student.model, manifest, seed, self._folder)

    def objective(self, device: torch.device, projection: nn.Linear | None = None) -> Objective:
        """``projection`` takes the student's states to the teacher's width, where it learns from states."""
        student = self.job.student
        if not self.job.distilled:
            return CrossEntropy()
        temperature, weight = student.temperature, student.teacher_weight
        kept = self.targets.index.identity.temperatures if self.targets is not None else ()
        measure = Divergence(student.divergence, student.jsd_beta)
        outputs = self.teacher is not None and student.teacher == "live"
        told = outputs or self.targets is not None  # of the teacher's distribution
        plain: Objective = DistillObjective(temperature, weight, kept, measure) if told else CrossEntropy()
        if student.on_policy:
            plain = OnPolicyObjective(plain, DistillObjective(temperature, 1.0, self.job.judged, measure))
        if self.teacher is None:
            return plain
        return LiveTeacherObjective(
            self.teacher.to(device), plain, outputs, student.relations, student.states, projection
        )

    def columns(self, sample_ids: NDArray[np.int64]) -> Columns:
        """Of these rows the teacher's text in place of theirs, and its cached targets, where the student reads them."""
        text = self.text.take(sample_ids) if self.text is not None else {}
        found = self.targets.take(sample_ids) if self.targets is not None else {}
        return text | {f"teacher_{name}": values for name, values in found.items()}

    @cached_property
    def targets(self) -> TargetCache | None:
        """The cache, where the student reads it."""
        return TargetCache(_there(self.job.cached)) if self.job.distilled and self.job.student.reads_cache else None

    @cached_property
    def text(self) -> TeacherText | None:
        """What the teacher wrote, where the student reads it."""
        return (
            TeacherText(_there(self.job.written)) if self.job.distilled and self.job.student.text == "teacher" else None
        )

    @cached_property
    def teacher(self) -> PreTrainedModel | None:
        """The teacher, where it runs beside the student."""
        live = self.job.distilled and self.job.student.live
        return load_model(self._folder).requires_grad_(False) if live else None

    @property
    def _folder(self) -> Path:
        return self.job.trained.local() / Path(TEACHER_WEIGHTS).parent


def _there(artifact: Artifact | None) -> Path:
    """The folder of what the recipe made sure of."""
    assert artifact is not None
    return artifact.local()
