"""Checkpoints of a training: which there are, which is good, which to keep.

    <folder>/ledger.json              whose checkpoints these are, and the highest step ever committed
    <folder>/00000300-<attempt>/      one checkpoint: the files of all ranks, and
        rank-00000.json ...           what each rank wrote, with hashes: its last file
        checkpoint.json               everything of all ranks, written last by rank 0

A checkpoint without ``checkpoint.json`` does not exist. No two attempts share a directory, so the files of a group
of workers that was killed never mix with those of the next. Nothing is deserialised before its hash was checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from overproof.config import CheckpointPolicy
from overproof.errors import InputError
from overproof.files import FileEntry, atomic_write, filesystem, join_uri, local_cache, mismatched_files

LEDGER = "ledger.json"
CHECKPOINT_MANIFEST = "checkpoint.json"
FORMAT = 1
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    uri: str
    step: int  # finished steps
    world: int  # ranks that wrote it
    score: float | None  # validation loss at that step, where there was one
    files: Mapping[str, FileEntry]

    @contextmanager
    def local(self) -> Iterator[Path]:
        """Its files on this machine; those of a remote store are fetched once for all processes, and checked.

        Raises:
            InputError: a file is missing or is not what was written.
        """
        files, root = filesystem(self.uri)
        if isinstance(files, fs.LocalFileSystem):
            yield Path(root)
            return

        def fetch(folder: Path) -> None:
            fs.copy_files(root, str(folder), source_filesystem=files)
            fault = find_fault(fs.LocalFileSystem(), str(folder), self.files)
            if fault:
                raise InputError(f"{self.uri}: {fault}, as fetched; expected what was written: run again")

        yield local_cache(self.key, fetch)

    def fault(self) -> str | None:
        """What is wrong with it where it lies, or None; every file is hashed."""
        files, root = filesystem(self.uri)
        return find_fault(files, root, self.files)

    @property
    def key(self) -> str:
        """A name that no other content has."""
        entries = {name: entry.sha256 for name, entry in self.files.items()}
        return hashlib.sha256(_canonical(entries)).hexdigest()


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training. Small and picklable."""

    uri: str
    fingerprint: str  # of the artifact that the training makes
    config: Any
    parents: Mapping[str, str]
    policy: CheckpointPolicy

    def begin(self) -> None:
        """Take the folder for this training.

        Raises:
            InputError: it holds an unfinished training of another recipe or of other data; what differs.
        """
        files, root = self._opened()
        ledger = self._ledger()
        if ledger and ledger["fingerprint"] != self.fingerprint and ledger["committed"]:
            raise unfinished_training_error(self.uri, ledger, self.config, self.parents, ledger["committed"])
        if ledger is None or ledger["fingerprint"] != self.fingerprint:
            if ledger is None and self._found():
                return  # the checkpoints speak for themselves
            files.create_dir(root, recursive=True)
            files.delete_dir_contents(root, missing_dir_ok=True)
            self.note(0)

    def newest(self, say: Notify) -> Checkpoint | None:
        """The newest checkpoint whose files are all what was written, or None where none was ever committed.

        Every file is hashed. What is wrong with a newer one is told through ``say``.

        Raises:
            InputError: there should be one, and none is good.
        """
        faults: list[str] = []
        for name in sorted(self._found(), reverse=True):
            kept = self._read(name)
            fault = kept if isinstance(kept, str) else kept.fault()
            if fault is None and isinstance(kept, Checkpoint):
                for each in faults:
                    say(f"{each}; going on from step {kept.step}")
                return kept
            if fault:
                faults.append(f"checkpoint {name}: {fault}")
        committed = self.committed()
        if committed or any(not fault.endswith(UNFINISHED) for fault in faults):
            raise InputError(
                f"{self.uri}: training had reached step {committed or 'an unknown one'}, and no good checkpoint is "
                f"left: {'; '.join(faults) or 'none was found'}. Restore one, or delete the folder to start anew"
            )
        return None

    def committed(self) -> int:
        """The highest step ever committed; 0 before the first."""
        ledger = self._ledger()
        return int(ledger["committed"]) if ledger else 0

    def note(self, step: int) -> None:
        """Write down that a step was committed."""
        files, root = self._opened()
        content = {"format": FORMAT, "fingerprint": self.fingerprint, "config": self.config,
                   "parents": dict(self.parents), "committed": step}  # fmt: skip
        atomic_write(files, f"{root}/{LEDGER}", with_checksum(content))

    def folder(self, step: int, attempt: str) -> str:
        """Where an attempt writes its checkpoint after ``step`` steps."""
        return join_uri(self.uri, f"{step:08d}-{attempt}")

    def all(self) -> list[Checkpoint]:
        """Every committed checkpoint, oldest first; files are not hashed."""
        return [kept for kept in map(self._read, sorted(self._found())) if isinstance(kept, Checkpoint)]

    def best(self) -> Checkpoint | None:
        """The committed checkpoint of lowest score."""
        return next(iter(rank_by_score(self.all())), None)

    def prune(self, newest: Checkpoint) -> None:
        """Delete what the policy does not keep, now that ``newest`` is committed.

        What dead attempts left goes too, and so does whatever claims to be further on: it was found bad, or training
        would have gone on from there.
        """
        files, root = self._opened()
        others = [each for each in self.all() if each.step < newest.step]
        kept = {each.uri for each in retained([*others, newest], self.policy)}
        for name in self._found():
            if join_uri(self.uri, name) not in kept:
                files.delete_dir(f"{root}/{name}")

    def _opened(self) -> tuple[fs.FileSystem, str]:
        return filesystem(self.uri)

    def _found(self) -> list[str]:
        files, root = self._opened()
        listing = files.get_file_info(fs.FileSelector(root, allow_not_found=True))
        names = [info.base_name for info in listing if info.type == fs.FileType.Directory]
        return [name for name in names if name.partition("-")[0].isdigit()]

    def _read(self, name: str) -> Checkpoint | str:
        """A checkpoint, or why it is none."""
        uri = join_uri(self.uri, name)
        files, root = filesystem(uri)
        content = read_checksummed(files, f"{root}/{CHECKPOINT_MANIFEST}")
        if isinstance(content, str):
            return UNFINISHED if content == MISSING and int(name.partition("-")[0]) > self.committed() else content
        if content["fingerprint"] != self.fingerprint:
            return f"{CHECKPOINT_MANIFEST} is of another recipe"
        entries = {file: FileEntry(**entry) for file, entry in content["files"].items()}
        return Checkpoint(uri, content["step"], content["world"], content["score"], entries)

    def _ledger(self) -> dict[str, Any] | None:
        files, root = self._opened()
        content = read_checksummed(files, f"{root}/{LEDGER}")
        return None if isinstance(content, str) else content


