"""A teacher of which there is no file: one that is served elsewhere, or that no engine runs: torch does."""

from __future__ import annotations

from pathlib import Path

from overproof.artifacts import Artifact
from overproof.config import Recipe, Served
from overproof.data.manifest import Manifest
from overproof.distill.row_cache import teacher_folder, teacher_sha256
from overproof.engines.base import LogitsReader, TextScorer
from overproof.engines.endpoint import EndpointScorer
from overproof.engines.served_teacher import ServedTeacher, open_teacher
from overproof.evaluate.metrics import MeasuredTeacher
from overproof.models.hf_directory import load_model, read_config
from overproof.models.sizes import family_of
from overproof.tasks.base import Metric
from overproof.tasks.text_evaluation import torch_scorer
from overproof.tasks.torch_scorer import TorchLogits


def teacher_scorer(recipe: Recipe, trained: Artifact, root: Path) -> TextScorer:
    """What such a teacher is judged by, on rows of the data set at ``root``.

    Raises:
        InputError: an endpoint cannot be asked, or answers otherwise than when the train stage asked.
    """
    model, evaluate = recipe.train.model, recipe.evaluate
    if isinstance(model, Served):
        return EndpointScorer(open_teacher(model, trained.local(ServedTeacher.FILE), root))
    whole = load_model(teacher_folder(trained))
    return torch_scorer(whole, Manifest.read(root), evaluate.gpus_per_task, evaluate.precision)


def teacher_logits(recipe: Recipe, trained: Artifact) -> LogitsReader | None:
    """All that such a teacher says of a row; None of one whose endpoint does not tell it."""
    return None if isinstance(recipe.train.model, Served) else TorchLogits(load_model(teacher_folder(trained)))


def measured_teacher(recipe: Recipe, trained: Artifact, metrics: dict[str, Metric]) -> MeasuredTeacher:
    """How it stands in a report."""
    if isinstance(recipe.train.model, Served):
        served = ServedTeacher.read(trained.local(ServedTeacher.FILE))
        return MeasuredTeacher(model=served.model, runs="elsewhere", weights=served.weights, metrics=metrics)
    folder = teacher_folder(trained)
    kind, _ = family_of(read_config(folder), folder)
    return MeasuredTeacher(model=kind, runs="in torch", weights=teacher_sha256(trained), metrics=metrics)
