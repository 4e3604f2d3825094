"""How large a model is, told without building it: from a recipe's numbers, or from a directory's headers.

torch and transformers take seconds to import; a test holds these numbers against the models they build.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from overproof.config.models import ModelSection, Pretrained, TeacherLayers
from overproof.errors import InputError, suggest_name
from overproof.files import filesystem
from overproof.models.pretrained import weight_files
from overproof.registry import FAMILIES

if TYPE_CHECKING:
    from overproof.models.base import DataShape, ModelFamily

HEADER_LIMIT_BYTES = 100_000_000  # as the safetensors library has it
FP32_BYTES = 4  # bytes
POSITIONS = ("max_position_embeddings", "n_positions")  # what families call the most tokens of a row


@dataclass(frozen=True)
class ModelSize:
    """What the memory of a model in training depends on."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    query_width: int  # of all query heads together
    key_width: int  # of all key heads together
    places: int  # of a row in every layer: tokens, or patches and the class token
    outputs: int  # logits at each prediction
    predictions: int  # in a row
    tensors: tuple[int, ...]  # numbers in each parameter tensor; tied ones once
    relative: int = 0  # entries of a table of relative positions

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return sum(self.tensors)


def model_size(model: ModelSection, shape: DataShape) -> ModelSize:
    """Of a recipe's model for data of a shape.

    Raises:
        InputError: a pretrained model's directory is not one, or the model does not fit the data.
    """
    if isinstance(model, Pretrained):
        return _directory_size(model.path, shape)
    return FAMILIES[model.kind].size(model, shape)


def student_size(model: ModelSection, teacher: ModelSection, shape: DataShape) -> ModelSize:
    """Of a student, which may follow from its teacher.

    Raises:
        InputError: a directory is not one of a model, or the teacher has fewer layers than the student asks for.
    """
    if not isinstance(model, TeacherLayers):
        return model_size(model, shape)
    model.of(model_size(teacher, shape).layers)
    if isinstance(teacher, Pretrained):
        return _directory_size(teacher.path, shape, model.count)
    return model_size(teacher.model_copy(update={"layers": model.count}), shape)


def family_of(config: Mapping[str, Any], path: object) -> tuple[str, ModelFamily]:
    """The family of a directory by its config.json, and its kind.

    Raises:
        InputError: there is no architecture, or one that no family knows; or its weights are quantised.
    """
    named = config.get("architectures") if isinstance(config, Mapping) else None
    if not isinstance(named, list) or not named:
        raise InputError(f"{path}/config.json: no architecture; expected a Hugging Face model configuration")
    if config.get("quantization_config") is not None:
        raise InputError(
            f"{path}/config.json: quantization_config: its weights are quantised; expected them in 16 or 32 bits: give "
            "the model that they were made from"
        )
    for kind, family in FAMILIES.items():
        if any(fnmatchcase(str(named[0]), pattern) for pattern in family.architectures):
            return kind, family
    known = [name for family in FAMILIES.values() for name in family.architectures]
    near = suggest_name(str(named[0]), [name for name in known if "*" not in name], similarity=0.5)
    raise InputError(f"{path}/config.json: architecture {named[0]}{near}; expected {' or '.join(known)}")


def most_positions(config: Mapping[str, Any]) -> int | None:
    """Tokens in a row that a configuration allows; None where it names no limit."""
    found = [int(config[name]) for name in POSITIONS if config.get(name)]
    return min(found, default=None)


def require_positions(config: Mapping[str, Any], positions: int) -> None:
    """Look whether a decoder takes rows of so many tokens: past its table of positions, if it has one, is nothing.

    Raises:
        InputError: it takes fewer.
    """
    most = most_positions(config)
    if most is not None and positions > most:
        raise InputError(
            f"config.json: the model takes {most} tokens at most; data.sequence_length is {positions}: lower it"
        )


def _directory_size(path: str, shape: DataShape, most_layers: int | None = None) -> ModelSize:
    config, tensors = directory_config(path), _tensor_sizes(path)
    _, family = family_of(config, path)
    if most_layers is not None:  # all are alike
        config["num_hidden_layers"] = most_layers
        layers = family.names.layers.rsplit(".", 1)[-1]
        tensors = {name: size for name, size in tensors.items() if _layer_number(name, layers) < most_layers}
    try:
        found = family.directory_size(config, tensors, shape)
        return found if most_layers is None else replace(found, layers=most_layers)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}/config.json: {error} is missing or no number; expected a whole configuration"
        ) from None


def _layer_number(tensor: str, layers: str) -> int:
    """The layer a tensor belongs to, of those in a list of this name; -1 where it belongs to none."""
    found = re.search(rf"(?:^|\.)(?:{re.escape(layers)}|layer)\.(\d+)\.", tensor)
    return int(found[1]) if found else -1


def directory_config(path: str) -> dict[str, Any]:
    """A Hugging Face directory's config.json.

    Raises:
        InputError: it cannot be read.
    """
    files, root = filesystem(path)
    try:
        with files.open_input_stream(f"{root}/config.json") as stream:
            config: dict[str, Any] = json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: config.json cannot be read: {error}; expected a Hugging Face model directory"
        ) from None
    return config


def _tensor_sizes(path: str) -> dict[str, int]:
    """Numbers in each tensor, out of the headers of the safetensors files; the weights stay where they are."""
    files, root = filesystem(path)
    found: dict[str, int] = {}
    for name in weight_files(files, root):
        with files.open_input_file(name) as stream:
            try:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > HEADER_LIMIT_BYTES:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(stream.read(length))
                shapes = {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}
            except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{name}: not safetensors: {error}") from None
        found |= {key: math.prod(int(length) for length in shape) for key, shape in shapes.items()}
    return found
