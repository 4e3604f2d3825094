"""Losses on a layer's features: self-attention relations (MiniLMv2, arXiv 2012.15828) and hidden states.

Shapes: B rows, P positions in a row, D width of the queries, keys or values of all heads, R relation heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from overproof.models.base import FusedAttention
from overproof.models.hf_directory import layer_names


class LayerOutputs(NamedTuple):
    """What one layer computed in a forward pass: (B, P, D) each. Queries and keys are those before rotary positions."""

    states: Tensor  # what the layer hands on
    queries: Tensor | None = None  # None where the family has no attention
    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def attention(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        assert self.queries is not None
        assert self.keys is not None
        assert self.values is not None
        return self.queries, self.keys, self.values


@contextmanager
def capture_layers(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, LayerOutputs]]:
    """The outputs of these layers in the forward pass within the block; filled when the block ends."""
    names = layer_names(model)
    found: dict[int, LayerOutputs] = {}
    seen: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    hooks = []
    for layer, values in seen.items():
        module = model.get_submodule(f"{names.layers}.{layer}")
        hooks.append(module.register_forward_hook(_record_output(values, "states")))
        for part, where in (("queries", names.queries), ("keys", names.keys), ("values", names.values)):
            if where is not None:
                hooks.append(module.get_submodule(where).register_forward_hook(_record_output(values, part)))
        if names.fused is not None:
            fused = module.get_submodule(names.fused.name)
            hooks.append(fused.register_forward_hook(_record_parts(values, names.fused, model.config)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    for layer, values in seen.items():  # of products in bf16, too: sums over places need more
        found[layer] = LayerOutputs(**{name: value.float() for name, value in values.items()})


def _record_output(into: dict[str, Tensor], name: str) -> Any:
    """Of the first call: some families ask the same module about relative positions, too, after the places."""

    def hook(_module: Any, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        into.setdefault(name, output if isinstance(output, Tensor) else output[0])

    return hook


def _record_parts(into: dict[str, Tensor], fused: FusedAttention, config: Any) -> Any:
    def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
        into["queries"], into["keys"], into["values"] = fused.split(config, output)

    return hook


def relation_loss(student: LayerOutputs, teacher: LayerOutputs, heads: int, segments_BP: Tensor) -> Tensor:
    """KL from the teacher's relations to the student's, summed over queries, keys and values; nats.

    A relation is softmax(X X^T / sqrt(D / R)) in each of R heads, into which the width is cut anew, whatever the
    number of attention heads and the width: R must divide the widths of both models. A position is related to those of
    its own number in ``segments_BP`` alone. It is the mean over heads and over the positions whose number is not 0;
    those of 0 are neither compared nor related to. The teacher takes no gradient.
    """
    related_BPP = (segments_BP[:, :, None] == segments_BP[:, None, :]) & (segments_BP[:, None, :] > 0)
    pairs = zip(student.attention, teacher.attention, strict=True)
    terms = [_relation_kl(own, target.detach(), heads, segments_BP > 0, related_BPP) for own, target in pairs]
    return torch.stack(terms).sum()


def _relation_kl(student_BPD: Tensor, teacher_BPD: Tensor, heads: int, mask_BP: Tensor, related_BPP: Tensor) -> Tensor:
    log_p_BRPP, log_q_BRPP = (_relation(x, heads, related_BPP) for x in (student_BPD, teacher_BPD))
    kl_BRP = kl_div(log_p_BRPP, log_q_BRPP, reduction="none", log_target=True).sum(-1)
    return (kl_BRP * mask_BP[:, None]).sum() / (heads * mask_BP.sum())


def _relation(values_BPD: Tensor, heads: int, related_BPP: Tensor) -> Tensor:
    """Log of the relation matrices: (B, R, P, P)."""
    values_BRPD = values_BPD.reshape(*values_BPD.shape[:2], heads, -1).transpose(1, 2)
    scores_BRPP: Tensor = values_BRPD @ values_BRPD.transpose(-1, -2) / math.sqrt(values_BRPD.shape[-1])
    least = torch.finfo(scores_BRPP.dtype).min / 2  # finite, so that 0 times it is 0
    return scores_BRPP.masked_fill(~related_BPP[:, None], least).log_softmax(-1)


def state_loss(student_BPD: Tensor, teacher_BPD: Tensor, mask_BP: Tensor) -> Tensor:
    """Mean squared difference over the positions in ``mask_BP`` (arXiv 1412.6550); the teacher takes no gradient."""
    squares_BP = (student_BPD - teacher_BPD.detach()).square().mean(-1)
    return (squares_BP * mask_BP).sum() / mask_BP.sum()
