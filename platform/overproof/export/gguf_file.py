"""Language models as GGUF, the file format of llama.cpp, and back.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file holds weights, shape and tokenizer,
so an engine needs nothing else.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from pyarrow import fs
from safetensors import safe_open
from transformers import PreTrainedModel

from overproof.engines.gguf_tokens import naming_gguf_faults
from overproof.errors import InputError
from overproof.export.calibration import CalibrationRows
from overproof.export.ggml_blocks import Bytes, aligned, dequantise, quantise
from overproof.export.gguf_calibration import MatrixRounder
from overproof.export.gguf_check import check_configuration, gguf_family_of
from overproof.export.gguf_mixed import choose_mixed
from overproof.export.gguf_name import written_name
from overproof.export.gguf_types import EMBEDDINGS, MIXED, OUTPUT, GgufVariant, TensorTypes, mix_of
from overproof.export.gguf_vocabulary import add_vocabulary
from overproof.models import gguf_rope, hf_directory
from overproof.models.base import GgufFamily
from overproof.models.gguf_layout import GgufContent, GgufLayout, Weights
from overproof.models.pretrained import weight_files
from overproof.registry import FAMILIES

ROPE_TENSORS = (gguf_rope.FREQUENCIES, gguf_rope.LONG, gguf_rope.SHORT)
SUFFIXES = (".weight", ".bias")
END_TOKENS = {"tokenizer.ggml.bos_token_id": "bos_token_id", "tokenizer.ggml.eos_token_id": "eos_token_id"}
ADDERS = {
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    str: gguf.GGUFWriter.add_string,
}


@dataclass(frozen=True)
class _Tensor:
    file: Path
    source: str
    name: str
    shape: tuple[int, ...]
    type: Ggml


def export_gguf(
    model: Path, tokenizer: Path, path: Path, format: GgufVariant, name: str, chat_template: str | None = None,
    rows: CalibrationRows | None = None, tell: Callable[[str], None] = lambda _: None,
    budget: int | GgufVariant = 0,
) -> None:  # fmt: skip
    """Write a Hugging Face directory of a decoder as one GGUF file, a tensor at a time; ``path`` appears when complete.

    ``chat_template`` (Jinja) goes into the file, and ``name`` as llama.cpp may read it (see ``gguf_name``). On ``rows``
    a variant with ``-imatrix`` or ``-gptq`` is calibrated; ``tell`` hears what that is at. ``budget`` is how many bytes
    the matrices of ``MIXED`` may take, or the variant in which they take as many.

    Raises:
        InputError: the model or its tokenizer has a feature that this export does not cover.
    """
    kind, family = gguf_family_of(hf_directory.read_config(model), model)
    config = family.model_class().config_class.from_pretrained(model)
    layout = family.gguf
    check_configuration(kind, layout, config, model)
    mix, rounding = mix_of(format)
    types = TensorTypes(mix, config.num_hidden_layers, layout.repeats_embeddings or not config.tie_word_embeddings)
    part = path.with_name(f"{path.name}.part")
    writer = gguf.GGUFWriter(part, layout.architecture)
    writer.add_name(written_name(name, tokenizer.read_text(encoding="utf-8")))
    for key, value in layout.metadata(config).items():
        ADDERS[type(value)](writer, f"{layout.architecture}.{key}", value)
    writer.add_file_type(mix.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, tokenizer, config)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    tensors, extra = list(_tensors(model, family, config, types)), layout.extra_tensors(config)
    if format == MIXED:
        assert rows is not None
        shapes = {tensor.source: tensor.shape for tensor in tensors if tensor.type is not Ggml.F32}
        copies = Counter(tensor.source for tensor in tensors)
        most_bytes = (
            budget if isinstance(budget, int) else _matrix_bytes(tensors, replace(types, mix=mix_of(budget)[0]))
        )
        where = f"compress.mixed: {path.stem}"
        chosen = choose_mixed(model, family, config, shapes, copies, rows, most_bytes, where, tell)
        tensors = [replace(tensor, type=chosen.get(tensor.source, tensor.type)) for tensor in tensors]
    for tensor in tensors:
        dtype, bytes_shape = _layout(tensor)
        size_bytes = int(np.prod(bytes_shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, bytes_shape, dtype, size_bytes, tensor.type)
    for tensor_name, vector in extra.items():
        writer.add_tensor_info(tensor_name, vector.shape, vector.dtype, vector.nbytes, Ggml.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        kinds = {tensor.source: tensor.type for tensor in tensors}
        rounder = MatrixRounder(family, config, kinds, rounding, Path(folder))
        if rounding != "plain":
            assert rows is not None
            rounder.round_all(model, rows, lambda done, of: tell(f"calibrated {done} of {of} layers"))
        for tensor in tensors:
            writer.write_tensor_data(_written(tensor, layout, config, rounder))
    for vector in extra.values():
        writer.write_tensor_data(vector)
    writer.close()
    part.replace(path)


def _matrix_bytes(tensors: Iterable[_Tensor], types: TensorTypes) -> int:
    """That these would take in other types, those in fp32 apart."""
    others = (replace(each, type=types.of(each.name, each.shape)) for each in tensors if each.type is not Ggml.F32)
    return sum(aligned(int(np.prod(shape)) * dtype.itemsize) for dtype, shape in map(_layout, others))


def _written(tensor: _Tensor, layout: GgufLayout, config: Any, rounder: MatrixRounder) -> Bytes:
    rounded = rounder.blocks(tensor.source)
    if rounded is not None:
        return rounded
    with safe_open(tensor.file, framework="pt") as opened:
        weights: Weights = opened.get_tensor(tensor.source).to(torch.float32).numpy()
    change = layout.change(tensor.source)
    return quantise(weights if change is None else change.to_gguf(weights, config), tensor.type)


def read_gguf(path: Path) -> PreTrainedModel:
    """The model that a GGUF file holds, dequantised to fp32, from the file alone; in evaluation mode.

    Raises:
        InputError: the file is damaged, of an architecture, or holds a tensor, that this export does not write, or
            lacks one.
    """
    with naming_gguf_faults(path):
        return _model_of(gguf.GGUFReader(path), path)


def _model_of(reader: gguf.GGUFReader, path: Path) -> PreTrainedModel:
    architecture = reader.fields["general.architecture"].contents()
    prefix, family = f"{architecture}.", _family_by_layout(architecture, path)
    layout: GgufLayout = family.gguf
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    rope = {name: _dequantised(tensors.pop(name)) for name in ROPE_TENSORS if name in tensors}
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith((prefix, *END_TOKENS))}
    read = {key.removeprefix(prefix): value for key, value in fields.items()}
    heads_width = read["embedding_length"] // read["attention.head_count"]
    read = {"attention.key_length": heads_width, "rope.dimension_count": heads_width, **read}  # the format's defaults
    config = family.model_class().config_class(
        **layout.settings(GgufContent(read, frozenset(tensors), rope)),
        **{setting: fields.get(key) for key, setting in END_TOKENS.items()},
        pad_token_id=None,
        tie_word_embeddings=OUTPUT not in tensors,
        attn_implementation=family.attention,
    )
    with torch.device("meta"):
        keys = list(family.model_class()(config).state_dict())
    names = _names(layout, config)
    state = {}
    for key in family.untied(config, keys):
        name = names.get_name(key, try_suffixes=SUFFIXES)
        if name not in tensors:
            raise InputError(f"{path}: tensor {name} is missing; expected a model that overproof exported")
        weights = _dequantised(tensors.pop(name))
        change = layout.change(key)
        state[key] = torch.from_numpy(
            np.require(weights if change is None else change.from_gguf(weights, config), requirements=["C", "W"])
        )
    if tensors:
        raise InputError(f"{path}: tensor {min(tensors)} is unknown; expected a model that overproof exported")
    model: PreTrainedModel = hf_directory.model_of_state(family, config, state)
    return model


def _family_by_layout(architecture: str, path: Path) -> Any:
    known = [family for family in FAMILIES.values() if isinstance(family, GgufFamily)]
    for family in known:
        if family.gguf.architecture == architecture:
            return family
    expected = " or ".join(dict.fromkeys(family.gguf.architecture for family in known))
    raise InputError(f"{path}: architecture {architecture!r}; expected {expected}")


def _dequantised(tensor: gguf.ReaderTensor) -> Weights:
    return dequantise(tensor.data, tensor.tensor_type)


def _tensors(model: Path, family: Any, config: Any, types: TensorTypes) -> Iterator[_Tensor]:
    names = _names(family.gguf, config)
    for file in map(Path, weight_files(fs.LocalFileSystem(), str(model))):
        with safe_open(file, framework="pt") as opened:
            for source in sorted(family.untied(config, list(opened.keys()))):
                name = names.get_name(source, try_suffixes=SUFFIXES)
                if name is None:
                    raise InputError(
                        f"{file}: tensor {source} has no place in a GGUF file of a {family.gguf.architecture} model"
                    )
                change, shape = family.gguf.change(source), tuple(opened.get_slice(source).get_shape())
                if change is not None and change.transposes:
                    shape = shape[::-1]
                again = [OUTPUT] if family.gguf.repeats_embeddings and config.tie_word_embeddings else []
                for written in (name, *(again if name == EMBEDDINGS else ())):
                    yield _Tensor(file, source, written, shape, types.of(written, shape))


def _layout(tensor: _Tensor) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The array type a tensor is written as, and its shape in elements of that type."""
    if tensor.type in (Ggml.F32, Ggml.F16):
        return np.dtype(np.float32 if tensor.type is Ggml.F32 else np.float16), tensor.shape
    return np.dtype(np.uint8), tuple(gguf.quants.quant_shape_to_byte_shape(tensor.shape, tensor.type))


def _names(layout: GgufLayout, config: Any) -> gguf.TensorNameMap:
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.architecture)
    return gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
