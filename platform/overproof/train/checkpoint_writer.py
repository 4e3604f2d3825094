"""Saving while training goes on: a copy in memory now; serialised, hashed, written and committed by a thread."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist
from pyarrow import fs
from torch import Tensor

from overproof.config import Training
from overproof.errors import InputError
from overproof.files import FileEntry, HashingStream, atomic_write, filesystem
from overproof.train.checkpoint import (
    CHECKPOINT_MANIFEST,
    CURVE_FILE,
    Checkpoint,
    Checkpoints,
    Damage,
    read_checksummed,
    with_checksum,
)

if TYPE_CHECKING:  # they import transformers
    from overproof.train.deepspeed_engine import DeepSpeedEngine
    from overproof.train.engine import StateWriter
    from overproof.train.loop import CurveRow

POLL_S, LONGEST_POLL_S = 0.05, 1.0
# Ranks write equal parts at the same time, so the others are done soon after rank 0. One that lags this long is gone.
RANK_TIMEOUT_S = 120.0
RANK_TIMEOUT_WRITES = 10  # and as many times what rank 0's own part took: a slow store is no dead rank


class RankLostError(RuntimeError):
    """A rank has not written its part of a checkpoint, which therefore was not committed."""


class CheckpointSignal(Protocol):
    """How a rank learns that a checkpoint is wanted before the next one is due."""

    def requested(self) -> bool:
        """Whether this rank was asked for one; called at every step."""

    def acknowledge(self, step: int) -> None:
        """The checkpoint asked for is committed; called on every rank."""


class NoSignal:
    """Nobody asks for a checkpoint."""

    def requested(self) -> bool:
        return False

    def acknowledge(self, step: int) -> None: ...


class CheckpointCallback:
    """When a rank saves: every so many steps, after the last, and when any rank was asked to."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        train: Training,
        writer: AsyncCheckpointWriter,
        signal: CheckpointSignal,
        curve: Sequence[CurveRow],
    ) -> None:
        """``curve`` holds the rows so far; rank 0's go into every checkpoint."""
        self.engine, self.train, self.writer, self.signal, self.curve = engine, train, writer, signal, curve
        self._requested = False

    def start_sync(self, rows_hash: int) -> None:
        """Before a step: begin to sum the hash of its rows over the ranks, and whether one was asked to save."""
        values = torch.tensor([rows_hash, int(self.signal.requested())], dtype=torch.int64, device=self.engine.device)
        self._reduced = self.engine.all_reduce_async(values)

    def finish_sync(self) -> int:
        """After the step: the summed hash of its rows."""
        rows_hash, requests = self._reduced().tolist()
        self._requested = requests > 0
        return int(rows_hash)

    def after_step(self, step: int, score: float | None) -> None:
        """Save if it is time.

        Raises:
            InputError: an earlier save could not be written.
        """
        self.writer.raise_error()
        if self._requested or step % self.train.checkpoint.every_steps == 0 or step == self.train.steps:
            lines = "".join(json.dumps(row) + "\n" for row in self.curve)
            extra = {CURVE_FILE: lines.encode()} if self.writer.rank == 0 else {}
            self.writer.save(step, score, self.engine.save, extra)
        if self._requested:
            self.flush()
            self.signal.acknowledge(step)

    def flush(self) -> None:
        """Wait until every rank knows that the last save is committed."""
        self.writer.wait()
        dist.barrier()


class AsyncCheckpointWriter:
    """One rank's part in the checkpoints of an attempt. One save is under way at a time."""

    def __init__(
        self, checkpoints: Checkpoints, attempt: str, rank: int, world: int, rank_timeout_s: float = RANK_TIMEOUT_S
    ) -> None:
        """``rank_timeout_s`` is how long rank 0 waits for another rank's part, at least."""
        self.checkpoints, self.attempt, self.rank, self.world = checkpoints, attempt, rank, world
        self.rank_timeout_s = rank_timeout_s
        self._copies = TensorCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self, step: int, score: float | None, save_state: Callable[[StateWriter], None], extra: Mapping[str, bytes]
    ) -> None:
        """Copy what ``save_state`` hands over and return; every rank calls it after the same step.

        ``extra`` are further files of this rank, by name.

        Raises:
            InputError: the save before could not be written.
            RankLostError: another rank did not write its part of it.
        """
        self.wait()
        state: dict[str, Any] = {}
        save_state(lambda name, value: state.__setitem__(name, self._copies.copy(name, value)))
        job = CheckpointJob(
            self.checkpoints, self.checkpoints.directory(step, self.attempt), step, score, self.rank, self.world,
            self.rank_timeout_s,
        )  # fmt: skip
        arguments = (job, state, dict(extra))
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def raise_error(self) -> None:
        """Raises:
        InputError: a save could not be written.
        RankLostError: another rank did not write its part.
        """
        if self._error:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until the save under way is written; on rank 0, until it is committed.

        Raises:
            InputError: it could not be written.
            RankLostError: another rank did not write its part.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        self.raise_error()

    def _write(self, job: CheckpointJob, state: Mapping[str, Any], extra: Mapping[str, bytes]) -> None:
        try:
            began_s = time.monotonic()
            job.write(state, extra)
            if job.rank == 0:
                job.commit(time.monotonic() - began_s)
        except OSError as error:
            job.discard()
            last = self.checkpoints.committed_step()
            self._error = InputError(
                f"{job.uri}: the checkpoint of step {job.step} could not be written: {error}. Make room or give "
                f"another store, then run again: training goes on from step {last}"
            )
        except Exception as error:  # surfaces in the training thread
            self._error = error


