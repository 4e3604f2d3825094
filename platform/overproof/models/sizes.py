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
from functools import partial
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from overproof.config.models import LayeredModel, Masked, ModelSection, OfTeacher, Pretrained, Pruned, StagedModel
from overproof.config.training import Lora, Train
from overproof.errors import InputError, suggest_name
from overproof.files import filesystem, read_bytes, retried
from overproof.models.base import ConvolutionalFamily
from overproof.models.channels import narrowed_config, narrowed_size
from overproof.models.pretrained import weight_files
from overproof.registry import FAMILIES

if TYPE_CHECKING:
    from overproof.models.base import DataShape, LayerNames, ModelFamily

HEADER_LIMIT_BYTES = 100_000_000  # as the safetensors library has it
FP32_BYTES = 4  # bytes
UNTOLD = 1 << 40  # where a configuration does not say how many there are
UNFIT = "expected the weights and the configuration of one model"
POSITIONS = ("max_position_embeddings", "n_positions")  # what families call the most tokens of a row
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # and how many layers there are


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
    layers = FAMILIES[size.family].names.layers.rsplit(".", 1)[-1]
    rank, adapters = train.lora.rank, list[int]()
    for name, lengths in _tensor_shapes(train.model.path).items():
        if len(lengths) == 2 and _has_adapter(name, layers, train.lora):
            adapters += [rank * length for length in lengths]
    return replace(size, adapters=tuple(adapters), adapter_rank=rank)


def _has_adapter(tensor: str, layers: str, lora: Lora) -> bool:
    """Whether a matrix is one that the library peft gives adapters."""
    module = tensor.removesuffix(".weight")
    if lora.targets == "all-linear":
        return module != tensor and _layer_number(tensor, layers) >= 0
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
    if isinstance(model, Pruned) and isinstance(family, ConvolutionalFamily):
        if isinstance(teacher, Pretrained):
            return narrowed_size(directory_config(teacher.path), model, family, shape)
        assert isinstance(teacher, StagedModel)
        return model_size(model.left_of(teacher), shape)
    if not family.names.feed_forward:
        raise InputError(
            f"a teacher of the family {whole.family} has no layers of its own; expected a student of another kind, "
            "such as {kind: pretrained, path: ...}"
        )
    model.require_possible(whole.layers, whole.intermediate, UNTOLD, whole.hidden)
    if isinstance(teacher, Pretrained):
        return _directory_size(teacher.path, shape, model, whole.intermediate)
    assert isinstance(teacher, LayeredModel)
    return model_size(model.left_of(teacher), shape)


def _kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 1)


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
    if family.section is None:
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


def left_config(config: Mapping[str, Any], model: OfTeacher, family: ModelFamily) -> dict[str, Any]:
    """``student_config``, of a family of any kind."""
    if isinstance(family, ConvolutionalFamily):
        return narrowed_config(config, model, family)
    return student_config(config, model, family.names)


