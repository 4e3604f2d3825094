"""A teacher that is served: what its endpoint tells of train rows, as files of the cache, and what it writes.

Shapes: B rows, Q tokens of a prompt, S = P + 1 tokens of a row, P predictions, K tokens kept of each.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from overproof.config import Served, TopK
from overproof.data.manifest import POSITION, START, Manifest
from overproof.data.order import random_words
from overproof.data.parquet_reader import Columns
from overproof.data.tokenization import boundary_of
from overproof.distill.target_cache import TargetIndex
from overproof.distill.teacher_text import GENERATION_KEY, TextIndex
from overproof.distill.teacher_worker import CaptureJob, TeacherWorker
from overproof.engines.endpoint import Endpoint
from overproof.errors import InputError
from overproof.registry import TASKS
from overproof.stage_context import Notice, Progress
from overproof.tasks.base import TokenTask

SEEDS = 1 << 31  # that any endpoint takes


@dataclass(frozen=True, kw_only=True)
class EndpointJob(CaptureJob):
    """What every worker is given that asks an endpoint."""

    served: Served
    progress: Progress


class EndpointWorker(TeacherWorker):
    """Asks an endpoint."""

    job: EndpointJob

    @cached_property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.job.served, lambda text: self.job.progress(Notice(text)))


class EndpointTargetWorker(EndpointWorker):
    """Asks for the teacher's targets; the files are those of ``TargetWorker``."""

    index: TargetIndex

    def compute(self, sample_ids: NDArray[np.int64]) -> Columns:
        cache, rows = self.index.identity, self.take(sample_ids)
        task, scheme = TASKS[cache.task], cache.scheme
        assert isinstance(task, TokenTask)
        assert isinstance(scheme, TopK)  # by the recipe's checks, as is temperature 1 alone
        shape_BP, k = (len(sample_ids), cache.positions), scheme.k
        label_BP = np.zeros(shape_BP)
        indices_BPK = np.tile(np.arange(k), (*shape_BP, 1))  # where nothing is predicted; it does not count
        logprobs_BPK = np.full((*shape_BP, k), -np.log(cache.outputs))
        texts = list(texts_in(rows))
        told = self.endpoint.read_rows((rows["tokens"][row, part].tolist() for row, part in texts), k)
        for (row, part), each in zip(texts, told, strict=True):
            places = slice(part.start, part.stop - 1)
            label_BP[row, places] = each.logprobs_P
            indices_BPK[row, places], logprobs_BPK[row, places] = each.likeliest(k, cache.outputs)
        with np.errstate(divide="ignore"):
            tail_BP = np.log1p(-np.exp(logprobs_BPK).sum(-1).clip(max=1))
        found = {"label_logprob": label_BP, "indices": indices_BPK, "logprobs": logprobs_BPK, "tail": tail_BP}
        counted_BP = np.arange(cache.positions) < rows["length"][:, None]
        if task.counted is not None:
            counted_BP &= rows[task.counted] > 0
        return cache.layout.encode({"sample_id": sample_ids, "tokens": rows["tokens"], "mask": counted_BP, **found})


class EndpointTextWorker(EndpointWorker):
    """Asks for text of the teacher; the files are those of ``TextWorker``.

    Where a text ends the next document begins, as in the data, and the teacher writes that, too. A row's text follows
    from its own seed, as far as the endpoint rounds alike from request to request.
    """

    index: TextIndex

    @cached_property
    def boundary(self) -> list[int]:
        manifest = Manifest.read(self.job.prepared)
        assert manifest.start_id is not None
        assert manifest.end_id is not None
        return list(boundary_of(manifest.start_id, manifest.end_id))

    def compute(self, sample_ids: NDArray[np.int64]) -> Columns:
        rows, identity = self.rows.take(sample_ids), self.index.identity
        starts = rows[START].tolist() if START in rows else [None] * len(sample_ids)
        seeds = random_words(identity.seed, GENERATION_KEY, sample_ids, 1)[:, 0] >> np.uint64(33)
        prompts = rows["tokens"][:, : identity.prompt_tokens].tolist()
        with ThreadPoolExecutor(self.job.served.concurrent_requests) as pool:
            written = list(pool.map(self._write_row, prompts, starts, seeds.tolist()))
        return {"sample_id": sample_ids, "tokens": np.array(written, rows["tokens"].dtype)}

    def _write_row(self, prompt: list[int], start: int | None, seed: int) -> list[int]:
        """A row of S tokens; with ``start`` its documents do not see each other."""
        identity, tokens = self.index.identity, list(prompt)
        length = identity.positions + 1
        while len(tokens) < length:
            begins = len(tokens) - 1 - tokens[::-1].index(start) if start in tokens else 0
            asked, own_seed = tokens[begins:], (seed + len(tokens)) % SEEDS
            ids, is_ended = self.endpoint.write(asked, length - len(tokens), identity.temperature, own_seed)
            if max(ids, default=0) >= identity.outputs:
                raise InputError(
                    f"{self.job.served.url}: writes token {max(ids)}; expected tokens of the data's {identity.outputs}"
                )
            tokens += ids
            if is_ended:
                tokens += self.boundary[1:] if ids[-1:] == self.boundary[:1] else self.boundary
        return tokens[:length]


def texts_in(rows: Columns) -> list[tuple[int, slice]]:
    """The texts of two tokens or more that rows hold, each by its row and its tokens there. Of rows that are packed so
    that none sees another, the places of a conversation begin at 0 (column ``position``), and a document begins with
    one token (column ``start``), which the one before it predicts, and so ends with. Other rows hold one.
    """
    found, shared = [], 0
    for row, length in enumerate(rows["length"]):
        starts = np.zeros(1, np.int64)
        if POSITION in rows:
            starts = np.flatnonzero(rows[POSITION][row] == 0)
        elif START in rows:
            starts, shared = np.flatnonzero(rows["tokens"][row] == rows[START][row]), 1
        bounds = [*(int(start) for start in {0, *starts.tolist()} if start <= length), int(length) + 1]
        pieces = [slice(a, min(b + shared, int(length) + 1)) for a, b in pairwise(sorted(bounds))]
        found += [(row, piece) for piece in pieces if piece.stop - piece.start > 1]
    return found
