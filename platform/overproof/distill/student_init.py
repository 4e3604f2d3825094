"""The weights that a student, and its control, starts from."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from overproof.artifacts import Artifact
from overproof.config import Masked, ModelSection, Pretrained, Pruned, TeacherLayers
from overproof.data.manifest import Manifest
from overproof.distill.masked_student import Matrices, known_matrices, masked
from overproof.distill.pruning import Importance, keep_layers, known_importance, measure_importance, prune
from overproof.export.calibration import CalibrationRows
from overproof.models import pretrained
from overproof.models.hf_directory import build_model, load_model, load_start
from overproof.train.engine import to_device

Measured = Importance | Matrices | None  # on train rows, of the teacher


def measured_teacher(chosen: ModelSection, teacher: Path, prepared: Artifact, workspace: str, seed: int) -> Measured:
    """What a student's start needs to know of the teacher in its directory, from train rows: found by the first who
    asks, and kept in the workspace. None for students that need nothing.

    Raises:
        InputError: the teacher's layers cannot be masked.
    """
    if isinstance(chosen, Pruned):
        return known_importance(chosen, teacher, prepared, workspace, seed)
    if isinstance(chosen, Masked):
        return known_matrices(chosen, teacher, prepared, workspace, seed)
    return None


def initial_student(
    chosen: ModelSection, manifest: Manifest, seed: int, teacher: Path, measured: Measured = None, rounds: int = 1
) -> PreTrainedModel:
    """Fresh weights, parts of the teacher in its directory, or another directory's; a function of its arguments. One
    that is pruned in rounds has the shape of so many.

    Raises:
        InputError: the model does not fit the data, a directory cannot be loaded, or the teacher has too few layers.
    """
    if isinstance(chosen, Pretrained):
        return load_start(pretrained.fetch_pretrained(chosen.path), manifest, seed).train()
    if isinstance(chosen, Pruned):
        assert isinstance(measured, Importance)
        return prune(load_model(teacher), chosen.after(rounds, *measured.sizes), measured).train()
    if isinstance(chosen, Masked):
        assert isinstance(measured, dict)
        return masked(load_model(teacher), measured).train()
    if isinstance(chosen, TeacherLayers):
        model = load_model(teacher)
        return keep_layers(model, chosen.of(model.config.num_hidden_layers)).train()
    return build_model(chosen, manifest, seed)


def pruned_further(
    chosen: ModelSection, model: PreTrainedModel, prepared: Artifact, seed: int, measured: Measured, rounds: int
) -> PreTrainedModel:
    """A student as it goes on after so many rounds: without what matters least on train rows by now."""
    assert isinstance(chosen, Pruned)
    assert isinstance(measured, Importance)
    read = CalibrationRows(prepared, seed, chosen.rows)
    batches = [to_device(batch, model.device) for batch in read.batches()]
    found = measure_importance(model, batches, read.predict, chosen.layers_by == "loss")
    return prune(model, chosen.after(rounds, *measured.sizes), found).to(model.device).train()
