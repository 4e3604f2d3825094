"""Checkpoints of a training: which there are, which is sound, which to keep.

    <folder>/ledger.json              whose checkpoints these are, and the highest step ever committed
    <folder>/00000300-<attempt>/      one checkpoint: the files of all ranks, and
        curve.jsonl                   the learning curve up to here
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
from enum import Enum, auto
from pathlib import Path
from typing import Any

from pyarrow import fs

from overproof.artifact_cache import fetch
from overproof.config import CheckpointPolicy
from overproof.errors import InputError
from overproof.files import (
    FileChangedError,
    FileEntry,
    atomic_write,
    filesystem,
    join_uri,
    mismatched_files,
    read_bytes,
)
from overproof.stage_context import TrainingResumed

LEDGER = "ledger.json"
CHECKPOINT_MANIFEST = "checkpoint.json"
CURVE_FILE = "curve.jsonl"  # the learning curve: in a checkpoint up to its step, in the artifact to the end
FORMAT = 1


class DamageKind(Enum):
    """Why a file or a checkpoint cannot be used."""

    MISSING = auto()
    CHANGED = auto()
    UNFINISHED = auto()  # an attempt ended while it wrote: nothing that was ever promised is lost
    OTHER_RECIPE = auto()


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file or a checkpoint; its text for people."""

    kind: DamageKind
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    uri: str
    step: int  # finished steps
    world: int  # ranks that wrote it
    score: float | None  # validation loss at that step, where there was one
    files: Mapping[str, FileEntry]

    @contextmanager
    def local(self, names: Iterable[str] | None = None) -> Iterator[Path]:
        """The files with these names, or all, on this machine; those of a remote store are fetched once for all
        processes, and checked.

        Raises:
            InputError: a file is missing or is not what was written.
        """
        files, root = filesystem(self.uri)
        if isinstance(files, fs.LocalFileSystem):
            yield Path(root)
        else:
            yield fetch(files, root, self.content_sha256, self._entries(names))

    def find_damage(self, names: Iterable[str] | None = None) -> Damage | None:
        """What is wrong with the files of these names, or with any, or None; each is hashed, and of a remote store
        fetched, too, as ``local`` has it.

        Raises:
            InputError: there is no room for what is fetched.
        """
        (files, root), entries = filesystem(self.uri), self._entries(names)
        if isinstance(files, fs.LocalFileSystem):
            return find_damage(files, root, entries)
        if damage := find_wrong_size(files, root, entries):
            return damage
        try:
            fetch(files, root, self.content_sha256, entries)
        except FileChangedError as error:
            return Damage(DamageKind.CHANGED, str(error))
        return None

    def _entries(self, names: Iterable[str] | None) -> Mapping[str, FileEntry]:
        return self.files if names is None else {name: self.files[name] for name in names}

    @property
    def content_sha256(self) -> str:
        """A hash of every file's name and hash."""
        entries = {name: entry.sha256 for name, entry in self.files.items()}
        return hashlib.sha256(_canonical_json(entries)).hexdigest()


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training. Small and picklable."""

    uri: str
    fingerprint: str  # of the artifact that the training makes
    config: Any
    parents: Mapping[str, str]
    policy: CheckpointPolicy

    def claim_folder(self) -> None:
        """Take the folder for this training.

        Raises:
            InputError: it holds an unfinished training of another recipe or of other data; what differs.
        """
        files, root = filesystem(self.uri)
        ledger = self._read_ledger()
        if ledger and ledger["fingerprint"] != self.fingerprint and ledger["committed"]:
            raise unfinished_training_error(self.uri, ledger, self.config, self.parents, ledger["committed"])
        if ledger is None or ledger["fingerprint"] != self.fingerprint:
            if ledger is None and self._directories():
                return  # without a ledger, the checkpoints say themselves whose they are
            files.create_dir(root, recursive=True)
            files.delete_dir_contents(root, missing_dir_ok=True)
            self.record_step(0)

    def newest_first(self) -> Iterator[tuple[str, Checkpoint | Damage]]:
        """Every attempt at a checkpoint, by name: what was committed, not yet hashed, or why it is nothing."""
        for name in sorted(self._directories(), reverse=True):
            yield name, self._read(name)

    def newest_sound(
        self,
        report: Callable[[TrainingResumed], None],
        candidates: Iterable[tuple[str, Checkpoint | Damage]] | None = None,
        find_damage: Callable[[Checkpoint], Damage | None] = Checkpoint.find_damage,
    ) -> Checkpoint | None:
        """The newest checkpoint whose files are all what was written, or None where none was ever committed.

        Every file is hashed. What is wrong with a newer one is reported, with the step of the one that is used.
        ``candidates`` are those of ``newest_first``.

        Raises:
            InputError: there should be one, and none is sound.
        """
        damages: list[tuple[str, Damage]] = []
        for name, found in self.newest_first() if candidates is None else candidates:
            damage = found if isinstance(found, Damage) else find_damage(found)
            if damage:
                damages.append((f"checkpoint {name}: {damage}", damage))
            elif isinstance(found, Checkpoint):
                for text, _ in damages:
                    report(TrainingResumed.after(text, found.step))
                return found
        committed = self.committed_step()
        if committed or any(damage.kind != DamageKind.UNFINISHED for _, damage in damages):
            listed = "; ".join(text for text, _ in damages) or "none was found"
            raise InputError(
                f"{self.uri}: training had reached step {committed or 'an unknown one'}, and no good checkpoint is "
                f"left: {listed}. Restore one, or delete the folder to start anew"
            )
        return None

    def committed_step(self) -> int:
        """The highest step ever committed; 0 before the first."""
        ledger = self._read_ledger()
        return int(ledger["committed"]) if ledger else 0

    def record_step(self, step: int) -> None:
        """Write into the ledger that a step was committed."""
        files, root = filesystem(self.uri)
        content = {"format": FORMAT, "fingerprint": self.fingerprint, "config": self.config,
                   "parents": dict(self.parents), "committed": step}  # fmt: skip
        atomic_write(files, f"{root}/{LEDGER}", with_checksum(content))

    def directory(self, step: int, attempt: str) -> str:
        """Where an attempt writes its checkpoint after ``step`` steps."""
        return join_uri(self.uri, f"{step:08d}-{attempt}")

    def all_committed(self) -> list[Checkpoint]:
        """Every committed checkpoint, oldest first; files are not hashed."""
        found = map(self._read, sorted(self._directories()))
        return [checkpoint for checkpoint in found if isinstance(checkpoint, Checkpoint)]

    def best(self) -> Checkpoint | None:
        """The committed checkpoint of lowest score."""
        return next(iter(rank_by_score(self.all_committed())), None)

    def prune(self, newest: Checkpoint) -> None:
        """Delete what the policy does not keep, now that ``newest`` is committed.

        What dead attempts left goes too, and so does whatever claims to be further on: it was found damaged, or
        training would have gone on from there.
        """
        files, root = filesystem(self.uri)
        older = [checkpoint for checkpoint in self.all_committed() if checkpoint.step < newest.step]
        retained = {checkpoint.uri for checkpoint in select_retained([*older, newest], self.policy)}
        for name in self._directories():
            if join_uri(self.uri, name) not in retained:
                files.delete_dir(f"{root}/{name}")

    def _directories(self) -> list[str]:
        files, root = filesystem(self.uri)
        listing = files.get_file_info(fs.FileSelector(root, allow_not_found=True))
        names = [info.base_name for info in listing if info.type == fs.FileType.Directory]
        return [name for name in names if name.partition("-")[0].isdigit()]

    def _read(self, name: str) -> Checkpoint | Damage:
        """A checkpoint, or why it is none."""
        uri = join_uri(self.uri, name)
        files, root = filesystem(uri)
        content = read_checksummed(files, f"{root}/{CHECKPOINT_MANIFEST}")
        if isinstance(content, Damage):
            if content.kind == DamageKind.MISSING and int(name.partition("-")[0]) > self.committed_step():
                return Damage(DamageKind.UNFINISHED, "was never finished")
            return content
        if content["fingerprint"] != self.fingerprint:
            return Damage(DamageKind.OTHER_RECIPE, f"{CHECKPOINT_MANIFEST} is of another recipe")
        entries = {file: FileEntry(**entry) for file, entry in content["files"].items()}
        return Checkpoint(uri, content["step"], content["world"], content["score"], entries)

    def _read_ledger(self) -> dict[str, Any] | None:
        files, root = filesystem(self.uri)
        content = read_checksummed(files, f"{root}/{LEDGER}")
        return None if isinstance(content, Damage) else content


def rank_by_score(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Those that have a score, lowest first."""
    scored = [(each.score, each.step, each) for each in checkpoints if each.score is not None]
    return [each for *_, each in sorted(scored, key=lambda item: item[:2])]


