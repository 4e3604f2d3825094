"""A student's ``TrainSpec``: it learns from its teacher or, as a control, from the labels alone."""

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
from overproof.distill.rounded_training import train_rounded
from overproof.distill.row_cache import teacher_folder
from overproof.distill.student_init import Measured, initial_student, measured_teacher, pruned_further
from overproof.distill.student_validation import check_student
from overproof.distill.target_cache import TargetCache
from overproof.distill.teacher_text import TeacherText
from overproof.distill.trial_job import TrialJob
from overproof.models.compute import Compute
from overproof.models.hf_directory import load_model
from overproof.tasks.base import Task
from overproof.train.objective import CrossEntropy, Objective
from overproof.train.train_job import Sharding, sharding_of


@dataclass(frozen=True)
class DistillSpec:
    """A ``train.train_job.TrainSpec``, of students in one process and of those that several train."""

    job: TrialJob

    def model(self, manifest: Manifest, seed: int, rounds: int = 1) -> PreTrainedModel:
        """The student with its weights from before the first step; its control starts from the same. One that is
        pruned in rounds has the shape that it has after so many.

        Raises:
            InputError: it cannot start from what its settings name.
        """
        check_student(self.job.student, self.job.prepared, self.job.trained, self.job.progress)
        start = initial_student(self.job.student.model, manifest, seed, self._teacher_folder, self._measured, rounds)
        return self._rounded(start)

    def pruned_further(self, model: PreTrainedModel, rounds: int) -> PreTrainedModel:
        """The student as it goes on after so many rounds: without what matters least on train rows by now."""
        job = self.job
        return self._rounded(pruned_further(job.student.model, model, job.prepared, job.seed, self._measured, rounds))

    def _rounded(self, model: PreTrainedModel) -> PreTrainedModel:
        rounding = self.job.student.rounding
        return model if rounding is None else train_rounded(model, rounding)

    @property
    def _measured(self) -> Measured:
        """Out of the workspace each time: of a masked student it is as large as the student."""
        job = self.job
        return measured_teacher(job.student.model, self._teacher_folder, job.prepared, job.draft.workspace, job.seed)

    @property
    def sharding(self) -> Sharding | None:
        return sharding_of(self.job.student.model)

    def objective(self, task: Task, device: torch.device, projection: nn.Linear | None = None) -> Objective:
        """``projection`` takes the student's states to the teacher's width, where it learns from states."""
        student = self.job.student
        group = self.job.settings.group
        supervised = CrossEntropy(task.predict, compiled=group is not None and group.compile)
        if not self.job.distilled:
            return supervised
        temperature, weight = student.temperature, student.teacher_weight
        cached_temperatures = self.targets.index.identity.temperatures if self.targets is not None else ()
        divergence = Divergence(student.divergence, student.jsd_beta)
        use_logits = self.teacher is not None and student.teacher == "live"
        objective: Objective = supervised
        if use_logits or self.targets is not None:
            objective = DistillObjective(task.predict, temperature, weight, cached_temperatures, divergence)
        if student.on_policy:
            scored = DistillObjective(task.predict, temperature, 1.0, self.job.scorer_temperatures, divergence)
            objective = OnPolicyObjective(objective, scored)
        if self.teacher is None:
            return objective
        teacher = Compute(device, self.job.settings.live_precision).place(self.teacher)
        return LiveTeacherObjective(task, teacher, objective, use_logits, student.relations, student.states, projection)

    def columns(self, sample_ids: NDArray[np.int64]) -> Columns:
        """The teacher's text in place of these rows, and its cached targets, where the student reads them."""
        text = self.text.take(sample_ids) if self.text is not None else {}
        targets = self.targets.take(sample_ids) if self.targets is not None else {}
        return text | {f"teacher_{name}": values for name, values in targets.items()}

    @cached_property
    def targets(self) -> TargetCache | None:
        """The cache, where the student reads it."""
        if not (self.job.distilled and self.job.student.reads_cache):
            return None
        return TargetCache(_made(self.job.target_cache))

    @cached_property
    def text(self) -> TeacherText | None:
        """What the teacher wrote, where the student reads it."""
        if not (self.job.distilled and self.job.student.text == "teacher"):
            return None
        return TeacherText(_made(self.job.teacher_text))

    @cached_property
    def teacher(self) -> PreTrainedModel | None:
        """The teacher, where it runs at each of the student's steps."""
        if not (self.job.distilled and self.job.student.needs_live_teacher):
            return None
        return load_model(self._teacher_folder).requires_grad_(False)

    @property
    def _teacher_folder(self) -> Path:
        return teacher_folder(self.job.trained)


def _made(artifact: Artifact | None) -> Artifact:
    """An artifact that the recipe's checks have made sure of."""
    assert artifact is not None
    return artifact
