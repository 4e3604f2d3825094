"""Any other decoder that transformers has: trained and distilled from its directory; exported by no format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from overproof.models.decoder import DecoderFamily, Widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What each number is called in config.json, by the families that transformers has.
HIDDEN = ("hidden_size", "n_embd", "d_model")
INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


class CausalLmFamily(DecoderFamily):
    """See ``ModelFamily``. Its parts are looked for where most families have them, as Llama does."""

    section = None
    kind = "causal_lm"
    tasks = ("language_modeling",)  # which of them keep the conversations of a row apart is not known
    architectures = ("*ForCausalLM", "*LMHeadModel")
    attention = None

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
