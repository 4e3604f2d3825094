"""A student that is its teacher with part of its layers' matrices at zero, and how these stay zero in training.

Experimental, for study: no engine here skips zeros, so files are no smaller and no faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import fs
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from overproof.artifacts import Artifact
from overproof.config.student_models import Masked
from overproof.distill.sparsity import sparsify
from overproof.export.calibration import CalibrationRows, calibrate
from overproof.files import atomic_write, filesystem, read_bytes
from overproof.models.hf_directory import layer_names, load_model

Matrices = Mapping[str, Tensor]  # by their names in the model


def known_matrices(section: Masked, teacher: Path, prepared: Artifact, workspace: str, seed: int) -> Matrices:
    """Of the teacher in a directory, made sparse: calibrated by the first who asks, and kept in the workspace of what
    is made from that teacher and data, so that all its trials, and their controls, start alike.

    Raises:
        InputError: as ``sparse_matrices``.
    """
    files, folder = filesystem(workspace)
    path = f"{folder}/{section.measurement.name}.safetensors"
    if files.get_file_info(path).type is not fs.FileType.File:
        read = CalibrationRows(prepared, seed, section.rows)
        found = sparse_matrices(section, load_model(teacher), read.batches, read.predict)
        files.create_dir(folder, recursive=True)
        atomic_write(files, path, save(dict(found)))
    return load(read_bytes(files, path))


def sparse_matrices(
    section: Masked,
    model: PreTrainedModel,
    batches: Callable[[], Iterable[Any]],
    predict: Callable[[Any, Any], object],
) -> Matrices:
    """The matrices of a model's layers with their zeros, each (outputs, inputs) in fp32. Later layers are calibrated on
    what earlier ones give with their zeros, and the model has these afterwards.

    Raises:
        InputError: its layers hold no linear ones, or their rows cannot have the pattern.
    """
    layers, named = layer_names(model).layers, _layer_weights(model)
    section.require_linear(bool(named), f"{layers} of a {type(model).__name__}")
    for name, weight in named.items():
        section.require_columns(weight.shape[1], f"the number of columns of {name}")
    found = dict[str, Tensor]()

    def renew(name: str, weight: Tensor, inputs_CC: Tensor | None) -> Tensor | None:
        if name not in named:
            return None
        found[name] = sparsify(section, weight, inputs_CC)
        return found[name]

    if section.method == "magnitude":  # by the weights alone
        for name, weight in named.items():
            weight.data.copy_(sparsify(section, weight.data, None))
            found[name] = weight.data
    else:
        calibrate(model, layers, batches(), predict, renew, lambda *_: None)
    return found


def masked(teacher: PreTrainedModel, matrices: Matrices) -> PreTrainedModel:
    """The teacher with these matrices, whose zeros training leaves at zero."""
    for name, weight in _layer_weights(teacher).items():
        weight.data.copy_(matrices[name])
        # Without gradients AdamW's moments of a weight stay 0, and its decay is a share of the weight. What is zero
        # follows from the weights themselves, so a checkpoint needs no mask beside them.
        weight.register_hook(partial(_without_zeros, weight))  # type: ignore[no-untyped-call]
    return teacher


def _without_zeros(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(weight == 0, 0)


def _layer_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    layers = layer_names(model).layers
    modules = model.get_submodule(layers).named_modules()
    return {f"{layers}.{name}.weight": module.weight for name, module in modules if isinstance(module, nn.Linear)}
