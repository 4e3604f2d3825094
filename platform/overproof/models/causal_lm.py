"""Any other decoder that transformers has: trained from its directory; a converter of llama.cpp may export it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from overproof.models.decoder import LLAMA_NAMES, DecoderFamily, Widths
from overproof.models.student_config import LAYERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What each number is called in config.json, by the families that transformers has.
HIDDEN = ("hidden_size", "n_embd", "d_model")
INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
# What transformers makes causal by a setting alone: their weights were trained to look both ways.
ENCODERS = (
    "Bert*", "MegatronBert*", "RemBert*", "RoCBert*", "Roberta*", "Camembert*", "Electra*", "ErnieForCausalLM",
    "BigBirdForCausalLM", "RoFormer*", "Data2Vec*", "Xmod*", "XLM*", "XLNet*",
)  # fmt: skip


class CausalLmFamily(DecoderFamily):
    """See ``ModelFamily``. Its parts are looked for where most families have them, as Llama does."""

    section = None
    kind = "causal_lm"
    tasks = ("language_modeling",)  # which of them keep the conversations of a row apart is not known
    architectures = ("*ForCausalLM", "*LMHeadModel", *(f"!{name}" for name in ENCODERS))
    names = replace(LLAMA_NAMES, per_layer=PER_LAYER, attention_output=None, width_goes=False)
    attention = None
    varlen = False
    plain_logits = False

    def model_class(self) -> type[PreTrainedModel]:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM  # type: ignore[no-any-return]

    def untied(self, config: Any, names: list[str]) -> list[str]:
        if not config.tie_word_embeddings:
            return names
        from transformers import AutoModelForCausalLM

        tied = AutoModelForCausalLM._model_mapping[type(config)]._tied_weights_keys or {}
        return [name for name in names if not any(re.fullmatch(again, name) for again in tied)]

    def directory_widths(self, config: Mapping[str, Any]) -> Widths:
        hidden, layers, heads = (_first(config, names) for names in (HIDDEN, LAYERS, HEADS))
        named = [config[name] for name in INTERMEDIATE if config.get(name)]
        return Widths(
            hidden, int(named[0]) if named else 4 * hidden, layers, heads,
            int(config.get("num_key_value_heads") or heads), int(config.get("head_dim") or hidden // heads),
        )  # fmt: skip


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    found = [config[name] for name in names if name in config]
    if not found:
        raise KeyError(names[0])
    return int(found[0])


FAMILY = CausalLmFamily()
