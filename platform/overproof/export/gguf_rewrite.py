"""A GGUF file written anew from another: in another variant, with a name and a chat template."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Ggml
from gguf import GGUFValueType

from overproof.engines.gguf_tokens import CHAT_TEMPLATE
from overproof.export import llama_cpp_converter
from overproof.export.ggml_blocks import dequantise, quantise
from overproof.export.gguf_check import BLOCK
from overproof.export.gguf_types import EMBEDDINGS, OUTPUT, GgufVariant, TensorTypes, mix_of
from overproof.export.gguf_vocabulary import UNREACHED, unused_token

OWN_KEYS = ("GGUF.", "general.architecture", "general.name", "general.file_type", "general.quantization_version")
WIDE = (Ggml.F16, Ggml.BF16)  # what a converter leaves to be quantised; what it writes in 32 bits stays so
UNUSED_ENTRY: dict[str, Callable[[int], Any]] = {
    "tokenizer.ggml.tokens": unused_token,
    "tokenizer.ggml.scores": lambda _: UNREACHED,
    "tokenizer.ggml.token_type": lambda _: int(gguf.TokenType.UNUSED),
}


def convert_gguf(
    model: Path, unquantised: Path, file: Path, variant: GgufVariant, name: str, chat_template: str | None
) -> None:
    """Write a Hugging Face directory in a variant, through the converter of a checkout of llama.cpp.

    ``unquantised`` is the same model's file in half precision; where it is not there, or is the one to be written, the
    converter runs.

    Raises:
        InputError: the converter refuses the model.
    """
    if unquantised != file and unquantised.is_file():
        rewrite_gguf(unquantised, file, variant, name, chat_template)
        return
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        converted = Path(folder) / "converted.gguf"
        llama_cpp_converter.convert(model, converted)
        rewrite_gguf(converted, file, variant, name, chat_template)


def rewrite_gguf(source: Path, file: Path, variant: GgufVariant, name: str, chat_template: str | None) -> None:
    """Write the model of one file as another, a tensor at a time; ``file`` appears when it is complete.

    Matrices in 16 bits become what the variant has them in, where their rows are whole blocks. A vocabulary that has
    fewer entries than the model has rows is filled up with unused ones: llama.cpp loads no other.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    layers = int(reader.fields[f"{architecture}.block_count"].contents())
    mix, _ = mix_of(variant)
    kinds = TensorTypes(mix, layers, any(tensor.name == OUTPUT for tensor in reader.tensors))
    part = file.with_name(f"{file.name}.part")
    writer = gguf.GGUFWriter(part, architecture)
    writer.add_name(name)
    writer.add_file_type(mix.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rows = next(_shape(tensor)[0] for tensor in reader.tensors if tensor.name == EMBEDDINGS)
    for key, field in reader.fields.items():
        if key.startswith(OWN_KEYS) or (key == CHAT_TEMPLATE and chat_template is not None):
            continue
        inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        value = field.contents()
        if key in UNUSED_ENTRY:
            value = value + [UNUSED_ENTRY[key](row) for row in range(len(value), rows)]
        writer.add_key_value(key, value, field.types[0], sub_type=inner)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    types = {tensor.name: _written_type(tensor, kinds) for tensor in reader.tensors}
    for tensor in reader.tensors:
        shape, kind = _shape(tensor), types[tensor.name]
        if kind in (Ggml.F32, Ggml.F16):
            dtype: np.dtype[Any] = np.dtype(np.float32 if kind is Ggml.F32 else np.float16)
        else:
            dtype, shape = np.dtype(np.uint8), tuple(gguf.quants.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(tensor.name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        kind = types[tensor.name]
        kept = tensor.tensor_type is kind
        written = tensor.data if kept else quantise(dequantise(tensor.data, tensor.tensor_type), kind)
        writer.write_tensor_data(written)
    writer.close()
    part.replace(file)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(length) for length in reversed(tensor.shape))


def _written_type(tensor: gguf.ReaderTensor, kinds: TensorTypes) -> Ggml:
    if tensor.tensor_type not in WIDE:
        return tensor.tensor_type
    shape = _shape(tensor)
    return kinds.of(tensor.name, shape) if shape[-1] % BLOCK == 0 else Ggml.F16
