"""How large a model is, told without building it: from a recipe's numbers, or from a directory's headers.

torch and transformers take seconds to import; a test holds these numbers against the models they build.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pyarrow import fs

from overproof.config import Llama, Model, Pretrained, StudentModel, TeacherLayers, Vit
from overproof.errors import InputError
from overproof.files import filesystem

PIXELS = 8  # along each edge of a digit
HEADER_LIMIT_BYTES = 100_000_000  # as the safetensors library has it


@dataclass(frozen=True)
class ModelSize:
    """What the memory of a model in training depends on."""

    kind: Literal["llama", "vit"]
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

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return sum(self.tensors)


def model_size(model: Model, outputs: int, predictions: int) -> ModelSize:
    """Of a recipe's model for data with ``outputs`` classes or vocabulary entries and rows of ``predictions``.

    Raises:
        InputError: a pretrained model's directory is not one.
    """
    if isinstance(model, Llama):
        return _llama(model, outputs, predictions)
    if isinstance(model, Vit):
        return _vit(model, outputs)
    return _directory(model.path, predictions)


def student_size(model: StudentModel, teacher: Model, outputs: int, predictions: int) -> ModelSize:
    """Of a student, which may follow from its teacher.

    Raises:
        InputError: a directory is not one of a model, or the teacher has fewer layers than the student asks for.
    """
    if not isinstance(model, TeacherLayers):
        return model_size(model, outputs, predictions)
    model.of(model_size(teacher, outputs, predictions).layers)
    if isinstance(teacher, Pretrained):
        return _directory(teacher.path, predictions, model.count)
    return model_size(teacher.model_copy(update={"layers": model.count}), outputs, predictions)


def _llama(model: Llama, outputs: int, predictions: int) -> ModelSize:
    h, f = model.hidden_size, model.intermediate_size
    keys = h // model.heads * model.kv_heads
    layer = (h * h, keys * h, keys * h, h * h, f * h, f * h, h * f, h, h)  # q k v o, gate up down, two norms
    tensors = (outputs * h, *layer * model.layers, h)
    return ModelSize("llama", h, f, model.layers, model.heads, h, keys, predictions, outputs, predictions, tensors)


def _vit(model: Vit, outputs: int) -> ModelSize:
    h, f, patch = model.hidden_size, model.intermediate_size, model.patch_size
    places = _patches(PIXELS, patch)
    layer = (h * h, h) * 4 + (f * h, f, h * f, h) + (h, h) * 2  # q k v o, two of the feed-forward, two norms
    tensors = (h, places * h, h * patch * patch, h, *layer * model.layers, h, h, outputs * h, outputs)
    return ModelSize("vit", h, f, model.layers, model.heads, h, h, places, outputs, 1, tensors)


def _patches(edge: int, patch: int) -> int:
    return (edge // patch) ** 2 + 1


def _directory(path: str, predictions: int, most_layers: int | None = None) -> ModelSize:
    files, root = filesystem(path)
    config = _config(files, root, path)
    tensors = _sizes(files, root, path)
    if most_layers is not None:  # all are alike
        config["num_hidden_layers"] = most_layers
        tensors = {name: size for name, size in tensors.items() if _layer(name) < most_layers}
    try:
        h, f, layers, heads = (
            int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        )
        if config["model_type"] == "llama":
            head = config.get("head_dim") or h // heads
            queries, keys = (head * count for count in (heads, int(config["num_key_value_heads"])))
            outputs = int(config["vocab_size"])
            if config.get("tie_word_embeddings") and "lm_head.weight" in tensors:
                del tensors["lm_head.weight"]  # written twice
            sizes = _flat(tensors)
            return ModelSize("llama", h, f, layers, heads, queries, keys, predictions, outputs, predictions, sizes)
        places = _patches(int(config["image_size"]), int(config["patch_size"]))
        outputs = tensors["classifier.bias"]
        return ModelSize("vit", h, f, layers, heads, h, h, places, outputs, 1, _flat(tensors))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}/config.json: {error} is missing or no number; expected a Llama or ViT configuration"
        ) from None


def _layer(tensor: str) -> int:
    """The layer a tensor belongs to; -1 where it belongs to none."""
    found = re.search(r"\.layers?\.(\d+)\.", tensor)
    return int(found[1]) if found else -1


def _flat(tensors: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(tensors.values())


def _config(files: fs.FileSystem, root: str, path: str) -> dict[str, Any]:
    try:
        with files.open_input_stream(f"{root}/config.json") as stream:
            config: dict[str, Any] = json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: config.json cannot be read: {error}; expected a Hugging Face model directory"
        ) from None
    return config


def _sizes(files: fs.FileSystem, root: str, path: str) -> dict[str, int]:
    """Numbers in each tensor, out of the headers of the safetensors files; the weights stay where they are."""
    found: dict[str, int] = {}
    names = [info.path for info in files.get_file_info(fs.FileSelector(root)) if info.path.endswith(".safetensors")]
    if not names:
        raise InputError(f"{path}: no *.safetensors file; expected a Hugging Face model directory")
    for name in sorted(names):
        with files.open_input_file(name) as stream:
            try:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > HEADER_LIMIT_BYTES:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(stream.read(length))
                shapes = {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}
            except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{name}: not safetensors: {error}") from None
        for key, shape in shapes.items():
            size = 1
            for length in shape:
                size *= int(length)
            found[key] = size
    return found
