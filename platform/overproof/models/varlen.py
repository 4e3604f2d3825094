"""Attention over the texts of a row one by one, by their lengths, where SDPA would be given a mask.

On GPUs that is one call of torch's FlashAttention-2 (arXiv 2307.08691) for the texts of all rows, which takes 16-bit
numbers alone; SDPA given a mask takes no flash kernel. On CPUs it is one call of SDPA for each text. Neither holds, nor
computes, what lies between two texts. What a model is told of lengths is called as transformers calls it.

Shapes: B rows, P places of a row, N = B * P, T texts, H heads, K heads of keys and values, D numbers of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from overproof.errors import InputError
from overproof.models.sizes import family_of, require_varlen

NAME = "overproof_varlen"  # in transformers' registry


def attend_by_lengths(model: PreTrainedModel) -> None:
    """Have a decoder attend so from here on, given tokens and their ``position_ids``, which begin at 0 with each text;
    without them a row is one text. It is given no cache and no mask.

    Raises:
        InputError: models of its family cannot.
    """
    kind, _ = family_of({"architectures": [type(model).__name__]}, model.config.name_or_path)
    require_varlen(kind, "train")
    AttentionInterface.register(NAME, _attend)
    model.set_attn_implementation(NAME)
    model.register_forward_pre_hook(_tell_lengths, with_kwargs=True)


def _tell_lengths(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    if named.get("attention_mask") is not None:
        raise ValueError("attention by lengths takes no mask")
    position_BP = named.get("position_ids")
    if position_BP is None:
        tokens_BP = named["input_ids"]
        position_BP = torch.arange(tokens_BP.shape[1], device=tokens_BP.device).expand_as(tokens_BP)
    return given, named | text_lengths(position_BP)


def text_lengths(position_BP: Tensor) -> dict[str, Any]:
    """Where the texts of all rows begin and end, rows laid end to end: ``cu_seq_lens_q`` and ``_k`` (T + 1), int32; and
    how long the longest is. As in a mask of transformers, a text ends where positions do not go on one by one. A GPU is
    waited for, as the number of texts decides over shapes.
    """
    begins_BP = torch.ones_like(position_BP, dtype=torch.bool)
    begins_BP[:, 1:] = position_BP[:, 1:] != position_BP[:, :-1] + 1
    bounds = pad(begins_BP.flatten().nonzero()[:, 0], (0, 1), value=begins_BP.numel()).int()
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _attend(
    module: nn.Module, query_BHPD: Tensor, key_BKPD: Tensor, value_BKPD: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, cu_seq_lens_q: Tensor,
    max_length_q: int, **further: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """See transformers' ``AttentionInterface``; gives (B, P, H, D).

    Raises:
        InputError: the model drops scores out.
    """
    del module, attention_mask, further
    if dropout:
        raise InputError(
            f"attention: varlen: the model's config.json has it drop {dropout:g} of the scores out, which this does "
            "not; expected attention: sdpa, or 0 there"
        )
    rows, _, places, _ = query_BHPD.shape
    laid_out = (each.transpose(1, 2).flatten(0, 1) for each in (query_BHPD, key_BKPD, value_BKPD))
    query_NHD, key_NKD, value_NKD = (each.to(value_BKPD.dtype) for each in laid_out)  # autocast leaves rotated ones
    found_NHD: Any
    if query_NHD.is_cuda:
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        found_NHD = varlen_attn(
            query_NHD, key_NKD, value_NKD, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
            scale=scaling, window_size=window, enable_gqa=True,
        )  # fmt: skip
    else:
        found_NHD = _text_by_text(query_NHD, key_NKD, value_NKD, cu_seq_lens_q.diff().tolist(), scaling, sliding_window)
    return found_NHD.unflatten(0, (rows, places)), None


def _text_by_text(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, lengths: list[int], scaling: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    parts = (torch.split(each.transpose(0, 1), lengths, 1) for each in (query_NHD, key_NKD, value_NKD))
    found = []
    for query_HTD, key_KTD, value_KTD in zip(*parts, strict=True):
        slides = window is not None and window < query_HTD.shape[1]
        mask = _sliding_mask(query_HTD.shape[1], window) if slides and window else None
        found.append(
            scaled_dot_product_attention(
                query_HTD[None], key_KTD[None], value_KTD[None], mask, is_causal=mask is None, scale=scaling,
                enable_gqa=True,
            )[0]
        )  # fmt: skip
    return torch.cat(found, 1).transpose(0, 1)


def _sliding_mask(length: int, window: int) -> Tensor:
    """The last ``window`` places up to each: (length, length)."""
    return torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
