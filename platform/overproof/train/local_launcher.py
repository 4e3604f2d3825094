"""Training without Ray: the ranks are forked processes of one machine, and they read the shards themselves."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from overproof.errors import InputError
from overproof.stage_context import NOTICE
from overproof.train.checkpoint_callback import NoSignal
from overproof.train.rank_trainer import RankTrainer, read_own_rows
from overproof.train.train_job import ResumePoint, TrainJob

POLL_S = 0.05


class WorkersDied(Exception):
    """A rank ended without a result, and the others were ended with it."""


@dataclass(frozen=True)
class LocalWorkers:
    """The running ranks of one attempt."""

    start: ResumePoint
    ranks: tuple[ForkProcess, ...]
    results: tuple[Connection, ...]
    meeting: Path  # where they find each other; gone with them

    @classmethod
    def begin(cls, job: TrainJob, world: int) -> LocalWorkers:
        """Start ``world`` ranks from the newest good checkpoint.

        Raises:
            InputError: checkpoints of another recipe are in the way, or none is good.
        """
        job.checkpoints.begin()
        start = ResumePoint(job.checkpoints.newest(lambda said: job.progress(NOTICE, 0, job.train.steps, said)))
        context = multiprocessing.get_context("fork")
        meeting = Path(tempfile.mkdtemp(prefix="overproof-ranks-"))
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            context.Process(target=_rank, args=(job, start, rank, world, meeting, pipes[rank][1]), daemon=True)
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        return cls(start, tuple(ranks), tuple(pipe[0] for pipe in pipes), meeting)

    def join(self) -> dict[str, Any]:
        """Wait for the end; gives rank 0's metrics.

        Raises:
            InputError: a rank met bad input.
            GroupDied: a rank ended otherwise.
        """
        try:
            while any(rank.is_alive() for rank in self.ranks):
                wait([rank.sentinel for rank in self.ranks if rank.is_alive()], POLL_S)
                if any(rank.exitcode not in (None, 0) for rank in self.ranks):
                    break
        finally:
            self.kill()
        said = [_received(result) for result in self.results]
        refused = next((word for word in said if isinstance(word, InputError)), None)
        if refused:
            raise refused
        if any(rank.exitcode for rank in self.ranks):
            raise WorkersDied(f"ranks ended with {[rank.exitcode for rank in self.ranks]}")
        metrics = said[0]
        assert isinstance(metrics, dict)
        return metrics

    def kill(self) -> None:
        """End every rank at once."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()
        shutil.rmtree(self.meeting, ignore_errors=True)


def _received(result: Connection) -> Any:
    try:
        return result.recv() if result.poll() else None
    except EOFError:  # it ended before it said anything
        return None


def _rank(job: TrainJob, start: ResumePoint, rank: int, world: int, meeting: Path, result: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    backend = "nccl" if job.train.gpus_per_worker else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}/rendezvous", rank=rank, world_size=world)
    try:
        result.send(RankTrainer(job, start, rank, world).fit(read_own_rows(job, start, rank, world), NoSignal()))
    except InputError as error:
        result.send(error)
        raise SystemExit(1) from None
    dist.destroy_process_group()
