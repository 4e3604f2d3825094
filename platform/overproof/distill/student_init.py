"""The weights that a student, and its control, starts from."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from overproof.config import ModelSection, Pretrained, Pruned, TeacherLayers
from overproof.data.manifest import Manifest
from overproof.distill.pruning import Importance, keep_layers, prune
from overproof.models import pretrained
from overproof.models.hf_directory import build_model, load_model, load_start


def initial_student(
    chosen: ModelSection, manifest: Manifest, seed: int, teacher: Path, importance: Importance | None = None
) -> PreTrainedModel:
    """Fresh weights, parts of the teacher in its directory, or another directory's; a function of its arguments.

    Raises:
        InputError: the model does not fit the data, a directory cannot be loaded, or the teacher has too few layers.
    """
    if isinstance(chosen, Pretrained):
        return load_start(pretrained.fetch_pretrained(chosen.path), manifest, seed).train()
    if isinstance(chosen, Pruned):
        assert importance is not None
        return prune(load_model(teacher), chosen, importance).train()
    if isinstance(chosen, TeacherLayers):
        model = load_model(teacher)
        return keep_layers(model, chosen.of(model.config.num_hidden_layers)).train()
    return build_model(chosen, manifest, seed)