def select_retained(checkpoints: Iterable[Checkpoint], policy: CheckpointPolicy) -> list[Checkpoint]:
    """What the policy keeps: the last ones, and the best."""
    ordered = sorted(checkpoints, key=lambda each: each.step, reverse=True)
    last, best = ordered[: policy.keep_last], rank_by_score(ordered)[: policy.keep_best]
    return last + [each for each in best if each not in last]


def find_damage(files: fs.FileSystem, root: str, entries: Mapping[str, FileEntry]) -> Damage | None:
    """What is wrong with the first file that is not as it was written, or None."""
    if damage := find_wrong_size(files, root, entries):  # no need to hash the others
        return damage
    for name, found in mismatched_files(files, root, entries):
        expected, shown = entries[name].sha256, "gone" if found is None else f"{found[:12]}…"
        return Damage(DamageKind.CHANGED, f"{name} was changed: its sha256 is {shown}, not {expected[:12]}…")
    return None


def find_wrong_size(files: fs.FileSystem, root: str, entries: Mapping[str, FileEntry]) -> Damage | None:
    """The first file that is missing or of another size than was written, or None."""
    infos = files.get_file_info([f"{root}/{name}" for name in entries])
    for info, (name, entry) in zip(infos, entries.items(), strict=True):
        if info.type != fs.FileType.File:
            return Damage(DamageKind.MISSING, f"{name} is missing")
        if info.size != entry.size_bytes:
            return Damage(DamageKind.CHANGED, f"{name} has {info.size} bytes instead of {entry.size_bytes}")
    return None


