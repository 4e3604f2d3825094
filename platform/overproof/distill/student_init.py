"""The weights that a student, and its control, starts from."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from overproof.config import ModelSection, Pretrained, TeacherLayers
from overproof.data.manifest import Manifest
from overproof.errors import InputError
from overproof.models import pretrained
from overproof.models.hf_directory import build_model, layer_names, load_model, load_start


def initial_student(chosen: ModelSection, manifest: Manifest, seed: int, teacher: Path) -> PreTrainedModel:
    """Fresh weights, layers of the teacher in its directory, or another directory's; a function of its arguments.

    Raises:
        InputError: the model does not fit the data, a directory cannot be loaded, or the teacher has too few layers.
    """
    if isinstance(chosen, Pretrained):
        return load_start(pretrained.fetch_pretrained(chosen.path), manifest, seed).train()
    if isinstance(chosen, TeacherLayers):
        model = load_model(teacher)
        return keep_layers(model, chosen.of(model.config.num_hidden_layers)).train()
    return build_model(chosen, manifest, seed)


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A copy that has these layers alone; all that lies outside the layers stays as it is.

    What a layer is by its place, such as one with a sliding window, it is by its new place where engines go by that.

    Raises:
        InputError: it is not known where the model keeps its layers, or another one cannot be the first.
    """
    names = layer_names(model)
    if not any(name.startswith(f"{names.layers}.") for name, _ in model.named_parameters()):
        raise InputError(
            f"layers: a {type(model).__name__} keeps none at {names.layers}; expected a student of another kind, such "
            "as {kind: pretrained, path: ...}"
        )
    if names.first_stays and layers[0] != 0:
        raise InputError(
            f"layers {list(layers)}: the first layer of a {type(model).__name__} lacks a norm that the others have; "
            "expected layer 0 among them"
        )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    settings = config.to_dict()
    for setting in names.own_settings:
        values = getattr(model.config, setting)
        setattr(config, setting, [values[layer] for layer in layers])
    for setting in names.per_layer:
        if settings.get(setting) is not None:
            setattr(config, setting, settings[setting][: len(layers)])
    new_index = {old: new for new, old in enumerate(layers)}
    state, prefix = {}, names.layers
    for name, value in model.state_dict().items():
        found = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
        if found is None:
            state[name] = value
        elif int(found[1]) in new_index:
            state[f"{prefix}.{new_index[int(found[1])]}.{found[2]}"] = value
    smaller = type(model)(config)
    smaller.load_state_dict(state)
    return smaller
