"""The torch modules of ensembles: several models whose answers are one, saved and loaded as any other model.

Shapes: M members, B rows, P predictions of a row, V outputs that all members have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from overproof.models.encoder import MULTI_LABEL, label_logits
from overproof.models.sizes import family_of

Combine = Literal["probabilities", "logits", "votes"]
LEAST_VOTES = 1e-6  # the probability of an output that nobody votes for


class OverproofEnsembleConfig(PretrainedConfig):  # type: ignore[misc]
    """What config.json holds: that of each member, its weight, and what of the members is averaged."""

    model_type = "overproof_ensemble"

    def __init__(
        self,
        members: Sequence[dict[str, Any]] = (),
        weights: Sequence[float] = (),
        combine: Combine = "probabilities",
        **kwargs: Any,
    ) -> None:
        self.members, self.weights, self.combine = list(members), list(weights), combine
        super().__init__(**kwargs)


class _Ensemble(PreTrainedModel):  # type: ignore[misc]
    """Members, each a whole model of its own family."""

    config_class = OverproofEnsembleConfig
    base_model_prefix = ""
    _supports_sdpa = True  # what members have is for them to say

    def __init__(self, config: OverproofEnsembleConfig) -> None:
        super().__init__(config)
        self.members: Any = nn.ModuleList(_member(each) for each in config.members)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Members have initialised themselves."""

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Of each member, which transformers does not look for in a list."""
        del all_submodels
        return {
            f"members.{number}.{tied}": f"members.{number}.{kept}"
            for number, member in enumerate(self.members)
            for tied, kept in member.get_expanded_tied_weights_keys(all_submodels=True).items()
        }

    def set_attn_implementation(self, attn_implementation: Any, **_: Any) -> None:
        for member in self.members:
            member.set_attn_implementation(attn_implementation)


class OverproofEnsemble(_Ensemble):
    """Each member is asked the same; ``logits`` are log-probabilities of all together, or of labels their log-odds."""

    def forward(self, **inputs: Any) -> SequenceClassifierOutput:
        logits_MBV = [member(**inputs).logits for member in self.members]
        if self.members[0].config.problem_type == MULTI_LABEL:
            return SequenceClassifierOutput(logits=self._label_logits(logits_MBV))
        logprobs_MBV = [logits_BV.log_softmax(-1) for logits_BV in logits_MBV]
        return SequenceClassifierOutput(logits=combined(logprobs_MBV, self.config.weights, self.config.combine))

    def _label_logits(self, logits_MBV: Sequence[Tensor]) -> Tensor:
        """By probability: of being there less that of being absent."""
        both_MBV2 = [label_logits(logits_BV).log_softmax(-1) for logits_BV in logits_MBV]
        mixed_BV2 = combined(both_MBV2, self.config.weights, self.config.combine)
        return mixed_BV2[..., 1] - mixed_BV2[..., 0]


class OverproofEnsembleForCausalLM(_Ensemble):
    """Each member reads the same tokens; ``logits`` (B, P, V) are log-probabilities of all together."""

    def forward(self, past_key_values: Sequence[Cache] | None = None, **inputs: Any) -> CausalLMOutputWithPast:
        """``past_key_values``: one cache for each member, which goes on."""
        caches, shared = past_key_values or [None] * len(self.members), self.config.vocab_size
        logits_MBPV = [
            member(past_key_values=cache, **inputs).logits[..., :shared].float()
            for member, cache in zip(self.members, caches, strict=True)
        ]
        logprobs_MBPV = [logits_BPV.log_softmax(-1) for logits_BPV in logits_MBPV]
        return CausalLMOutputWithPast(logits=combined(logprobs_MBPV, self.config.weights, self.config.combine))


def combined(logprobs_MBV: Sequence[Tensor], weights: Sequence[float], combine: Combine) -> Tensor:
    """Log-probabilities (..., V) of all members together, whose weights add up to 1."""
    if combine == "votes":
        outputs = logprobs_MBV[0].shape[-1]
        votes_MBV = [nn.functional.one_hot(each.argmax(-1), outputs).to(each.dtype) for each in logprobs_MBV]
        shares_BV = sum(weight * votes_BV for weight, votes_BV in zip(weights, votes_MBV, strict=True))
        assert isinstance(shares_BV, Tensor)
        return shares_BV.clamp(min=LEAST_VOTES).log().log_softmax(-1)
    if combine == "logits":
        return torch.stack([w * each for w, each in zip(weights, logprobs_MBV, strict=True)]).sum(0).log_softmax(-1)
    shifts = torch.tensor(weights, dtype=logprobs_MBV[0].dtype, device=logprobs_MBV[0].device).log()
    return torch.stack([each + shift for each, shift in zip(logprobs_MBV, shifts, strict=True)]).logsumexp(0)


def absent(there_BV: Tensor) -> Tensor:
    """Log-probabilities of labels not being there, from those of being there."""
    return torch.log1p(-there_BV.exp().clamp(max=1 - 1e-7))


def _member(config: dict[str, Any]) -> PreTrainedModel:
    _, family = family_of(config, "members")
    model_class: Any = family.model_class()
    found = model_class.config_class.from_dict(dict(config))
    found._attn_implementation = family.attention or "sdpa"
    model: PreTrainedModel = model_class(found)
    return model
