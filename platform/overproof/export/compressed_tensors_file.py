"""Language models as compressed-tensors, the layout of safetensors that vLLM loads as it is, and back.

Of each linear layer in the model's layers a file holds codes and scales (see ``compressed_tensors_schemes``), and the
rest in bfloat16. What would stand in config.json stands in the file's header, beside a chat template: one file is the
whole model but for its tokenizer.

Shapes: R rows of a matrix (outputs), C columns (inputs).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from overproof.errors import InputError
from overproof.export.calibration import CalibrationRows, calibrate
from overproof.export.compressed_tensors_schemes import (
    PACKED,
    ROUNDED_INPUTS,
    SCALE,
    SCHEMES,
    SHAPE,
    WEIGHT,
    Scheme,
    group_size,
)
from overproof.models.hf_directory import load_model, model_of_state, read_config
from overproof.models.pretrained import weight_files
from overproof.models.safetensors_writer import TensorShape, plan_files, write_file
from overproof.models.sizes import family_of

CONFIG, TEMPLATE, VARIANT = "config", "chat_template", "variant"  # in a file's header
SETTINGS = "quantization_config"  # of a config.json
PARTS = (PACKED, SHAPE, SCALE, WEIGHT)  # of a matrix
WHOLE = torch.bfloat16
# Root mean square of the errors over that of the numbers, at most: see ``gguf_weights``.
MOST_ERROR = {"fp8": 0.05, "int8": 0.05, "int4": 0.5}
State = dict[str, Tensor]


def linear_weights(config: Any, family: Any) -> dict[str, int]:
    """The matrices that such a model multiplies with in its layers, by name, and how many columns each has."""
    with torch.device("meta"):
        model = family.model_class()(config)
    layers = family.names.layers
    named = model.get_submodule(layers).named_modules()
    return {f"{layers}.{name}.weight": part.in_features for name, part in named if type(part) is nn.Linear}


def configuration(read: dict[str, Any], where: object) -> tuple[Any, Any]:
    """The configuration that a config.json describes, and its family."""
    plain = {name: value for name, value in read.items() if name != SETTINGS}
    _, family = family_of(plain, where)
    return family.model_class().config_class.from_dict(plain), family


def write_compressed(
    model: Path, file: Path, variant: str, chat_template: str | None = None, rows: CalibrationRows | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> None:  # fmt: skip
    """Write a Hugging Face directory of a decoder in a variant, such as ``int8``, or in ``bf16`` as it is; ``file``
    appears when it is complete. On ``rows`` a variant with ``-gptq`` is calibrated; ``tell`` hears what that is at.
    """
    described = read_config(model)
    config, family = configuration(described, model)
    described |= {"dtype": "bfloat16"}
    name, _, rounding = variant.partition("-")
    scheme = SCHEMES.get(name)
    state = State()
    if scheme is not None:
        matrices = linear_weights(config, family)
        group = group_size(matrices.values()) if scheme.grouped else None
        described[SETTINGS] = scheme.settings(family.names.output, group)
        if rounding:
            assert rows is not None
            assert group is not None
            state |= _calibrated(model, family.names.layers, scheme, group, rows, tell)
    for source, value in _weights(model, family, config):
        if scheme is None or source not in matrices:
            state[source] = value.to(WHOLE)
        elif not rounding:
            state |= _named(source, scheme.encode(value.float(), group))
    metadata = {CONFIG: json.dumps(described), VARIANT: name}
    if chat_template is not None:
        metadata[TEMPLATE] = chat_template
    shapes = {key: TensorShape.of(value) for key, value in state.items()}
    [planned] = plan_files(shapes, sum(shape.size_bytes for shape in shapes.values()))
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as stream:
        write_file(stream, planned, shapes, (state[key] for key in planned.tensors), metadata)
    part.replace(file)


def _weights(model: Path, family: Any, config: Any) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(fs.LocalFileSystem(), str(model)):
        with safe_open(file, framework="pt") as opened:
            for name in family.untied(config, list(opened.keys())):
                yield name, opened.get_tensor(name)


def _named(matrix: str, parts: State) -> State:
    base = matrix.removesuffix(WEIGHT)
    return {f"{base}{part}": value for part, value in parts.items()}


def _calibrated(
    model: Path, layers: str, scheme: Scheme, group: int, rows: CalibrationRows, tell: Callable[[str], None]
) -> State:
    """All matrices, layer after layer; later ones are calibrated on what earlier ones give as they are rounded."""
    made = State()

    def renew(name: str, weights_RC: Tensor, inputs_CC: Tensor) -> Tensor:
        parts = scheme.compensated(weights_RC.float(), inputs_CC, group)
        made.update(_named(name, parts))
        return scheme.decode(parts)

    calibrate(
        load_model(model), layers, rows.batches(), rows.predict, renew,
        lambda done, of: tell(f"calibrated {done} of {of} layers"),
    )  # fmt: skip
    return made


# --- back -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompressedHeader:
    """What a file says beside its tensors."""

    config: dict[str, Any]  # as a config.json has it
    chat_template: str | None
    variant: str

    @property
    def scheme(self) -> Scheme | None:
        """None where nothing is rounded."""
        return SCHEMES.get(self.variant)


@contextmanager
def opened(file: Path) -> Iterator[tuple[Any, CompressedHeader]]:
    """A file's tensors, and its header.

    Raises:
        InputError: it is missing, damaged, or not one that overproof exported.
    """
    if not file.is_file():
        raise InputError(f"{file}: missing; expected a model in compressed-tensors")
    try:
        found = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read: {error}; expected a whole safetensors file") from None
    with found as tensors:
        said = tensors.metadata() or {}
        if CONFIG not in said or VARIANT not in said:
            raise InputError(f"{file}: has no {CONFIG} in its header; expected a model that overproof exported")
        yield tensors, CompressedHeader(json.loads(said[CONFIG]), said.get(TEMPLATE), said[VARIANT])


def read_compressed(file: Path) -> PreTrainedModel:
    """The model that a file holds, in fp32 and in evaluation mode, from the file alone. Where its engine rounds
    activations, it does so, too.

    Raises:
        InputError: as ``opened``, or it lacks a tensor.
    """
    with opened(file) as (tensors, header):
        config, family = configuration(header.config, file)
        config._attn_implementation = family.attention
        try:
            state = dict(_numbers(tensors, header))
            model = model_of_state(family, config, state)
        except (KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{file}: its tensors are not its model's: {error}; expected a whole file") from None
    if header.scheme is not None and header.scheme.rounds_activations:
        for part in model.get_submodule(family.names.layers).modules():
            if type(part) is nn.Linear:
                part.__class__ = ROUNDED_INPUTS[header.variant]
    return model


def _numbers(tensors: Any, header: CompressedHeader) -> Iterator[tuple[str, Tensor]]:
    """What each tensor of a model is, by its name there."""
    keys = set(tensors.keys())
    for key in sorted(keys):
        base, _, part = key.rpartition(".")
        if part not in PARTS or f"{base}.{SCALE}" not in keys:  # a bias among them
            yield key, tensors.get_tensor(key).float()
        elif part == SCALE:
            assert header.scheme is not None
            parts = {each: tensors.get_tensor(f"{base}.{each}") for each in PARTS if f"{base}.{each}" in keys}
            yield f"{base}.{WEIGHT}", header.scheme.decode(parts)


def require_same_weights(file: Path, unquantised: Path) -> None:
    """Return where a file holds the tensors of the unquantised one, as far as its variant can.

    Raises:
        RuntimeError: one is missing, or is another.
    """
    with opened(unquantised) as (whole, header), opened(file) as (tensors, other):
        expected, keys = dict(_numbers(whole, header)), set(tensors.keys())
        for name, value in _numbers(tensors, other):
            if name not in expected or expected[name].shape != value.shape:
                raise RuntimeError(f"{file}: tensor {name} is not one of {unquantised.name}: the export is wrong")
            size, error = (float(torch.linalg.vector_norm(each)) for each in (expected[name], value - expected[name]))
            most = MOST_ERROR[other.variant] if f"{name}_scale" in keys else 0.0
            if not (error / size if size else error) <= most or not math.isfinite(error):
                raise RuntimeError(
                    f"{file}: tensor {name} is {error / size if size else error:.3g} of its numbers from what it was "
                    f"made from, and rounding to {other.variant} explains {most:g}: the export is wrong"
                )
            del expected[name]
    if expected:
        raise RuntimeError(f"{file}: tensor {min(expected)} is missing: the export is wrong")
