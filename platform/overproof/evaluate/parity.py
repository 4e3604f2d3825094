"""Does the serving engine compute what a file means?

For text the reference is torch over the file's own weights, dequantised: it feeds the tokens that the engine chose
and reads off their log-probabilities. An engine rounds activations too (llama.cpp to eight bits beside q8_0 and
q4_0 weights), which moves single log-probabilities by up to about 0.05 nats; query and key rows in the wrong order
moved them by 0.4 nats in a model of one layer trained for 100 steps, and by more in better ones. For images the
reference is ONNX's own evaluator, integers included, so only float rounding remains.

Shapes: N generated tokens, V vocabulary, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


def text_parity_nats(
    reference: nn.Module, prompt: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float]
) -> float:
    """How far a greedy completion is from a reference, in nats; at least one token must have been generated.

    The largest difference of a chosen token's log-probability. Where the reference prefers another token by a gap g,
    the engine ranks the two the other way round, so it is off by at least g / 2 on one of them: that counts too.
    Near ties may fall either way, and cost next to nothing.
    """
    ids_S = torch.tensor([[*prompt, *tokens]])
    with torch.inference_mode():
        logprobs_SV = reference(input_ids=ids_S[:, :-1]).logits[0].log_softmax(-1)
    logprobs_NV = logprobs_SV[len(prompt) - 1 :].numpy()
    chosen_N = logprobs_NV[np.arange(len(tokens)), np.asarray(tokens)]
    differences_N = np.abs(np.asarray(logprobs) - chosen_N)
    gaps_N = logprobs_NV.max(axis=1) - chosen_N
    return float(np.maximum(differences_N, gaps_N / 2).max())


def image_parity_nats(reference_BC: NDArray[np.float32], engine_BC: NDArray[np.float32]) -> float:
    """The largest difference of any class's log-probability, in nats."""
    return float(np.abs(reference_BC - engine_BC).max())
