"""The variants of a GGUF file: the type of each of its tensors, and how it is rounded.

The mixes are llama.cpp's, those of Falcon apart (https://github.com/ggml-org/llama.cpp, `src/llama-quant.cpp`,
llama_tensor_get_type): the output layer, and values and the feed-forward layer's last matrices in some layers, keep
more bits. A row that is no whole super-blocks of 256 falls back to a type of blocks of 32 and the next more bits: most
of SmolLM2's, whose width is 576. In `q4_0` the tables of embeddings and outputs are in q8_0: in four bits a tied one
costs the most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from gguf import GGMLQuantizationType as Ggml
from gguf import LlamaFileType

from overproof.export.ggml_blocks import BLOCKS, NARROWER, SUPER_BLOCK

Rounding = Literal["plain", "imatrix", "gptq"]
OUTPUT = "output.weight"
EMBEDDINGS = "token_embd.weight"
WHOLE_TENSORS = ("position_embd.weight",)  # which llama.cpp looks up in fp32
VALUES, FUSED, DOWN = "attn_v", "attn_qkv", "ffn_down"  # names within a layer


@dataclass(frozen=True)
class Mix:
    """Which type tensors have by default, and which have others."""

    base: Ggml
    file_type: LlamaFileType
    output: Ggml  # of the layer that gives the logits, which may be the table of embeddings
    embeddings: Ggml | None = None  # of a table of its own
    fused: Ggml | None = None  # of queries, keys and values together
    more: Mapping[str, Ggml] = field(default_factory=dict)  # by name within a layer, in the layers of ``_has_more``


MORE_BITS = {VALUES: Ggml.Q6_K, DOWN: Ggml.Q6_K}
MIXES: dict[str, Mix] = {
    "f32": Mix(Ggml.F32, LlamaFileType.ALL_F32, Ggml.F32),
    "f16": Mix(Ggml.F16, LlamaFileType.MOSTLY_F16, Ggml.F16),
    "q8_0": Mix(Ggml.Q8_0, LlamaFileType.MOSTLY_Q8_0, Ggml.Q8_0),
    "q6_k": Mix(Ggml.Q6_K, LlamaFileType.MOSTLY_Q6_K, Ggml.Q6_K),
    "q5_k_m": Mix(Ggml.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, Ggml.Q6_K, fused=Ggml.Q6_K, more=MORE_BITS),
    "q4_k_m": Mix(Ggml.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, Ggml.Q6_K, fused=Ggml.Q5_K, more=MORE_BITS),
    "q4_0": Mix(Ggml.Q4_0, LlamaFileType.MOSTLY_Q4_0, Ggml.Q8_0, embeddings=Ggml.Q8_0),
    "mixed": Mix(Ggml.Q4_0, LlamaFileType.MOSTLY_Q4_0, Ggml.Q8_0),  # each matrix by itself: ``gguf_mixed``
}
MIXED = "mixed-gptq"
GgufVariant = Literal[
    "f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q6_k-imatrix", "q5_k_m-imatrix", "q4_k_m-imatrix",
    "q4_0-imatrix", "q5_k_m-gptq", "q4_k_m-gptq", "q4_0-gptq", "mixed-gptq",
]  # fmt: skip


def mix_of(variant: str) -> tuple[Mix, Rounding]:
    """The types of a variant, and how they are rounded."""
    name, _, rounding = variant.partition("-")
    found: Rounding = rounding or "plain"  # type: ignore[assignment]
    assert found in get_args(Rounding)
    return MIXES[name], found


@dataclass(frozen=True)
class TensorTypes:
    """The types of the tensors of one model in one variant."""

    mix: Mix
    layers: int
    has_output: bool  # whether the table of embeddings and the output layer are two tensors

    def of(self, name: str, shape: tuple[int, ...]) -> Ggml:
        """By the tensor's name in the file, such as ``blk.0.ffn_down.weight``."""
        if len(shape) == 1 or name in WHOLE_TENSORS:
            return Ggml.F32
        found = self._wanted(name)
        return NARROWER.get(found, found) if shape[-1] % SUPER_BLOCK else found

    def _wanted(self, name: str) -> Ggml:
        if name == OUTPUT or (name == EMBEDDINGS and not self.has_output):
            return self.mix.output
        if name == EMBEDDINGS:
            return self.mix.embeddings or self.mix.base
        _, _, place = name.partition("blk.")
        number, _, part = place.removesuffix(".weight").partition(".")
        if part in self.mix.more and _has_more(int(number), self.layers):
            return self.mix.more[part]
        return (self.mix.fused or self.mix.base) if part == FUSED else self.mix.base


def _has_more(layer: int, layers: int) -> bool:
    """The first and last eighths, and each third between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def is_compensated(kind: Ggml, rounding: Rounding) -> bool:
    """Whether GPTQ rounds tensors of a type: of six bits and more there is nothing to gain."""
    return rounding == "gptq" and kind in BLOCKS
