"""Targets from a teacher's logits: the top k, with or without draws from the others, or every log-probability.

Shapes: B rows, P predictions in a row, C of the N = B * P, V outputs, K kept as they are, D drawn, L temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from overproof.config import Sampled, Scheme, TopK
from overproof.train.cross_entropy import logit_chunks, softmax_logsumexp

DRAW_KEY = 1 << 63  # of the random numbers, one a position: no epoch of an order has it


def encode_targets(
    logits_BPV: Tensor,
    labels_BP: Tensor,
    scheme: Scheme,
    temperatures: Sequence[float],
    uniform_BP: Tensor | None = None,
) -> dict[str, Tensor]:
    """Targets in single precision: see ``TargetLayout``. ``uniform_BP`` in [0, 1) decide the draws of `sampled`."""
    logits_NV, labels_N1 = logits_BPV.flatten(0, 1), labels_BP.reshape(-1, 1)
    uniform_N = None if uniform_BP is None else uniform_BP.flatten()
    found = dict[str, Tensor]()  # whole from the start: small parts that stay would keep malloc from using room again
    for here in logit_chunks(logits_NV):
        logits_CV = logits_NV[here].float()
        p_CV, base_C1 = softmax_logsumexp(logits_CV)
        part = {"label_logprob": (logits_CV.gather(1, labels_N1[here]) - base_C1)[:, 0]}
        if logsumexps := [torch.logsumexp((logits_CV - base_C1) / t, 1) for t in temperatures if t != 1]:
            part["logsumexp"] = torch.stack(logsumexps, 1)
        if isinstance(scheme, TopK):
            part |= _top_k(logits_CV, p_CV, base_C1, scheme.k)
        elif isinstance(scheme, Sampled):
            assert uniform_N is not None
            part |= _sampled(logits_CV, p_CV, base_C1, scheme, temperatures, uniform_N[here])
        else:
            part["logprobs"] = logits_CV - base_C1
        for name, value in part.items():
            whole = found.setdefault(name, value.new_empty(len(logits_NV), *value.shape[1:]))
            whole[here] = value
    return {name: value.reshape(*logits_BPV.shape[:2], *value.shape[1:]) for name, value in found.items()}


def _top_k(logits_CV: Tensor, p_CV: Tensor, base_C1: Tensor, k: int) -> dict[str, Tensor]:
    """The largest log-probabilities come first."""
    top_CK, indices_CK = logits_CV.topk(k, dim=1)
    tail_C = p_CV.scatter_(1, indices_CK, 0.0).sum(1).log()  # from its parts: exact, however small
    return {"indices": indices_CK, "logprobs": top_CK - base_C1, "tail": tail_C}


def _sampled(
    logits_CV: Tensor,
    p_CV: Tensor,
    base_C1: Tensor,
    scheme: Sampled,
    temperatures: Sequence[float],
    uniform_C: Tensor,
) -> dict[str, Tensor]:
    """The top k, and D draws from the others, where q is the mean of the teacher's distributions at the L temperatures.

    From that mean one set of draws serves every temperature: no weight p_T / q exceeds L. With temperature 1 alone it
    is the teacher itself. The draws are systematic (Madow 1949): the outputs laid in a row, each as wide as its q, are
    cut at D points of equal distance, which one random number shifts. Each output is so drawn D * q / rest times in
    the mean, and never more than one time more or less: independent draws would scatter far more.
    """
    q_CV, entropies = torch.zeros_like(p_CV), []
    for temperature in temperatures:
        softened_CV = p_CV if temperature == 1 else torch.softmax(logits_CV / temperature, 1)
        q_CV += softened_CV / len(temperatures)
        entropies.append(torch.special.entr(softened_CV).sum(1))
    top_CK, indices_CK = logits_CV.topk(scheme.k, dim=1)
    points_D = torch.arange(scheme.draws, device=logits_CV.device)
    share_CD = (points_D + uniform_C[:, None]) / scheme.draws
    drawn_CD, rest_C1 = inverse_cdf(q_CV.scatter_(1, indices_CK, 0.0), share_CD)
    found = {
        "indices": indices_CK,
        "logprobs": top_CK - base_C1,
        "tail": rest_C1[:, 0].log().float(),
        "entropy": torch.stack(entropies, 1),
        "drawn": drawn_CD,
    }
    return found | ({"drawn_logprobs": logits_CV.gather(1, drawn_CD) - base_C1} if len(temperatures) > 1 else {})


def inverse_cdf(weights_CV: Tensor, share_CD: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs at which so large shares of the weights' sums are passed, (C, D), and the sums, (C, 1).

    An output of weight 0 is not among them, unless all of a row are.
    """
    sums_CV = weights_CV.double().cumsum(1)
    whole_C1 = sums_CV[:, -1:]
    below_C1 = whole_C1.nextafter(torch.zeros_like(whole_C1))  # rounding must not reach the end
    places_CD = torch.searchsorted(sums_CV, (share_CD * whole_C1).minimum(below_C1), right=True)
    return places_CD.clamp(max=weights_CV.shape[1] - 1), whole_C1
