"""Several language models of one tokenizer as one, which teaches: no engine runs it, so it is written to no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from overproof.models.base import GgufFamily, ModelFamily
from overproof.models.decoder import DecoderFamily
from overproof.models.ensemble import Ensemble
from overproof.models.sizes import POSITIONS, most_positions


class CausalLmEnsembleFamily(Ensemble):
    """See ``Ensemble``. What is averaged are the probabilities of each next token, as in a mixture of experts without a
    gate.
    """

    kind = "causal_lm_ensemble"
    tasks = ("language_modeling", "chat")
    architectures = ("OverproofEnsembleForCausalLM",)
    members = "language models of one tokenizer, of families that recipes name"
    combines = ("probabilities", "logits")  # what but the likeliest token comes next is what there is to learn
    layer_memory = DecoderFamily.layer_memory
    outer_memory = DecoderFamily.outer_memory

    def accepts(self, family: ModelFamily) -> bool:
        return isinstance(family, GgufFamily)

    def alike(self, config: Any, family: Any) -> dict[str, Any]:
        del config, family
        return {}  # entries of a vocabulary beyond the tokenizer's are padding, of which one may have more

    def settings(self, configs: Sequence[Any]) -> dict[str, Any]:
        """A vocabulary is cut to the shortest, and a row may be as long as each takes it."""
        limits = [most for most in (most_positions(config.to_dict()) for config in configs) if most is not None]
        first = {name: getattr(configs[0], name, None) for name in ("bos_token_id", "eos_token_id")}
        longest = {POSITIONS[0]: min(limits)} if limits else {}
        return {"vocab_size": min(config.vocab_size for config in configs)} | first | longest


FAMILY = CausalLmEnsembleFamily()
