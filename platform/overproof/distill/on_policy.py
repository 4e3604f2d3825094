"""On-policy distillation (arXiv 2306.13649): students write, and the teacher scores what they wrote.

One process and no Ray: which steps, what is written, and a teacher that scores. All three are functions of integers
and weights, to the last bit, whatever else the same teacher scores: see ``TeacherScorer``.

Shapes: B rows, Q tokens of a prompt, G generated tokens, S = Q + G, V outputs.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from overproof.config import OnPolicy, TopK
from overproof.data.parquet_reader import Columns
from overproof.distill.target_encoder import encode_targets
from overproof.models.compute import Compute, start_compute
from overproof.models.documents import last_document, positions_in_documents
from overproof.models.hf_directory import load_model

TEMPERATURE = 1.0  # of sampling: the student's own distribution


class Scorer(Protocol):
    """A teacher, or a pool of them, that scores generated tokens."""

    def score(self, tokens_BS: NDArray[np.int64]) -> Columns:
        """Of every generated token: indices and logprobs (B, G, K) and, at other temperatures than 1, logsumexp."""


def is_on_policy_step(step: int, share: float) -> bool:
    """Whether the student writes the rows of a step, counted from 0: evenly spaced, ``share`` of all."""
    return int((step + 1) * share + 1e-9) > int(step * share + 1e-9)


@torch.no_grad()
def sample_continuations(
    model: PreTrainedModel, prompts_BQ: Tensor, count: int, seed: int, step: int, start_B: Tensor | None = None
) -> Tensor:
    """Prompts, and ``count`` tokens after each, drawn from the model with a seed that is a function of the step.

    The end of a document is a token like any other, as it is in training. With ``start_B``, the token that begins each
    document, the last document of a prompt alone is gone on from. If the model then begins another, that one is drawn
    with the document before it in sight; it is scored and learnt without.
    """
    seen_BQ = torch.ones_like(prompts_BQ)
    if start_B is not None:
        seen_BQ = last_document(prompts_BQ, start_B).to(prompts_BQ.dtype)
    step_seed = int.from_bytes(hashlib.sha256(f"{seed}/written/{step}".encode()).digest()[:7], "big")
    devices = [prompts_BQ.device] if prompts_BQ.device.type == "cuda" else []
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(step_seed)
        tokens_BS = model.generate(
            prompts_BQ,
            attention_mask=seen_BQ,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
    model.train(training)
    assert isinstance(tokens_BS, Tensor)
    return tokens_BS


class TeacherScorer:
    """One teacher. Its forward passes have one shape, so that no score depends on what else is scored with it.

    Requests are cut into passes of ``rows`` rows, and the last is filled up.
    """

    def __init__(
        self,
        teacher: Path,
        settings: OnPolicy,
        temperatures: tuple[float, ...],
        threads: int,
        apart_id: int | None = None,
    ) -> None:
        """``temperatures`` ascend, and 1.0 is among them. With ``apart_id``, the token that begins each document, none
        in a row sees another."""
        torch.set_num_threads(threads)
        self.apart_id = apart_id
        self.teacher, self.settings, self.temperatures = teacher, settings, temperatures

    @cached_property
    def where(self) -> Compute:
        return start_compute(self.settings.gpus_per_actor, self.settings.precision)

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.where.place(load_model(self.teacher))

    @torch.inference_mode()
    def score(self, tokens_BS: NDArray[np.int64]) -> Columns:
        rows, passes = self.settings.rows, []
        for start in range(0, len(tokens_BS), rows):
            request_BS = tokens_BS[start : start + rows]
            filled_BS = np.zeros((rows, tokens_BS.shape[1]), np.int64)
            filled_BS[: len(request_BS)] = request_BS
            scores = self._forward(filled_BS)
            passes.append({name: values[: len(request_BS)] for name, values in scores.items()})
        return {name: np.concatenate([scores[name] for scores in passes]) for name in passes[0]}

    def _forward(self, tokens_BS: NDArray[np.int64]) -> Columns:
        inputs_BS = torch.from_numpy(tokens_BS[:, :-1]).to(self.where.device)
        beside = {}
        if self.apart_id is not None:
            # A token before each row, which is not seen from it: every pass is masked, as it is where a row holds two.
            starts_B = inputs_BS.new_full((len(inputs_BS),), self.apart_id)
            beside["position_ids"] = pad(positions_in_documents(inputs_BS, starts_B), (1, 0))
            inputs_BS = torch.cat([inputs_BS[:, :1], inputs_BS], 1)
        logits_BSV = self.model(input_ids=inputs_BS, use_cache=False, **beside).logits
        logits_BGV = logits_BSV[:, -self.settings.new_tokens :]
        labels_BG = torch.from_numpy(tokens_BS[:, -self.settings.new_tokens :]).to(self.where.device)
        scheme = TopK(k=min(self.settings.k, logits_BGV.shape[-1]))
        targets = encode_targets(logits_BGV, labels_BG, scheme, self.temperatures)
        return {name: targets[name].cpu().numpy() for name in ("indices", "logprobs", "logsumexp") if name in targets}
