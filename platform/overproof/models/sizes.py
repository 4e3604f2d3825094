"""How large a model is, told without building it: from a recipe's numbers, or from a directory's headers.

torch and transformers take seconds to import; a test holds these numbers against the models they build.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from overproof.config.models import LayeredModel, ModelSection, Pretrained, StagedModel
from overproof.config.student_models import OfTeacher
from overproof.config.training import Lora, Train
from overproof.errors import InputError, suggest_name
from overproof.files import filesystem, read_bytes, retried
from overproof.models.base import ComposedFamily, ConvolutionalFamily
from overproof.models.pretrained import weight_files
from overproof.models.student_config import UNTOLD, layer_number, left_config, left_tensors
from overproof.registry import FAMILIES

if TYPE_CHECKING:
    from overproof.models.base import DataShape, LayerNames, ModelFamily

HEADER_LIMIT_BYTES = 100_000_000  # as the safetensors library has it
FP32_BYTES = 4  # bytes
UNFIT = "expected the weights and the configuration of one model"
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
    adapters: tuple[int, ...] = ()  # numbers in each adapter's two matrices, where these alone are trained
    adapter_rank: int = 0  # width between the two
    looked_up: int = 0  # numbers of tables of which a place reads one row, and multiplies nothing
    masked: int = 0  # numbers that each layer keeps more of a place where texts of a row are kept apart
    kept: int = 0  # numbers of a row that layers which are not alike keep together
    peak: int = 0  # numbers of a row that such layers have at once in a pass without gradients
    multiplied_again: int = 0  # numbers that convolutions multiply at further pixels of a row, once for each

    @property
    def parameters(self) -> int:
        """Numbers in the model, its adapters left out."""
        return sum(self.tensors)

    @property
    def held(self) -> int:
        """Numbers in the model and its adapters."""
        return self.parameters + sum(self.adapters)

    @property
    def trained(self) -> tuple[int, ...]:
        """Numbers in each tensor that is trained."""
        return self.adapters or self.tensors

    @property
    def multiplied(self) -> int:
        """Numbers that each place is multiplied with, which is what a pass costs."""
        return self.parameters - self.looked_up + self.multiplied_again


def model_size(model: ModelSection, shape: DataShape) -> ModelSize:
    """Of a recipe's model for data of a shape.

    Raises:
        InputError: a pretrained model's directory is not one, or the model does not fit the data.
    """
    if isinstance(model, Pretrained):
        return _directory_size(model.path, shape)
    return FAMILIES[model.kind].size(model, shape)


def trained_size(train: Train, shape: DataShape) -> ModelSize:
    """Of the teacher as it is trained: with the adapters that it is given.

    Raises:
        InputError: as ``model_size``.
    """
    size = model_size(train.model, shape)
    if train.attention == "varlen":  # no mask; on CPUs what each text gives, before it is laid end to end
        size = replace(size, masked=0 if train.gpus_per_worker else size.query_width)
    if train.lora is None or not isinstance(train.model, Pretrained):
        return size
    names, rank, adapters = FAMILIES[size.family].names, train.lora.rank, list[int]()
    for name, lengths in _tensor_shapes(train.model.path).items():
        if len(lengths) == 2 and _has_adapter(name, names, train.lora):
            adapters += [rank * length for length in lengths]
    return replace(size, adapters=tuple(adapters), adapter_rank=rank)


def _has_adapter(tensor: str, names: LayerNames, lora: Lora) -> bool:
    """Whether a matrix is one that the library peft gives adapters."""
    module = tensor.removesuffix(".weight")
    if lora.targets == "all-linear":
        return module != tensor and layer_number(tensor, names) >= 0
    return any(module == target or module.endswith(f".{target}") for target in lora.targets)


def student_size(model: ModelSection, teacher: ModelSection, shape: DataShape) -> ModelSize:
    """Of a student, which may follow from its teacher.

    Raises:
        InputError: a directory is not one of a model, or the teacher has fewer layers than the student asks for.
    """
    if not isinstance(model, OfTeacher):
        return model_size(model, shape)
    whole = model_size(teacher, shape)
    family = FAMILIES[whole.family]
    if not isinstance(family, ConvolutionalFamily):
        if not family.names.feed_forward:
            raise InputError(
                f"a teacher of the family {whole.family} has no layers of its own; expected a student of another kind, "
                "such as {kind: pretrained, path: ...}"
            )
        model.require_possible(whole.layers, whole.intermediate, UNTOLD, whole.hidden)
    if isinstance(teacher, Pretrained):
        return _left_size(teacher.path, model, shape, whole.intermediate)
    assert isinstance(teacher, LayeredModel | StagedModel)
    return model_size(model.left_of(teacher), shape)


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
        if is_named(str(named[0]), family.architectures):
            return kind, family
    known = [name for family in FAMILIES.values() for name in family.architectures if not name.startswith("!")]
    near = suggest_name(str(named[0]), [name for name in known if "*" not in name], similarity=0.5)
    raise InputError(f"{path}/config.json: architecture {named[0]}{near}; expected {' or '.join(known)}")


def is_named(architecture: str, patterns: tuple[str, ...]) -> bool:
    """Whether a family's patterns name an architecture, and none with a ``!`` before it does."""
    left_out = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
    if any(fnmatchcase(architecture, pattern) for pattern in left_out):
        return False
    return any(fnmatchcase(architecture, pattern) for pattern in patterns)


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