MISSING = f"{CHECKPOINT_MANIFEST} is missing"
UNFINISHED = "was never finished"


def rank_by_score(kept: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Those that have a score, lowest first."""
    scored = [(each.score, each.step, each) for each in kept if each.score is not None]
    return [each for *_, each in sorted(scored, key=lambda item: item[:2])]


def retained(kept: Iterable[Checkpoint], policy: CheckpointPolicy) -> list[Checkpoint]:
    """What the policy keeps: the last ones, and the best."""
    ordered = sorted(kept, key=lambda each: each.step, reverse=True)
    last, best = ordered[: policy.keep_last], rank_by_score(ordered)[: policy.keep_best]
    return last + [each for each in best if each not in last]


def find_fault(files: fs.FileSystem, root: str, entries: Mapping[str, FileEntry]) -> str | None:
    """What is wrong with the first file that is not as it was written, or None."""
    for name, entry in entries.items():
        info = files.get_file_info(f"{root}/{name}")
        if info.type == fs.FileType.File and info.size != entry.size_bytes:  # no need to hash the others
            return f"{name} has {info.size} bytes instead of {entry.size_bytes}"
    for name, found in mismatched_files(files, root, entries):
        if found is None:
            return f"{name} is missing"
        return f"{name} was changed: its sha256 is {found[:12]}…, not {entries[name].sha256[:12]}…"
    return None


def unfinished_training_error(
    uri: str, ledger: Mapping[str, Any], config: Any, parents: Mapping[str, str], step: int
) -> InputError:
    """What to say where a folder holds what another recipe, or other parents, left unfinished."""
    found = list(differences(ledger["config"], config))
    for stage, fingerprint in parents.items():
        before = ledger["parents"].get(stage, "none")
        if before != fingerprint:
            found.append(f"{stage} {before[:8]}, now {fingerprint[:8]}")
    return InputError(
        f"{uri}: holds an unfinished training, at step {step}, whose recipe differs: {'; '.join(found)}. Run that "
        "recipe to go on with it, or delete the folder to start anew"
    )


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Each field in which two trees of JSON values differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in [*before, *(key for key in now if key not in before)]:
            yield from differences(before.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif before != now:
        yield f"{path} {json.dumps(before)}, now {json.dumps(now)}"


def with_checksum(content: Mapping[str, Any]) -> bytes:
    """JSON that carries the hash of itself."""
    return json.dumps({**content, "sha256": hashlib.sha256(_canonical(content)).hexdigest()}, indent=1).encode()


def read_checksummed(files: fs.FileSystem, path: str) -> dict[str, Any] | str:
    """What ``seal`` wrote, or what is wrong with it."""
    name = path.rpartition("/")[2]
    if files.get_file_info(path).type != fs.FileType.File:
        return f"{name} is missing"
    with files.open_input_stream(path) as stream:
        raw = stream.read()
    try:
        content = json.loads(raw)
        found = content.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError):
        return f"{name} is not what was written"
    if found != hashlib.sha256(_canonical(content)).hexdigest():
        return f"{name} was changed"
    assert isinstance(content, dict)
    return content


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
