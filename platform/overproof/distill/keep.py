"""What the cache keeps of a teacher's logits: the top k, some that are drawn, or all.

Shapes: B rows, P predictions in a row, C of the N = B * P, V outputs, K slots for each prediction, L temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from overproof.distill.losses import chunks, softmax
from overproof.recipe import Sampled, Scheme, TopK

STREAM = 1 << 63  # of the random words: no epoch of an order has this number


def keep(
    logits_BPV: Tensor,
    labels_BP: Tensor,
    scheme: Scheme,
    temperatures: Sequence[float],
    uniform_BPK: Tensor | None = None,
) -> dict[str, Tensor]:
    """Targets in single precision: see ``columns.Layout``. ``uniform_BPK`` in [0, 1) decide the draws of `sampled`."""
    logits_NV, labels_N1 = logits_BPV.flatten(0, 1).float(), labels_BP.reshape(-1, 1)
    uniform_NK = None if uniform_BPK is None else uniform_BPK.flatten(0, 1)
    parts = []
    for here in chunks(logits_NV):
        logits_CV = logits_NV[here]
        p_CV, base_C1 = softmax(logits_CV)
        logsumexps = [base_C1[:, 0] if t == 1 else torch.logsumexp(logits_CV / t, 1) for t in temperatures]
        part = {
            "label_logprob": (logits_CV.gather(1, labels_N1[here]) - base_C1)[:, 0],
            "logsumexp": torch.stack(logsumexps, 1),
        }
        if isinstance(scheme, TopK):
            part |= _top_k(logits_CV, p_CV, base_C1, scheme.k)
        elif isinstance(scheme, Sampled):
            assert uniform_NK is not None
            part |= _drawn(logits_CV, p_CV, base_C1, temperatures, uniform_NK[here])
        else:
            part["logprobs"] = logits_CV - base_C1
        parts.append(part)
    return {
        name: torch.cat([part[name] for part in parts]).reshape(*logits_BPV.shape[:2], *parts[0][name].shape[1:])
        for name in parts[0]
    }


def _top_k(logits_CV: Tensor, p_CV: Tensor, base_C1: Tensor, k: int) -> dict[str, Tensor]:
    """The largest log-probabilities come first."""
    top_CK, indices_CK = logits_CV.topk(k, dim=1)
    tail_C = p_CV.scatter_(1, indices_CK, 0.0).sum(1).log()  # from its parts: exact, however small
    return {"indices": indices_CK, "logprobs": top_CK - base_C1, "tail": tail_C}


def _drawn(
    logits_CV: Tensor, p_CV: Tensor, base_C1: Tensor, temperatures: Sequence[float], uniform_CK: Tensor
) -> dict[str, Tensor]:
    """Draws from the mean of the teacher's distributions at the L temperatures, in ascending order of index.

    From that mixture one set of draws serves every temperature: no importance weight p_T / q exceeds L. With
    temperature 1 alone it is the teacher itself.
    """
    q_CV = p_CV
    for temperature in temperatures:
        if temperature != 1:
            q_CV = q_CV + torch.softmax(logits_CV / temperature, 1)
    sums_CV = q_CV.double().cumsum(1)
    drawn_CK = torch.searchsorted(sums_CV, uniform_CK * sums_CV[:, -1:], right=True).clamp(max=logits_CV.shape[1] - 1)
    drawn_CK = drawn_CK.sort(1).values
    new_CK = torch.ones_like(drawn_CK)
    new_CK[:, 1:] = drawn_CK[:, 1:] != drawn_CK[:, :-1]
    slot_CK = new_CK.cumsum(1) - 1
    counts_CK = torch.zeros_like(drawn_CK).scatter_add_(1, slot_CK, torch.ones_like(drawn_CK))
    indices_CK = torch.zeros_like(drawn_CK).scatter_(1, slot_CK, drawn_CK)
    logprobs_CK = torch.where(counts_CK > 0, logits_CV.gather(1, indices_CK) - base_C1, 0.0)
    return {"indices": indices_CK, "logprobs": logprobs_CK, "counts": counts_CK}


def uniforms(seed: int, sample_ids_B: NDArray[np.int64], positions: int, draws: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), a function of the seed, the row, the position and the draw alone: (B, P, K).

    Raw Philox words, as in ``data/plan.py``: no release of numpy changes them.
    """
    bits = np.random.Philox(key=np.array([seed, STREAM], np.uint64))
    start = bits.state
    words = np.empty((len(sample_ids_B), positions * draws), np.uint64)
    for row, sample_id in zip(words, sample_ids_B.tolist(), strict=True):
        start["state"]["counter"][:] = (0, 0, 0, sample_id)
        bits.state = start
        row[:] = bits.random_raw(positions * draws)
    numbers: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers.reshape(len(sample_ids_B), positions, draws)
