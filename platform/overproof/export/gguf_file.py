"""Language models as GGUF, the file format of llama.cpp, and back.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file holds weights, shape and tokenizer,
so an engine needs nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from overproof.errors import InputError
from overproof.export.gguf_vocabulary import add_vocabulary

GgufVariant = Literal["f16", "q8_0", "q4_0"]
Weights = NDArray[np.float32]

FILE_TYPES: dict[GgufVariant, tuple[Ggml, gguf.LlamaFileType]] = {
    "f16": (Ggml.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Ggml.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Ggml.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# The table of a tied model is also its last matrix; in four bits that costs the most where it can be seen most.
VOCABULARY_TENSORS = ("token_embd.weight", "output.weight")
BLOCK = 32  # weights that share one scale in q8_0 and q4_0


@dataclass(frozen=True)
class _Tensor:
    source: str
    name: str
    shape: tuple[int, ...]
    type: Ggml


def export_gguf(
    model: Path, tokenizer: Path, path: Path, format: GgufVariant, name: str, chat_template: str | None = None
) -> None:
    """Write a Hugging Face Llama directory as one GGUF file, a tensor at a time; ``path`` appears when complete.

    ``chat_template`` (Jinja) goes into the file.

    Raises:
        InputError: the model or its tokenizer has a feature that this export does not cover.
    """
    config = LlamaConfig.from_pretrained(model)
    _check(config, model)
    base, file_type = FILE_TYPES[format]
    part = path.with_name(f"{path.name}.part")
    writer = gguf.GGUFWriter(part, "llama")
    _add_shape(writer, config, name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, tokenizer, config)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    tensors = list(_tensors(model, config, base))
    for tensor in tensors:
        dtype, bytes_shape = _layout(tensor)
        size_bytes = int(np.prod(bytes_shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, bytes_shape, dtype, size_bytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    files = {key: file for file in sorted(model.glob("*.safetensors")) for key in _keys(file)}
    for tensor in tensors:
        with safe_open(files[tensor.source], framework="pt") as opened:
            weights: Weights = opened.get_tensor(tensor.source).to(torch.float32).numpy()
        heads = _rotary_heads(tensor.source, config)
        if heads:
            weights = interleave_rotary(weights, heads)
        writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(weights), tensor.type))
    writer.close()
    part.replace(path)


def read_gguf(path: Path) -> LlamaForCausalLM:
    """The model that a GGUF file holds, dequantised to fp32, from the file alone; in evaluation mode."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _read_config(reader, tied="output.weight" not in tensors)
    with torch.device("meta"):  # no weights are drawn only to be replaced
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    names = _names(config)
    state = {}
    for key in model.state_dict():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = tensors.pop(names.get_name(key, try_suffixes=(".weight",)))
        weights: Weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = _rotary_heads(key, config)
        state[key] = torch.from_numpy(split_rotary(weights, heads) if heads else weights)
    if tensors:
        raise InputError(f"{path}: tensor {min(tensors)} is unknown; expected a Llama model that overproof exported")
    model.load_state_dict(state, strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    return model.eval()


def interleave_rotary(weights: Weights, heads: int) -> Weights:
    """Rows of a query or key matrix from Hugging Face's order to llama.cpp's.

    Rotary embedding (arXiv 2104.09864) turns pairs of rows; the first keeps a head's pairs as two halves, the
    second keeps them side by side.
    """
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def split_rotary(weights: Weights, heads: int) -> Weights:
    """The inverse of ``interleave_rotary``."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _rotary_heads(source: str, config: LlamaConfig) -> int:
    if source.endswith("q_proj.weight"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if source.endswith("k_proj.weight") else 0


def _check(config: LlamaConfig, where: Path) -> None:
    rotary = config.rope_parameters["rope_type"]
    found = {
        f"model_type {config.model_type!r}": config.model_type != "llama",
        f"hidden_act {config.hidden_act!r}": config.hidden_act != "silu",
        f"rope_type {rotary!r}": rotary != "default",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        f"a hidden_size of {config.hidden_size}": config.hidden_size % BLOCK,
        f"an intermediate_size of {config.intermediate_size}": config.intermediate_size % BLOCK,
        f"heads of {config.head_dim} in all": config.num_attention_heads * config.head_dim % BLOCK,
    }
    for feature, unfit in found.items():
        if unfit:
            raise InputError(
                f"{where}/config.json: found {feature}; the GGUF export covers Llama models without biases or "
                f"scaled rotary positions, whose widths are multiples of {BLOCK}"
            )


def _add_shape(writer: gguf.GGUFWriter, config: LlamaConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _read_config(reader: gguf.GGUFReader, tied: bool) -> LlamaConfig:
    def value(key: str) -> Any:
        return reader.fields[key].contents()

    return LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        max_position_embeddings=value("llama.context_length"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        head_dim=value("llama.attention.key_length"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )


def _tensors(model: Path, config: LlamaConfig, base: Ggml) -> Iterator[_Tensor]:
    names = _names(config)
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for source in sorted(opened.keys()):
                if source == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                name = names.get_name(source, try_suffixes=(".weight",))
                if name is None:
                    raise InputError(f"{file}: tensor {source} has no place in a Llama GGUF file")
                shape = tuple(opened.get_slice(source).get_shape())
                kept = base is Ggml.Q4_0 and name in VOCABULARY_TENSORS
                kind = Ggml.F32 if len(shape) == 1 else Ggml.Q8_0 if kept else base
                yield _Tensor(source, name, shape, kind)


def _layout(tensor: _Tensor) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The array type a tensor is written as, and its shape in elements of that type."""
    if tensor.type in (Ggml.F32, Ggml.F16):
        return np.dtype(np.float32 if tensor.type is Ggml.F32 else np.float16), tensor.shape
    return np.dtype(np.uint8), tuple(gguf.quants.quant_shape_to_byte_shape(tensor.shape, tensor.type))


def _names(config: LlamaConfig) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
