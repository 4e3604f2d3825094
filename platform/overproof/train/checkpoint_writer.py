"""Saving while training goes on: a copy in memory now; serialised, hashed, written and committed by a thread."""

from __future__ import annotations

import copy
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from pyarrow import fs
from torch import Tensor

from overproof.errors import InputError
from overproof.files import FileEntry, atomic_write, filesystem
from overproof.train.checkpoint import CHECKPOINT_MANIFEST, Checkpoint, Checkpoints, read_checksummed, with_checksum

if TYPE_CHECKING:
    from overproof.train.engine import StateWriter  # which imports transformers

POLL_S = 0.05


class AsyncCheckpointWriter:
    """One rank's part in the checkpoints of an attempt. One save is under way at a time."""

    def __init__(self, checkpoints: Checkpoints, attempt: str, rank: int, world: int) -> None:
        self.checkpoints, self.attempt, self.rank, self.world = checkpoints, attempt, rank, world
        self._copies = TensorCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self, step: int, score: float | None, state: Callable[[StateWriter], None], extra: Mapping[str, bytes]
    ) -> None:
        """Copy what ``state`` hands over and return; every rank calls it after the same step.

        ``extra`` are further files of this rank, by name.

        Raises:
            InputError: the save before could not be written.
        """
        self.wait()
        held: dict[str, Any] = {}
        state(lambda name, value: held.__setitem__(name, self._copies.take(name, value)))
        job = _CheckpointJob(
            self.checkpoints, self.checkpoints.folder(step, self.attempt), step, score, self.rank, self.world
        )
        self._thread = threading.Thread(target=self._run, args=(job, held, dict(extra)), name="saver", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises:
        InputError: a save could not be written.
        """
        if self._error:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until the save under way is written; on rank 0, until it is committed.

        Raises:
            InputError: it could not be written.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self, job: _CheckpointJob, held: Mapping[str, Any], extra: Mapping[str, bytes]) -> None:
        try:
            job.write(held, extra)
            if job.rank == 0:
                job.commit()
        except OSError as error:
            job.give_up()
            last = self.checkpoints.committed()
            self._error = InputError(
                f"{job.uri}: the checkpoint of step {job.step} could not be written: {error}. Make room or give "
                f"another store, then run again: training goes on from step {last}"
            )
        except Exception as error:  # surfaces in the training thread
            self._error = error


@dataclass(frozen=True)
class _CheckpointJob:
    """One rank's part in one checkpoint."""

    checkpoints: Checkpoints
    uri: str
    step: int
    score: float | None
    rank: int
    world: int

    def write(self, held: Mapping[str, Any], extra: Mapping[str, bytes]) -> None:
        """Write this rank's files, and last the list of them."""
        files, root = filesystem(self.uri)
        files.create_dir(root, recursive=True)
        entries: dict[str, FileEntry] = {}
        for name, value in {**held, **extra}.items():
            with files.open_output_stream(f"{root}/{name}") as stream:
                hashed = HashingStream(stream)
                if name in extra:
                    hashed.write(value)
                else:
                    hashed.save(value)
            entries[name] = hashed.entry()
        listing = {"files": {name: entry.model_dump() for name, entry in entries.items()}}
        atomic_write(files, f"{root}/{_part(self.rank)}", with_checksum(listing))

    def commit(self) -> None:
        """Wait for the lists of all ranks, then write the manifest: from now on the checkpoint exists."""
        files, root = filesystem(self.uri)
        entries: dict[str, Any] = {}
        for rank in range(self.world):
            while isinstance(listing := read_checksummed(files, f"{root}/{_part(rank)}"), str):
                time.sleep(POLL_S)
            entries |= listing["files"]
        content = {"fingerprint": self.checkpoints.fingerprint, "step": self.step, "world": self.world,
                   "score": self.score, "files": entries}  # fmt: skip
        atomic_write(files, f"{root}/{CHECKPOINT_MANIFEST}", with_checksum(content))
        self.checkpoints.note(self.step)
        found = {name: FileEntry(**entry) for name, entry in entries.items()}
        self.checkpoints.prune(Checkpoint(self.uri, self.step, self.world, self.score, found))

    def give_up(self) -> None:
        """Leave nothing half-written behind."""
        files, root = filesystem(self.uri)
        if files.get_file_info(root).type == fs.FileType.Directory:
            files.delete_dir(root)


def _part(rank: int) -> str:
    return f"rank-{rank:05d}.json"


class HashingStream:
    """A stream that hashes what goes through it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.digest, self.size = stream, hashlib.sha256(), 0
        self.error: OSError | None = None

    def save(self, value: Any) -> None:
        """Serialise a value into the stream.

        Raises:
            OSError: as the stream raised it; torch would say "unexpected pos".
        """
        try:
            torch.save(value, cast(IO[bytes], self))
        except RuntimeError:
            if self.error:
                raise self.error from None
            raise

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            self.stream.write(data)
        except OSError as error:
            self.error = error
            raise
        count = memoryview(data).nbytes
        self.size += count
        return count

    def flush(self) -> None:
        self.stream.flush()

    def entry(self) -> FileEntry:
        """The identity of what was written."""
        return FileEntry(sha256=self.digest.hexdigest(), size_bytes=self.size)


class TensorCopies:
    """Copies of nested values whose tensors lie in memory of its own, used again by the next copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, name: str, value: Any) -> Any:
        """A copy, all on the CPU; tensors that were one stay one."""
        return self._copy(value, (name,), {})

    def _copy(self, value: Any, path: tuple[Any, ...], seen: dict[Any, Tensor]) -> Any:
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in seen or not value.numel():
                seen[key] = self._fill(value.detach(), path)
            return seen[key]
        if isinstance(value, dict):
            copied = {name: self._copy(each, (*path, name), seen) for name, each in value.items()}
            return type(value)(copied) if type(value) is not dict else copied
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(self._copy(each, (*path, index), seen) for index, each in enumerate(value))
        return copy.deepcopy(value)

    def _fill(self, value: Tensor, path: tuple[Any, ...]) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = self._buffers[path] = torch.empty(value.shape, dtype=value.dtype)
        return buffer.copy_(value)