def unfinished_training_error(
    uri: str, ledger: Mapping[str, Any], config: Any, parents: Mapping[str, str], step: int
) -> InputError:
    """What to say where a folder holds what another recipe, or other parents, left unfinished."""
    changes = list(config_differences(ledger["config"], config))
    for stage, fingerprint in parents.items():
        before = ledger["parents"].get(stage, "none")
        if before != fingerprint:
            changes.append(f"{stage} {before[:8]}, now {fingerprint[:8]}")
    return InputError(
        f"{uri}: holds an unfinished training, at step {step}, whose recipe differs: {'; '.join(changes)}. Run that "
        "recipe to go on with it, or delete the folder to start anew"
    )


def config_differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Each field in which two trees of JSON values differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in [*before, *(key for key in now if key not in before)]:
            yield from config_differences(before.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif before != now:
        yield f"{path} {json.dumps(before)}, now {json.dumps(now)}"


def with_checksum(content: Mapping[str, Any]) -> bytes:
    """JSON that carries the hash of itself."""
    return json.dumps({**content, "sha256": hashlib.sha256(_canonical_json(content)).hexdigest()}, indent=1).encode()


def read_checksummed(files: fs.FileSystem, path: str) -> dict[str, Any] | Damage:
    """A file that holds ``with_checksum`` of something, or what is wrong with it."""
    name = path.rpartition("/")[2]
    found = files.get_file_info(path).type
    if found == fs.FileType.NotFound:
        return Damage(DamageKind.MISSING, f"{name} is missing")
    if found != fs.FileType.File:
        return Damage(DamageKind.CHANGED, f"{name} is no file")
    try:
        content = json.loads(read_bytes(files, path))
        checksum = content.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError):
        return Damage(DamageKind.CHANGED, f"{name} is not what was written")
    if checksum != hashlib.sha256(_canonical_json(content)).hexdigest():
        return Damage(DamageKind.CHANGED, f"{name} was changed")
    assert isinstance(content, dict)
    return content


def _canonical_json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
