"""What a group of workers learns. Light to import: a driver hands it on without loading the model code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from overproof.data.manifest import Manifest
from overproof.data.read import Columns
from overproof.recipe import Model, Pretrained
from overproof.train import pretrained

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from overproof.train.objective import Objective


class Lesson(Protocol):
    """Picklable. Its methods are called in a worker, on every rank alike."""

    def model(self, manifest: Manifest, seed: int) -> PreTrainedModel:
        """The model with its weights from before the first step."""

    def objective(self, device: torch.device) -> Objective:
        """What is minimised."""

    def columns(self, sample_ids: NDArray[np.int64]) -> Columns:
        """What the objective reads of these rows of the train split beside the data's own columns."""


@dataclass(frozen=True)
class Labels:
    """The labels alone."""

    chosen: Model

    def model(self, manifest: Manifest, seed: int) -> PreTrainedModel:
        from overproof.models import build, load

        if isinstance(self.chosen, Pretrained):
            return load(pretrained.local(self.chosen.path))
        return build(self.chosen, manifest, seed)

    def objective(self, device: torch.device) -> Objective:
        from overproof.train.objective import CrossEntropy

        del device
        return CrossEntropy()

    def columns(self, sample_ids: NDArray[np.int64]) -> Columns:
        del sample_ids
        return {}
