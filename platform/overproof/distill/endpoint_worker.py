"""A teacher that is served: what its endpoint tells of train rows, as files of the cache.

Shapes: B rows, S = P + 1 tokens of a row, P predictions, K tokens kept of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from overproof.config import Served, TopK
from overproof.data.manifest import POSITION, START
from overproof.data.parquet_reader import Columns
from overproof.distill.target_cache import TargetIndex
from overproof.distill.teacher_worker import CaptureJob, TeacherWorker
from overproof.engines.endpoint import Endpoint
from overproof.registry import TASKS
from overproof.stage_context import Notice, Progress
from overproof.tasks.base import TokenTask


@dataclass(frozen=True, kw_only=True)
class EndpointJob(CaptureJob):
    """What every worker is given that asks an endpoint."""

    served: Served
    progress: Progress


class EndpointWorker(TeacherWorker):
    """Asks for the teacher's targets; the files are those of ``TargetWorker``."""

    index: TargetIndex
    job: EndpointJob

    @cached_property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.job.served, lambda text: self.job.progress(Notice(text)))

    def compute(self, sample_ids: NDArray[np.int64]) -> Columns:
        cache, rows = self.index.identity, self.rows.take(sample_ids)
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
