"""Language models on the test split: their quality, speed, memory and parity, all in the engine that will serve them.

A file is judged by what its engine says of every token of the test documents, where the engine tells that (``scorer``):
llama.cpp computes with the file's own bytes, and rounds activations to eight bits beside q8_0 and q4_0 weights, which
moves log-probabilities away from those of the dequantised weights: that is part of what is served. vLLM computes with
the dequantised weights: torch over these is taken.

Parity: what the engine generates, and says of it, is held against those figures, so that what answers is what was
judged. Whether an unquantised file means the model it was made from is held when it is written (``difference_nats``).

Shapes: B rows, S tokens, P predictions, U units, N predictions of all units in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
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

from overproof.config import Evaluate
from overproof.config.base import KvCache, Precision
from overproof.data.manifest import CLUSTER, DOCUMENTS, TEST_TEXTS, Manifest
from overproof.data.parquet_reader import Shards
from overproof.engines import probe
from overproof.engines.base import LogitsReader, PlaceScores, ScoringLoader, TextScorer
from overproof.engines.probe import Say
from overproof.engines.probe_messages import TextRequest
from overproof.engines.prompt_limits import require_context
from overproof.errors import InputError
from overproof.export.base import Format
from overproof.models.base import Prediction
from overproof.models.compute import start_compute
from overproof.models.documents import document_positions
from overproof.models.hf_directory import Batch
from overproof.models.sizes import most_positions
from overproof.registry import ENGINES
from overproof.tasks.base import (
    STREAMS_RATE,
    UNITS_TOGETHER,
    FileScores,
    Metric,
    ScoringTime,
    Tell,
    cost_metrics,
    spread_units,
)
from overproof.tasks.torch_scorer import TorchLogits, TorchScorer

BATCH_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 28}  # numbers in the logits of one batch of torch
READ_ROWS = 256  # rows of the test split held at once
PROMPT_TOKENS = 32  # of the speed and the parity prompts
TIMED_PROMPTS = 16  # asked in turn


def predict(model: nn.Module, batch: Batch) -> Prediction:
    """Call a causal language model on the columns ``tokens`` (B, S) and ``length`` (B) and, where documents of a row
    are kept apart, ``start`` (B).
    """
    tokens_BS, length_B = batch["tokens"], batch["length"]
    logits_BPV = model(input_ids=tokens_BS[:, :-1], use_cache=False, **document_positions(batch)).logits
    places_P = torch.arange(tokens_BS.shape[1] - 1, device=tokens_BS.device)
    return Prediction(logits_BPV, tokens_BS[:, 1:], places_P < length_B[:, None])


def open_logits(file: Path, positions: int, settings: Evaluate, engine: str, format: Format) -> LogitsReader:
    """All that a file says of rows of ``positions`` places at most: by its engine, or else by torch.

    Raises:
        InputError: the file cannot be loaded, or its context is shorter.
    """
    loader = ENGINES[engine]
    if isinstance(loader, ScoringLoader):
        return loader.logits(file, positions, settings.threads, settings.kv_cache)
    return TorchLogits(_read_back(file, format, positions))


def _read_back(file: Path, format: Format, positions: int) -> Any:
    model = format.read_back(file)
    context = most_positions(model.config.to_dict())
    if context is not None:
        require_context(file, positions, context)
    return model


@dataclass(frozen=True)
class TestDocuments:
    """The rows of the chosen test documents, document after document."""

    documents: NDArray[np.int64]  # ascending
    sample_ids: NDArray[np.int64]
    places: NDArray[np.int64]  # of each row's document in ``documents``
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, root: Path, most: int | None = None) -> TestDocuments:
        """All of a prepared text data set, or ``most`` documents evenly spread.

        Raises:
            InputError: there are none.
        """
        shards = Shards(root, "test", columns=("document", "length"))
        if shards.rows == 0:
            raise InputError(f"{root}: the test split is empty; expected at least one document: add data")
        columns = shards.take(np.arange(shards.rows))
        found = columns["document"].astype(np.int64)
        ids = np.argsort(found, kind="stable")
        documents, places = np.unique(found[ids], return_inverse=True)
        every = cls(documents, ids, places, columns["length"][ids].astype(np.int64))
        return every.take(spread_units(documents, most))

    def take(self, documents: NDArray[np.int64]) -> TestDocuments:
        """These documents of them, in ascending order."""
        rows = np.isin(self.documents[self.places], documents)
        places = np.searchsorted(documents, self.documents[self.places[rows]])
        return TestDocuments(documents, self.sample_ids[rows], places, self.lengths[rows])


def open_scorer(
    file: Path, root: Path, engine: str, format: Format, threads: int, gpus: float = 0, precision: Precision = "fp32",
    places: int = 0, kv_cache: KvCache = "f16",
) -> TextScorer:  # fmt: skip
    """What a file is judged by on rows of the data set at ``root``, and on others of ``places`` places at most. Of the
    GPUs that this process has, and the precision, torch alone makes use.

    Raises:
        InputError: the file cannot be loaded, or its context is shorter than such rows: its figures would mean nothing.
    """
    loader, manifest = ENGINES[engine], Manifest.read(root)
    longest = max(manifest.positions, places)
    if isinstance(loader, ScoringLoader):
        return loader.scorer(file, longest, threads, kv_cache)
    return torch_scorer(_read_back(file, format, longest), manifest, gpus, precision)


def torch_scorer(model: Any, manifest: Manifest, gpus: float, precision: Precision) -> TextScorer:
    """Of a causal language model that is in memory, for rows of this data."""
    where = start_compute(gpus, precision)
    batch_rows = max(1, BATCH_LOGITS[where.device.type] // (manifest.positions * manifest.outputs))
    return TorchScorer(where.place(model), batch_rows, where.device)


def score_text(
    sha256: str, root: Path, documents: NDArray[np.int64], scorer: TextScorer, tell: Tell, limit: ScoringTime,
    counted: str | None = None,
) -> FileScores:  # fmt: skip
    """Nats and first choices of a file that goes by its hash, on test documents of the data set at ``root``, or on
    the first of them where its time is over: of every prediction, or of those that the column ``counted`` has.

    Raises:
        ValueError: the scorer gives fewer rows than it was given, or more.
    """
    rows = TestDocuments.of(root).take(documents)
    nats, predictions = np.zeros(len(rows.documents)), np.zeros(len(rows.documents), np.int64)
    choices, done = list[NDArray[np.int32]](), 0
    for row, (place, scores, counts_P) in enumerate(_scored_rows(Shards(root, "test"), rows, scorer, counted)):
        nats[place] += scores.nats_P[counts_P].sum()
        predictions[place] += counts_P.sum()
        choices.append(scores.choices_P[counts_P])
        whole = row + 1 == len(rows.places) or rows.places[row + 1] != place
        done = place + whole
        tell(place)
        if whole and limit.is_over(done):
            break
    choices_N, sizes = np.concatenate(choices).astype(np.int32), _of_documents(root, "size_bytes", rows.documents)
    return FileScores(sha256, rows.documents, nats, sizes, predictions, choices_N).first(done)


def _scored_rows(
    shards: Shards, rows: TestDocuments, scorer: TextScorer, counted: str | None
) -> Iterator[tuple[int, PlaceScores, NDArray[np.bool_]]]:
    """The place of each row's document, its scores, and which of them count; ``UNITS_TOGETHER`` documents by
    themselves, since torch puts rows of several into a batch.
    """
    counts = deque[NDArray[np.bool_]]()  # of the rows that were read and are not scored yet: a scorer may read ahead

    def tokens(sample_ids: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        for tokens_S, counts_P in test_rows(shards, sample_ids, counted):
            counts.append(counts_P)
            yield tokens_S

    for first in range(0, len(rows.documents), UNITS_TOGETHER):
        here = slice(*np.searchsorted(rows.places, (first, first + UNITS_TOGETHER)))
        found = scorer.score(tokens(rows.sample_ids[here]))
        for place, scores in zip(rows.places[here].tolist(), found, strict=True):
            yield place, scores, counts.popleft()


def test_rows(
    shards: Shards, sample_ids: NDArray[np.int64], counted: str | None
) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
    """The tokens of each row, those that are read and the last that is predicted; and which predictions count."""
    for start in range(0, len(sample_ids), READ_ROWS):
        columns = shards.take(sample_ids[start : start + READ_ROWS])
        for row, length in enumerate(columns["length"]):
            counts_P = np.ones(length, bool) if counted is None else columns[counted][row, :length] > 0
            yield columns["tokens"][row, : length + 1], counts_P


def document_clusters(root: Path, documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """See ``Task.clusters``: each document by itself, where there are no near-copies or they were not looked for."""
    manifest = Manifest.read(root)
    found = manifest.near_duplicates
    if found is None or found.test_clusters == manifest.splits["test"].documents:
        return documents
    return _of_documents(root, CLUSTER, documents)


def _of_documents(root: Path, column: str, documents: NDArray[np.int64]) -> NDArray[np.int64]:
    table = pq.read_table(root / DOCUMENTS, columns=["document", column])
    values: dict[Any, Any] = dict(zip(table["document"].to_pylist(), table[column].to_pylist(), strict=True))
    return np.array([values[int(document)] for document in documents], np.int64)


def measure_text(
    file: Path, root: Path, settings: Evaluate, engine: str, format: Format, say: Say
) -> dict[str, Metric]:
    """Speed, memory and parity of the serving engine on the beginnings of test documents."""
    tokenizer = Manifest.read(root).tokenizer(root)
    assert tokenizer is not None
    rows = TestDocuments.of(root, settings.max_documents)
    prompts = test_prompts(rows, Shards(root, "test"), max(settings.probe_prompts, TIMED_PROMPTS))
    probed = prompts[: settings.probe_prompts]
    texts = pq.read_table(root / TEST_TEXTS, columns=["text"])["text"].to_pylist()
    request = TextRequest(
        engine=engine,
        file=str(file),
        threads=settings.threads,
        prompts=probed,
        probe_tokens=settings.probe_tokens,
        texts=texts,
        timed_prompts=prompts[:TIMED_PROMPTS],
        timed_requests=settings.timed_requests,
        probe_s=settings.probe_s,
        narrow=settings.narrow,
        fewest_requests=settings.fewest_requests,
        decode_tokens=settings.decode_tokens,
        streams=settings.streams,
        kv_cache=settings.kv_cache,
    )
    answer = probe.probe_text(request, say)
    say("parity")
    longest = max(len(prompt) + len(given.tokens) for prompt, given in zip(probed, answer.answers, strict=True))
    scorer = open_scorer(file, root, engine, format, settings.threads, settings.gpus, settings.precision, longest - 1,
                         settings.kv_cache)  # fmt: skip
    nats = [
        text_parity_nats(scorer, prompt, given.tokens, given.logprobs)
        for prompt, given in zip(probed, answer.answers, strict=True)
        if given.tokens
    ]
    scorer.close()
    compared = sum(len(given.tokens) for given in answer.answers)
    metrics = cost_metrics(answer, settings.timed_requests, settings.confidence)
    metrics |= {
        "time_to_first_token_s": Metric(value=median(answer.first_token_s), unit="s", n=len(answer.first_token_s)),
        "split_otherwise": split_otherwise(Tokenizer.from_file(str(tokenizer)), texts, answer.splits),
    }
    if answer.tokens_per_s:
        rate = median(answer.tokens_per_s)
        metrics["decode_tokens_per_s"] = Metric(value=rate, unit="tokens/s", n=len(answer.tokens_per_s))
    if answer.streams_tokens_per_s:
        rate = median(answer.streams_tokens_per_s)
        metrics[STREAMS_RATE] = Metric(value=rate, unit="tokens/s", n=settings.streams)
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
    scorer: TextScorer, prompt: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float]
) -> float:
    """How far a greedy completion is from a scorer, in nats; at least one token must have been generated.

    The largest difference of a chosen token's log-probability. Where the scorer prefers another token by a gap g,
    the engine ranks the two the other way round, so it is off by at least g / 2 on one of them: that counts too.
    Near ties may fall either way, and cost next to nothing.
    """
    scores = next(iter(scorer.score([np.array([*prompt, *tokens])])))
    nats_N, best_N = scores.nats_P[len(prompt) - 1 :], scores.choice_nats_P[len(prompt) - 1 :]
    differences_N = np.abs(np.asarray(logprobs) + nats_N)
    return float(np.maximum(differences_N, (nats_N - best_N) / 2).max())


def test_prompts(rows: TestDocuments, shards: Shards, count: int) -> list[list[int]]:
    """The first tokens of ``count`` rows, evenly spread over the chosen documents."""
    picked = spread_units(rows.sample_ids, count)
    columns = shards.take(picked)
    ends = np.clip(columns["length"] - 1, 1, PROMPT_TOKENS)  # a context may be as short as a row: an answer must fit
    return [tokens[:end].tolist() for tokens, end in zip(columns["tokens"], ends, strict=True)]
