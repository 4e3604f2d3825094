"""The teacher writes text from the beginnings of train rows, for students to train on (arXiv 1606.07947).

The text is a function of its weights, the seed and the row: each row has random numbers of its own, and every forward
pass has one shape, so that no row's text depends on those beside it.

Shapes: B rows, Q tokens of a prompt, G written tokens, S = Q + G = P + 1, V outputs.
"""

from __future__ import annotations

import inspect

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from overproof.data.manifest import START
from overproof.data.order import uniforms
from overproof.data.parquet_reader import Columns
from overproof.distill.target_encoder import inverse_cdf
from overproof.distill.teacher_text import GENERATION_KEY, TextIndex
from overproof.distill.teacher_worker import TeacherWorker
from overproof.errors import InputError
from overproof.models.documents import last_document, positions_in_documents
from overproof.models.hf_directory import model_parts, to_tensors


class TextWorker(TeacherWorker):
    """Computes rows of the teacher's text."""

    index: TextIndex

    def compute(self, sample_ids: NDArray[np.int64]) -> Columns:
        identity, count, device = self.index.identity, len(sample_ids), self.where.device
        filled = np.resize(sample_ids, self.job.settings.batch_size)  # a pass of fewer rows might round otherwise
        rows = {name: value.to(device) for name, value in to_tensors(self.rows.take(filled)).items()}
        prompts_BQ = rows["tokens"][:, : identity.prompt_tokens]
        uniform_BG = torch.from_numpy(uniforms(identity.seed, GENERATION_KEY, filled, identity.tokens)).to(device)
        self.check_outputs(self.model.config.vocab_size)
        tokens_BS = generate(self.model, prompts_BQ, uniform_BG, identity.temperature, rows.get(START))
        return {"sample_id": sample_ids, "tokens": tokens_BS[:count].cpu().numpy()}


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompts_BQ: Tensor, uniform_BG: Tensor, temperature: float, start_B: Tensor | None = None
) -> Tensor:
    """The prompts and a token for each number in [0, 1); the end of a document is a token like any other.

    With ``start_B``, the token that begins each document, what is written sees its own document alone.

    Raises:
        InputError: the model's outputs are not finite.
    """
    prompt_tokens = prompts_BQ.shape[1]
    tokens_BS = torch.cat([prompts_BQ, torch.zeros_like(uniform_BG, dtype=prompts_BQ.dtype)], 1)
    finite = torch.ones((), dtype=torch.bool, device=prompts_BQ.device)
    new_BN = prompts_BQ  # N: the tokens that are not in the cache yet
    apart = None if start_B is None else _ApartDocuments(prompts_BQ, start_B)
    if apart:
        new_BN = torch.cat([prompts_BQ[:, :1], prompts_BQ], 1)
    caches = [DynamicCache(config=part.config) for part in model_parts(model)]
    kept = {_cache_argument(model): caches[0] if len(caches) == 1 else caches}
    for index in range(uniform_BG.shape[1]):
        beside = apart.inputs if apart else {}
        logits_BV = model(input_ids=new_BN, use_cache=True, logits_to_keep=1, **kept, **beside).logits[:, -1].float()
        finite &= logits_BV.isfinite().all()
        new_BN = sample_token(logits_BV, uniform_BG[:, index : index + 1], temperature)
        tokens_BS[:, prompt_tokens + index] = new_BN[:, 0]
        if apart:
            apart.add(new_BN)
    if not finite:
        raise InputError("the teacher's outputs are not finite while it writes; train it again")
    return tokens_BS


class _ApartDocuments:
    """What a model is told of the tokens in its cache while it writes.

    Before each prompt stands a token that is never seen: so every pass is masked, and none rounds otherwise because all
    rows beside it happen to hold one document.
    """

    def __init__(self, prompts_BQ: Tensor, start_B: Tensor) -> None:
        self.start_B1 = start_B[:, None]
        self.seen_BS = pad(last_document(prompts_BQ, start_B), (1, 0))
        self.position_BN = pad(positions_in_documents(prompts_BQ, start_B), (1, 0))

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"attention_mask": self.seen_BS.long(), "position_ids": self.position_BN}

    def add(self, new_B1: Tensor) -> None:
        """One more token a row, which may begin a document."""
        begins_B1 = new_B1 == self.start_B1
        self.seen_BS = torch.cat([self.seen_BS & ~begins_B1, torch.ones_like(begins_B1)], 1)
        self.position_BN = torch.where(begins_B1, 0, self.position_BN[:, -1:] + 1)


def _cache_argument(model: PreTrainedModel) -> str:
    """Its name differs between releases of transformers, its place between families."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def sample_token(logits_BV: Tensor, uniform_B1: Tensor, temperature: float) -> Tensor:
    """One output a row, by the inverse of the distribution function: (B, 1). At temperature 0 the likeliest."""
    if temperature == 0:
        return logits_BV.argmax(1, keepdim=True)
    return inverse_cdf(torch.softmax(logits_BV / temperature, 1), uniform_B1)[0]
