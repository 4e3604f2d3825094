"""Language models on the test split: their quality by torch, and speed, memory and parity in the engine.

Parity: torch over the file's own weights, dequantised, is fed the tokens that the engine chose, and reads off their
log-probabilities. An engine rounds activations too (llama.cpp to eight bits beside q8_0 and q4_0 weights), which moves
single log-probabilities by up to about 0.05 nats; query and key rows in the wrong order moved them by 0.4 nats in a
model of one layer trained for 100 steps, and by more in better ones.

Shapes: B rows, S tokens, P predictions, V outputs, U units, N predictions of all units in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn
from torch.nn.functional import cross_entropy

from overproof.config import Evaluate
from overproof.data.manifest import DOCUMENTS, TEST_TEXTS, TOKENIZER
from overproof.data.parquet_reader import Shards
from overproof.engines import probe
from overproof.engines.probe import Say
from overproof.errors import InputError
from overproof.files import file_sha256
from overproof.models.base import Prediction
from overproof.models.hf_directory import Batch, to_tensors
from overproof.tasks.base import FileScores, Metric, cost_metrics, spread_units

BATCH_LOGITS = 1 << 23  # numbers in one batch's logits
WINDOW = 8  # batches sorted by length together, so that short rows are not padded to long ones
PROMPT_TOKENS = 32  # of the speed and the parity prompts
TIMED_PROMPTS = 16  # asked in turn


def predict(model: nn.Module, batch: Batch) -> Prediction:
    """Call a causal language model on the columns ``tokens`` (B, S) and ``length`` (B)."""
    tokens_BS, length_B = batch["tokens"], batch["length"]
    logits_BPV = model(input_ids=tokens_BS[:, :-1], use_cache=False).logits
    places_P = torch.arange(tokens_BS.shape[1] - 1, device=tokens_BS.device)
    return Prediction(logits_BPV, tokens_BS[:, 1:], places_P < length_B[:, None])


@dataclass(frozen=True)
class TestDocuments:
    """The rows of the chosen test documents, document after document."""

    documents: NDArray[np.int64]  # ascending
    sample_ids: NDArray[np.int64]
    places: NDArray[np.int64]  # of each row's document in ``documents``
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, root: Path, most: int | None) -> TestDocuments:
        """Of a prepared text data set."""
        shards = Shards(root, "test", columns=("document", "length"))
        if shards.rows == 0:
            raise InputError(f"{root}: the test split is empty; expected at least one document: add data")
        columns = shards.take(np.arange(shards.rows))
        found = columns["document"].astype(np.int64)
        documents = spread_units(np.unique(found), most)
        ids = np.flatnonzero(np.isin(found, documents))
        ids = ids[np.argsort(found[ids], kind="stable")]
        places = np.searchsorted(documents, found[ids])
        return cls(documents, ids, places, columns["length"][ids].astype(np.int64))


def score_text(file: Path, root: Path, most: int | None, model: nn.Module) -> FileScores:
    """Nats and first choices of a file on ``most`` documents of the test split of the data set at ``root``.

    ``model`` is what the file means: no engine here reports log-probabilities of a prompt. The parity probe says how
    far the engine is from that.
    """
    rows = TestDocuments.of(root, most)
    ends = np.cumsum(rows.lengths)
    nats = np.zeros(len(rows.documents))
    choices_N = np.empty(int(ends[-1]), np.int32)
    for here, nats_BP, choices_BP in _forward(model, Shards(root, "test"), rows):
        for row, nats_P, choices_P in zip(here, nats_BP, choices_BP, strict=True):
            length = int(rows.lengths[row])
            nats[rows.places[row]] += nats_P[:length].sum()
            choices_N[ends[row] - length : ends[row]] = choices_P[:length]
    predictions = np.bincount(rows.places, rows.lengths).astype(np.int64)
    return FileScores(
        file_sha256(file), rows.documents, nats, _size_bytes(root, rows.documents), predictions, choices_N
    )


def _forward(
    model: nn.Module, shards: Shards, rows: TestDocuments
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int32]]]:
    """Batches of (positions in ``rows``, nats_BP, choices_BP)."""
    manifest = shards.manifest
    size = max(1, BATCH_LOGITS // (manifest.positions * manifest.outputs))
    for start in range(0, len(rows.sample_ids), size * WINDOW):
        window = np.arange(start, min(start + size * WINDOW, len(rows.sample_ids)))
        window = window[np.argsort(rows.lengths[window], kind="stable")]
        columns = shards.take(rows.sample_ids[window])
        for first in range(0, len(window), size):
            part = slice(first, first + size)
            longest = int(columns["length"][part].max())
            cut = {"tokens": columns["tokens"][part, : longest + 1], "length": columns["length"][part]}
            with torch.inference_mode():
                prediction = predict(model, to_tensors(cut))
                logits_BPV = prediction.logits_BPV
                targets_BP = prediction.targets_BP
                nats_N = cross_entropy(logits_BPV.flatten(0, 1), targets_BP.flatten(), reduction="none")
                choices_BP = logits_BPV.argmax(-1)
            yield window[part], nats_N.view(targets_BP.shape).double().numpy(), choices_BP.to(torch.int32).numpy()


def _size_bytes(root: Path, documents: NDArray[np.int64]) -> NDArray[np.int64]:
    table = pq.read_table(root / DOCUMENTS, columns=["document", "size_bytes"])
    sizes: dict[Any, Any] = dict(zip(table["document"].to_pylist(), table["size_bytes"].to_pylist(), strict=True))
    return np.array([sizes[int(document)] for document in documents], np.int64)


def measure_text(
    file: Path, root: Path, settings: Evaluate, engine: str, read_back: Callable[[Path], nn.Module], say: Say
) -> dict[str, Metric]:
    """Speed, memory and parity of the serving engine on the beginnings of test documents."""
    rows = TestDocuments.of(root, settings.max_documents)
    prompts = test_prompts(rows, Shards(root, "test"), max(settings.probe_prompts, TIMED_PROMPTS))
    probed = prompts[: settings.probe_prompts]
    texts = pq.read_table(root / TEST_TEXTS, columns=["text"])["text"].to_pylist()
    request = probe.TextRequest(
        engine=engine,
        file=str(file),
        threads=settings.threads,
        prompts=probed,
        probe_tokens=settings.probe_tokens,
        texts=texts,
        timed_prompts=prompts[:TIMED_PROMPTS],
        timed_requests=settings.timed_requests,
        probe_s=settings.probe_s,
        decode_tokens=settings.decode_tokens,
    )
    answer = probe.probe_text(request, say)
    say("torch reference")
    reference = read_back(file)
    nats = [
        text_parity_nats(reference, prompt, given.tokens, given.logprobs)
        for prompt, given in zip(probed, answer.answers, strict=True)
        if given.tokens
    ]
    compared = sum(len(given.tokens) for given in answer.answers)
    metrics = cost_metrics(answer)
    metrics |= {
        "time_to_first_token_s": Metric(value=median(answer.first_token_s), unit="s", n=len(answer.first_token_s)),
        "split_otherwise": split_otherwise(Tokenizer.from_file(str(root / TOKENIZER)), texts, answer.splits),
    }
    if answer.tokens_per_s:
        rate = median(answer.tokens_per_s)
        metrics["decode_tokens_per_s"] = Metric(value=rate, unit="tokens/s", n=len(answer.tokens_per_s))
    if nats:
        metrics["parity_nats"] = Metric(value=max(nats), unit="nats", n=compared)
    return metrics


def split_otherwise(tokenizer: Tokenizer, texts: Sequence[str], splits: Sequence[Sequence[int]]) -> Metric:
    """The share of texts that an engine, by its ``splits``, reads as other tokens than the tokenizer does.

    Both take what spells a special token for that token, as they do in prompts.
    """
    own = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    differing = sum(list(found) != ids for ids, found in zip(own, splits, strict=True))
    return Metric(value=differing / len(texts), unit="share", n=len(texts))


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


def test_prompts(rows: TestDocuments, shards: Shards, count: int) -> list[list[int]]:
    """The first tokens of ``count`` rows, evenly spread over the chosen documents."""
    picked = spread_units(rows.sample_ids, count)
    columns = shards.take(picked)
    ends = np.minimum(columns["length"] + 1, PROMPT_TOKENS)
    return [tokens[:end].tolist() for tokens, end in zip(columns["tokens"], ends, strict=True)]
