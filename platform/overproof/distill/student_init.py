"""The weights that a student, and its control, starts from."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from overproof.config import ModelSection, Pretrained, TeacherLayers
from overproof.data.manifest import Manifest
from overproof.models import pretrained
from overproof.models.hf_directory import build_model, layer_names, load_model, load_pretrained


def initial_student(chosen: ModelSection, manifest: Manifest, seed: int, teacher: Path) -> PreTrainedModel:
    """Fresh weights, layers of the teacher in its directory, or another directory's; a function of its arguments.

    Raises:
        InputError: the model does not fit the data, a directory cannot be loaded, or the teacher has too few layers.
    """
    if isinstance(chosen, Pretrained):
        return load_pretrained(pretrained.fetch_pretrained(chosen.path), manifest).train()
    if isinstance(chosen, TeacherLayers):
        model = load_model(teacher)
        return keep_layers(model, chosen.of(model.config.num_hidden_layers)).train()
    return build_model(chosen, manifest, seed)


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A copy that has these layers alone; all that lies outside the layers stays as it is."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    new_index = {old: new for new, old in enumerate(layers)}
    state, prefix = {}, layer_names(model).layers
    for name, value in model.state_dict().items():
        found = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
        if found is None:
            state[name] = value
        elif int(found[1]) in new_index:
            state[f"{prefix}.{new_index[int(found[1])]}.{found[2]}"] = value
    smaller = type(model)(config)
    smaller.load_state_dict(state)
    return smaller