@dataclass(frozen=True)
class CheckpointJob:
    """One rank's part in one checkpoint."""

    checkpoints: Checkpoints
    uri: str
    step: int
    score: float | None
    rank: int
    world: int
    rank_timeout_s: float

    def write(self, state: Mapping[str, Any], extra: Mapping[str, bytes]) -> None:
        """Write this rank's files, and last the list of them."""
        files, root = filesystem(self.uri)
        files.create_dir(root, recursive=True)
        entries: dict[str, FileEntry] = {}
        for name, value in {**state, **extra}.items():
            with files.open_output_stream(f"{root}/{name}") as stream:
                hashed = TorchStream(stream)
                if name in extra:
                    hashed.write(value)
                else:
                    hashed.save(value)
            entries[name] = hashed.entry()
        listing = {"files": {name: entry.model_dump() for name, entry in entries.items()}}
        atomic_write(files, f"{root}/{_rank_listing(self.rank)}", with_checksum(listing))

    def commit(self, write_s: float) -> None:
        """Wait for the lists of all ranks, then write the manifest: from now on the checkpoint exists.

        Raises:
            RankLostError: a list did not come.
        """
        timeout_s = max(self.rank_timeout_s, RANK_TIMEOUT_WRITES * write_s)
        entries: dict[str, Any] = {}
        for rank in range(self.world):
            entries |= self._await_listing(rank, timeout_s)
        files, root = filesystem(self.uri)
        content = {"fingerprint": self.checkpoints.fingerprint, "step": self.step, "world": self.world,
                   "score": self.score, "files": entries}  # fmt: skip
        atomic_write(files, f"{root}/{CHECKPOINT_MANIFEST}", with_checksum(content))
        self.checkpoints.record_step(self.step)
        found = {name: FileEntry(**entry) for name, entry in entries.items()}
        self.checkpoints.prune(Checkpoint(self.uri, self.step, self.world, self.score, found))

    def _await_listing(self, rank: int, timeout_s: float) -> dict[str, Any]:
        """What a rank says it has written. The time counts anew for each rank, so one that is slow harms no other."""
        files, root = filesystem(self.uri)
        deadline_s, poll_s = time.monotonic() + timeout_s, POLL_S
        while isinstance(listing := read_checksummed(files, f"{root}/{_rank_listing(rank)}"), Damage):
            if time.monotonic() >= deadline_s:
                raise RankLostError(
                    f"{self.uri}: the checkpoint of step {self.step} was not committed: within {timeout_s:.0f} s rank "
                    f"{rank} of {self.world} has not written its part ({listing}); expected one from every rank. Its "
                    f"worker or the store hangs; training can go on from step {self.checkpoints.committed_step()}"
                )
            time.sleep(poll_s)
            poll_s = min(LONGEST_POLL_S, 1.5 * poll_s)
        found: dict[str, Any] = listing["files"]
        return found

    def discard(self) -> None:
        """Leave nothing half-written behind."""
        files, root = filesystem(self.uri)
        if files.get_file_info(root).type == fs.FileType.Directory:
            files.delete_dir(root)


def _rank_listing(rank: int) -> str:
    """The file in which a rank lists what it has written."""
    return f"rank-{rank:05d}.json"


class TorchStream(HashingStream):
    """One that torch writes to."""

    _error: OSError | None = None

    def save(self, value: Any) -> None:
        """Serialise a value into the stream.

        Raises:
            OSError: as the stream raised it; torch would say "unexpected pos".
        """
        try:
            torch.save(value, cast(IO[bytes], self))
        except RuntimeError:
            if self._error:
                raise self._error from None
            raise

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._error = error
            raise


class TensorCopies:
    """Copies of nested values whose tensors lie in memory of its own, used again by the next copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, name: str, value: Any) -> Any:
        """A copy, all on the CPU; tensors that were one stay one."""
        return self._copy(value, (name,), {})

    def _copy(self, value: Any, path: tuple[Any, ...], copied: dict[Any, Tensor]) -> Any:
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in copied or not value.numel():
                copied[key] = self._fill_buffer(value.detach(), path)
            return copied[key]
        if isinstance(value, dict):
            items = {name: self._copy(each, (*path, name), copied) for name, each in value.items()}
            return type(value)(items) if type(value) is not dict else items
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(self._copy(each, (*path, index), copied) for index, each in enumerate(value))
        return copy.deepcopy(value)

    def _fill_buffer(self, value: Tensor, path: tuple[Any, ...]) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = self._buffers[path] = torch.empty(value.shape, dtype=value.dtype)
        return buffer.copy_(value)
