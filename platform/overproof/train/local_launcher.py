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
from overproof.train.checkpoint_writer import NoSignal
from overproof.train.rank_files import newest_sound_together
from overproof.train.rank_trainer import RankTrainer, read_rank_rows
from overproof.train.train_job import ResumePoint, TrainJob


class WorkersDied(Exception):
    """A rank ended without a result, and the others were ended with it."""


@dataclass(frozen=True)
class LocalWorkers:
    """The running ranks of one attempt."""

    resume: ResumePoint
    processes: tuple[ForkProcess, ...]
    results: tuple[Connection, ...]
    rendezvous: Path  # a folder through which the ranks find each other

    @classmethod
    def start(cls, job: TrainJob, world: int) -> LocalWorkers:
        """Start ``world`` ranks from the newest sound checkpoint.

        Raises:
            InputError: checkpoints of another recipe are in the way, or none is sound.
        """
        job.checkpoints.claim_folder()
        attempt = ResumePoint().attempt
        context = multiprocessing.get_context("fork")
        rendezvous = Path(tempfile.mkdtemp(prefix="overproof-ranks-"))
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_run_rank, args=(job, attempt, rank, world, rendezvous, pipes[rank][1]), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        results = tuple(pipe[0] for pipe in pipes)
        wait([results[0], *(process.sentinel for process in processes)])
        resume = _receive(results[0])  # as the ranks have found it, unless one of them ended
        group = cls(resume if isinstance(resume, ResumePoint) else ResumePoint(), tuple(processes), results, rendezvous)
        if isinstance(resume, InputError):
            group.kill()
            raise resume
        return group

    def join(self) -> dict[str, Any]:
        """Wait for the end; gives rank 0's metrics.

        Raises:
            InputError: a rank met bad input.
            WorkersDied: a rank ended otherwise.
        """
        try:
            while alive := [process.sentinel for process in self.processes if process.is_alive()]:
                wait(alive)
                if any(process.exitcode not in (None, 0) for process in self.processes):
                    break
        finally:
            self.kill()
        results = [_receive(result) for result in self.results]
        for result in results:
            if isinstance(result, InputError):
                raise result
        if any(process.exitcode for process in self.processes):
            raise WorkersDied(f"ranks ended with {[process.exitcode for process in self.processes]}")
        metrics = results[0]
        assert isinstance(metrics, dict)
        return metrics

    def kill(self) -> None:
        """End every rank at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        shutil.rmtree(self.rendezvous, ignore_errors=True)


def _receive(result: Connection) -> Any:
    try:
        return result.recv() if result.poll() else None
    except EOFError:  # it ended before it sent anything
        return None


def _run_rank(job: TrainJob, attempt: str, rank: int, world: int, rendezvous: Path, result: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    backend = "nccl" if job.train.gpus_per_worker else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}/store", rank=rank, world_size=world)
    try:
        resume = ResumePoint(newest_sound_together(job.checkpoints, job.progress), attempt)
        if rank == 0:
            result.send(resume)
        rows = read_rank_rows(job, resume, rank, world)
        result.send(RankTrainer(job, resume, rank, world).fit(rows, NoSignal()))
    except InputError as error:
        result.send(error)
        raise SystemExit(1) from None
    dist.destroy_process_group()