def require_apart(config: Mapping[str, Any], path: object) -> None:
    """Look whether a directory's model is known to keep the texts of a row apart, as the families of recipes are.

    Raises:
        InputError: it is one of the other decoders.
    """
    _, family = family_of(config, path)
    if isinstance(family, ComposedFamily):
        for member in config["members"]:
            require_apart(member, path)
    elif family.section is None:
        raise InputError(
            f"{path}/config.json: whether {config['architectures'][0]} keeps the documents of a row apart is not "
            "known; expected data.cross_document_attention: true, or a model of a family that recipes name"
        )


def require_varlen(kind: str, where: str) -> None:
    """Look whether models of a family can attend by the lengths of the texts of a row (``models/varlen.py``).

    Raises:
        InputError: they cannot.
    """
    if not FAMILIES[kind].varlen:
        able = ", ".join(name for name, family in FAMILIES.items() if family.varlen)
        raise InputError(
            f"{where}.attention: varlen: models of the family {kind} cannot attend by lengths; expected sdpa, or a "
            f"model of {able}"
        )


def _directory_size(path: str, shape: DataShape) -> ModelSize:
    config, tensors = directory_config(path), _tensor_numbers(path)
    _, family = family_of(config, path)
    found = _told_size(path, config, tensors, family, shape)
    _require_same(path, config, tensors, family, found)
    return found


def _left_size(path: str, student: OfTeacher, shape: DataShape, channels: int) -> ModelSize:
    """Of what a student takes from a directory's model, which has so many channels: layers are all alike."""
    config = directory_config(path)
    _, family = family_of(config, path)
    if isinstance(family, ConvolutionalFamily):
        narrowed = left_config(config, student, family)
        return family.directory_size(narrowed, family.tensors(narrowed), shape)
    whole, names, kept = _tensor_numbers(path), family.names, student.kept
    if all(layer_number(name, names) < 0 for name in whole):
        raise InputError(
            f"{path}: keeps no layers at {names.layers}, so fewer of them cannot be taken; expected a "
            "student of another kind, such as {kind: pretrained, path: ...}"
        )
    left = left_config(config, student, family)
    if kept.layers is not None:
        left |= {"num_hidden_layers": kept.layers}
    found = _told_size(path, left, left_tensors(whole, config, kept, names, channels), family, shape)
    return found if kept.layers is None else replace(found, layers=kept.layers)


def _tensor_numbers(path: str) -> dict[str, int]:
    return {name: math.prod(lengths) for name, lengths in _tensor_shapes(path).items()}


def _told_size(
    path: str, config: Mapping[str, Any], tensors: Mapping[str, int], family: ModelFamily, shape: DataShape
) -> ModelSize:
    try:
        return family.directory_size(config, tensors, shape)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}/config.json: {error} is missing or no number; expected a whole configuration"
        ) from None


def _require_same(
    path: str, config: Mapping[str, Any], tensors: Mapping[str, int], family: ModelFamily, size: ModelSize
) -> None:
    """Look whether a directory's files hold the layers and the embeddings that its config.json speaks of: before a run,
    which looks at all they hold.

    Raises:
        InputError: they do not.
    """
    table = family.names.embeddings.rsplit(".", 1)[-1]
    there = 1 + max((layer_number(name, family.names) for name in tensors), default=-1)
    if family.section is not None and there not in (0, size.layers):  # some decoders have further layers to train with
        raise InputError(f"{path}: its files hold {there} layers, and config.json says {size.layers}: {UNFIT}")
    for name, numbers in tensors.items():
        if name.endswith(f"{table}.weight") and "vocab_size" in config:
            entries = int(config["vocab_size"])
            if numbers != entries * size.hidden:
                raise InputError(
                    f"{path}: {name} holds {numbers:,} numbers, and config.json says {entries:,} x {size.hidden:,}: "
                    f"{UNFIT}"
                )


def directory_config(path: str) -> dict[str, Any]:
    """A Hugging Face directory's config.json.

    Raises:
        InputError: it cannot be read.
    """
    files, root = filesystem(path)
    try:
        config = json.loads(read_bytes(files, f"{root}/config.json"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: config.json cannot be read: {error}; expected a Hugging Face model directory"
        ) from None
    return config


def _tensor_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, out of the headers of the safetensors files; the weights stay where they are."""
    files, root = filesystem(path)
    found: dict[str, tuple[int, ...]] = {}
    for name in weight_files(files, root):
        found |= retried(partial(_header_shapes, files, name), name)
    return found


def _header_shapes(files: fs.FileSystem, name: str) -> dict[str, tuple[int, ...]]:
    with files.open_input_file(name) as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > HEADER_LIMIT_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
            own = {key: entry for key, entry in header.items() if key != "__metadata__"}
            shapes = {key: tuple(map(int, entry["shape"])) for key, entry in own.items()}
            expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in own.values()), default=0)
        except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{name}: not safetensors: {error}; expected a whole file of it") from None
        if stream.size() != expected:
            raise InputError(
                f"{name}: not whole: {stream.size():,} bytes, and its header says {expected:,}; fetch it again"
            )
    return shapes
