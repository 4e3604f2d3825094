"""Tiny models of every family of decoders, with what matters to an engine, and the tokenizer that each has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from made_tokenizers import byte_level, phi3, sentencepiece_bpe
from overproof.data.text_tokenizer import added_tokens
from overproof.models import hf_directory
from overproof.models.base import DataShape
from overproof.registry import FAMILIES

VOCABULARY, POSITIONS = 320, 32
SHAPE = DataShape("language_modeling", VOCABULARY, POSITIONS, bos_id=0, end_id=0)
NUMBERS = {"hidden_size": 64, "intermediate_size": 96, "layers": 3, "heads": 4, "kv_heads": 2, "initializer_range": 0.1}
# llama.cpp takes GELU from a table in half precision.
FP32_NATS, GELU_NATS = 1e-5, 2e-3
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
LONG_POSITIONS = {"original_max_position_embeddings": 64, "max_position_embeddings": 512}
GEMMA_ROPE = {
    "full_attention": {**LINEAR, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
WIDE_HEADS = {"head_dim": 32}
UNTIED = {"tie_word_embeddings": False}
ENDS = ("<|endoftext|>", "</s>")  # of texts, by the kind of tokenizer


@dataclass(frozen=True)
class Case:
    """A family with settings that matter to an engine, and a tokenizer of the kind and split that its models have."""

    kind: str
    tokenizer: Callable[[], str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    padding: int = 0  # rows of the model beyond its tokens
    nats: float = FP32_NATS

    def model(self) -> PreTrainedModel:
        """With fresh weights; its texts begin and end as the tokenizer's do."""
        tokenizer = Tokenizer.from_str(self.tokenizer())
        rows = tokenizer.get_vocab_size() + self.padding
        end = next(id_ for name in ENDS if (id_ := tokenizer.token_to_id(name)) is not None)
        [start, *_] = [*added_tokens(tokenizer)[0], end]
        return built(self.kind, {**self.settings, "bos_token_id": start, "eos_token_id": end}, rows)

    def save(self, folder: Path, model: PreTrainedModel) -> Path:
        """A model of the case as a directory with its tokenizer."""
        text = folder.with_name(f"{folder.name}-tokenizer.json")
        text.write_text(self.tokenizer(), encoding="utf-8")
        hf_directory.save_model(model, model.config, folder, text)
        return folder


QWEN = partial(byte_level, "qwen2", nfc=True)
LLAMA_3, TIKTOKEN = partial(byte_level, "llama-bpe", bos=True), partial(byte_level, "dbrx")
LLAMA_2, GEMMA = partial(sentencepiece_bpe, "normalizer"), partial(sentencepiece_bpe, None)
CASES = {
    "llama-2": Case("llama", LLAMA_2, {"rms_norm_eps": 1e-5, **UNTIED}),
    "llama-3": Case("llama", LLAMA_3, {"rope_parameters": LLAMA3, **UNTIED, **WIDE_HEADS}),
    "llama-biases": Case("llama", byte_level, {"attention_bias": True, "mlp_bias": True}),
    "smollm2": Case("llama", partial(byte_level, "smollm"), {"rms_norm_eps": 1e-5}),
    "mistral": Case("mistral", partial(sentencepiece_bpe, "doubles"), {"sliding_window": POSITIONS, **UNTIED}),
    "mistral-nemo": Case("mistral", partial(byte_level, "tekken", bos=True), WIDE_HEADS),
    "qwen2": Case("qwen2", QWEN, {"rope_parameters": LINEAR}, padding=9),
    "qwen3": Case("qwen3", QWEN, {**UNTIED, **WIDE_HEADS}, padding=9),
    "smollm3": Case(
        "smollm3", partial(byte_level, "llama-bpe"),
        {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "layer_types": None},
    ),
    "granite": Case("granite", partial(byte_level, "smollm"), {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 2.0,
        "attention_bias": True,
    }, padding=3),
    "olmo2": Case("olmo2", TIKTOKEN, UNTIED, padding=9),
    "olmo2-tied": Case("olmo2", TIKTOKEN),
    "gemma2": Case("gemma2", GEMMA, {
        "sliding_window": 8, "final_logit_softcapping": 20.0, "attn_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 32, **WIDE_HEADS,
    }, nats=GELU_NATS),
    "gemma3": Case("gemma3", GEMMA, {
        "sliding_window": 8, "num_hidden_layers": 7, "layer_types": None, "rope_parameters": GEMMA_ROPE,
        "query_pre_attn_scalar": 32, **WIDE_HEADS,
    }, padding=9, nats=GELU_NATS),
    "phi3": Case("phi3", phi3, {"rope_parameters": LONG, **LONG_POSITIONS, **UNTIED}, padding=9),
    "phi4": Case("phi3", TIKTOKEN, UNTIED),
    "phi4-mini": Case("phi3", partial(byte_level, "gpt-4o"), {"rope_parameters": LONG, **LONG_POSITIONS}),
    "gpt2": Case("gpt2", byte_level, {"n_inner": None}, nats=GELU_NATS),
    "falcon": Case("falcon", partial(byte_level, "falcon"), nats=GELU_NATS),
    "falcon-7b": Case("falcon", partial(byte_level, "falcon"), {"new_decoder_architecture": False}, nats=GELU_NATS),
}  # fmt: skip


def section(kind: str) -> Any:
    """The recipe's section of a family, of ``NUMBERS``."""
    known = FAMILIES[kind].section
    assert known is not None
    return known(**{name: value for name, value in NUMBERS.items() if name in known.model_fields})


def built(kind: str, settings: Mapping[str, Any] | None = None, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A model of a family whose norms and biases are not what they begin as."""
    family = FAMILIES[kind]
    config = family.configuration(section(kind), replace(SHAPE, outputs=vocabulary))
    if settings:
        kept = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        config = type(config)(**kept | settings, attn_implementation=family.attention)
    torch.manual_seed(0)
    model = family.model_class()(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            middle = 1.0 if name.endswith("weight") and "gemma" not in kind else 0.0
            torch.nn.init.uniform_(weight, middle - 0.3, middle + 0.3)
    return model.eval()