def student_config(config: Mapping[str, Any], model: OfTeacher, names: LayerNames) -> dict[str, Any]:
    """The content of a config.json for what is left of its model, whose layers are equal.

    Raises:
        InputError: it has not as much, or its heads cannot be taken away by themselves, or its layers not be masked.
    """
    architecture = (config.get("architectures") or ["?"])[0]
    if isinstance(model, Masked):
        model.require_linear(names.linear, f"layers of a {architecture}")
    if isinstance(model, Pruned) and model.kv_heads is not None and names.attention_output is None:
        raise cannot_lose("kv_heads", architecture)
    if isinstance(model, Pruned) and model.hidden_sizes is not None:
        raise cannot_lose("hidden_sizes", architecture, "resnet")
    if isinstance(model, Pruned) and model.hidden_size is not None and not names.width_goes:
        raise cannot_lose("hidden_size", architecture)
    layers, channels = (
        next((int(config[name]) for name in known if config.get(name)), UNTOLD)
        for known in (LAYERS, (names.intermediate, "intermediate_size"))
    )
    model.require_possible(layers, channels, _kv_heads(config), int(config.get("hidden_size") or UNTOLD))
    found = dict(config) if model.kept_layers is None else with_layers(config, model.kept_layers, names)
    if not isinstance(model, Pruned):
        return found
    if model.intermediate_size is not None:
        called = {name for name in (names.intermediate, "intermediate_size") if name in config} or {names.intermediate}
        found |= dict.fromkeys(called, model.intermediate_size)
    if model.kv_heads is not None or model.hidden_size is not None:
        heads, kv_heads = int(config["num_attention_heads"]), _kv_heads(config)
        found |= {"head_dim": int(config.get("head_dim") or int(config["hidden_size"]) // heads)}
        left = model.kv_heads or kv_heads
        found |= {"num_attention_heads": heads // kv_heads * left, "num_key_value_heads": left}
    if model.hidden_size is not None:
        found |= {"hidden_size": model.hidden_size}
    return found


def cannot_lose(field: str, architecture: str, able: str = "llama") -> InputError:
    """Of a pruned student whose teacher has no such part by itself."""
    return InputError(
        f"{field}: a {architecture} cannot lose any by themselves; expected null and fewer layers or other parts, "
        f"or a teacher of a family such as {able}"
    )


def with_layers(config: Mapping[str, Any], layers: int, names: LayerNames) -> dict[str, Any]:
    """The content of a config.json for fewer layers: what a layer is by its place, it is by its new place."""
    lists = {name: config[name][:layers] for name in names.per_layer if isinstance(config.get(name), list)}
    called = [name for name in LAYERS if name in config] or LAYERS[:1]
    return {**config, **lists, **dict.fromkeys(called, layers)}


def _directory_size(path: str, shape: DataShape, student: OfTeacher | None = None, channels: int = 0) -> ModelSize:
    """Of a directory's model, or of what a student takes from it, which has so many channels: layers are all alike."""
    config = directory_config(path)
    tensors = {name: math.prod(lengths) for name, lengths in _tensor_shapes(path).items()}
    _, family = family_of(config, path)
    names = family.names
    layers = names.layers.rsplit(".", 1)[-1]
    most_layers = None
    if student is not None:
        if all(_layer_number(name, layers) < 0 for name in tensors):
            raise InputError(
                f"{path}: keeps no layers at {names.layers}, so fewer of them cannot be taken; expected a "
                "student of another kind, such as {kind: pretrained, path: ...}"
            )
        most_layers = student.kept_layers
        kv_heads, hidden = _kv_heads(config), int(config.get("hidden_size") or 0)
        config = student_config(config, student, names)
        if isinstance(student, Pruned):
            tensors = _pruned_tensors(tensors, names, student, channels, kv_heads)
            if student.hidden_size is not None:
                tensors = _narrowed_tensors(tensors, names, student.hidden_size, hidden)
        if most_layers is not None:
            tensors = {name: size for name, size in tensors.items() if _layer_number(name, layers) < most_layers}
        config |= {} if most_layers is None else {"num_hidden_layers": most_layers}
    try:
        found = family.directory_size(config, tensors, shape)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}/config.json: {error} is missing or no number; expected a whole configuration"
        ) from None
    if most_layers is not None:
        return replace(found, layers=most_layers)
    if student is None:
        _require_same(path, config, tensors, family, found)
    return found


def _pruned_tensors(
    tensors: Mapping[str, int], names: LayerNames, student: Pruned, channels: int, kv_heads: int
) -> dict[str, int]:
    """Numbers in each tensor once channels and heads are gone."""
    assert student.kv_heads is None or names.attention_output is not None
    *into, out = names.feed_forward
    narrowed = {f".{name}.{end}" for name in into for end in ("weight", "bias")} | {f".{out}.weight"}
    projections = (names.queries, names.keys, names.values)
    heads = {f".{name}.{end}" for name in projections for end in ("weight", "bias")}
    heads.add(f".{names.attention_output}.weight")
    found = dict(tensors)
    for name, numbers in tensors.items():
        if student.intermediate_size is not None and name.endswith(tuple(narrowed)):
            found[name] = numbers // channels * student.intermediate_size
        elif student.kv_heads is not None and name.endswith(tuple(heads)):
            found[name] = numbers // kv_heads * student.kv_heads
    return found


def _narrowed_tensors(tensors: Mapping[str, int], names: LayerNames, hidden: int, before: int) -> dict[str, int]:
    """Numbers in each tensor once channels between layers are gone."""
    inner = (names.queries, names.keys, names.values, *names.feed_forward[:-1])
    other = (*(f".{name}.bias" for name in inner), ".q_norm.weight", ".k_norm.weight")
    return {name: numbers if name.endswith(other) else numbers // before * hidden for name, numbers in tensors.items()}


def _require_same(
    path: str, config: Mapping[str, Any], tensors: Mapping[str, int], family: ModelFamily, size: ModelSize
) -> None:
    """Look whether a directory's files hold the layers and the embeddings that its config.json speaks of: before a run,
    which looks at all they hold.

    Raises:
        InputError: they do not.
    """
    layers, table = (name.rsplit(".", 1)[-1] for name in (family.names.layers, family.names.embeddings))
    there = 1 + max((_layer_number(name, layers) for name in tensors), default=-1)
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
