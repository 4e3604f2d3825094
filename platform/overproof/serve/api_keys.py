"""API keys in a file that every replica reads: hashed, revocable, each with limits of its own."""

from __future__ import annotations

import fcntl
import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pyarrow import fs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overproof.errors import InputError
from overproof.files import atomic_write, filesystem, read_json_or_default

PREFIX = "op-"  # so that a key is known for one where it leaks
SECRET_BYTES = 32  # as much as sha256 holds: no slow hash is needed against guessing
READ_AGAIN_S = 2.0
LEAST = {"requests": 1.0, "tokens": 0.0}  # left of a bucket, for a request to pass
KeyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class ApiKey(BaseModel):
    """One key; the key itself is known only to the one it was given to."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: KeyName
    sha256: str
    created: str  # UTC, ISO 8601
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)  # of prompts and completions

    @property
    def limits(self) -> tuple[tuple[int, str], ...]:
        """The most of what, in a minute."""
        named = ((self.requests_per_minute, "requests"), (self.tokens_per_minute, "tokens"))
        return tuple((most, what) for most, what in named if most is not None)


class KeyFile(BaseModel):
    """The content of a file of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


def hash_key(key: str) -> str:
    """Sha256 of a key, in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(uri: str) -> KeyFile:
    """The keys of a file or URI; none where there is no such file.

    Raises:
        InputError: it cannot be read.
    """
    return read_json_or_default(KeyFile, uri, "overproof keys")


def add_key(uri: str, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> str:
    """Make a key and give it back; nobody can read it from the file.

    Raises:
        InputError: the name is taken or none, a limit is less than 1, or the file cannot be read or written.
    """
    key = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        made = ApiKey(
            name=name,
            sha256=hash_key(key),
            created=created,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{first['loc'][0]}: found {first['input']!r}; {first['msg']}") from None
    with _changing(uri) as ring:
        if any(each.name == name for each in ring.keys):
            raise InputError(f"{uri}: has a key {name!r}; revoke it first, or take another name")
        _write(uri, KeyFile(keys=(*ring.keys, made)))
    return key


def revoke_key(uri: str, name: str) -> None:
    """Take a key away; replicas refuse it within seconds.

    Raises:
        InputError: there is none of that name.
    """
    with _changing(uri) as ring:
        left = tuple(each for each in ring.keys if each.name != name)
        if len(left) == len(ring.keys):
            known = ", ".join(each.name for each in ring.keys) or "none"
            raise InputError(f"{uri}: no key {name!r}; found {known}")
        _write(uri, KeyFile(keys=left))


@contextmanager
def _changing(uri: str) -> Iterator[KeyFile]:
    """The ring, to be written anew; of a file on a disk one process at a time has it."""
    files, path = filesystem(uri)
    if not isinstance(files, fs.LocalFileSystem):
        yield read_keys(uri)
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.lock").touch()
    except OSError as error:
        raise InputError(f"{uri}: cannot be written: {error.strerror}") from None
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield read_keys(uri)


def _write(uri: str, ring: KeyFile) -> None:
    files, path = filesystem(uri)
    atomic_write(files, path, ring.model_dump_json(indent=1).encode() + b"\n")


@dataclass
class KeyStore:
    """The keys of a file, read again when a while has passed, so that a change needs no restart."""

    uri: str
    now: Callable[[], float] = time.monotonic
    _by_sha256: dict[str, ApiKey] = field(default_factory=dict)
    _read_at: float = float("-inf")

    def find(self, sha256: str) -> ApiKey | None:
        """The key with this hash.

        Raises:
            InputError: the file cannot be read.
        """
        if self.now() - self._read_at > READ_AGAIN_S:
            self._by_sha256 = {key.sha256: key for key in read_keys(self.uri).keys}
            self._read_at = self.now()
        return self._by_sha256.get(sha256)


@dataclass
class RateLimiter:
    """Requests and tokens of each key in the last minute: buckets that fill up evenly.

    A request is let in while its key has anything left, and pays for its tokens when they are counted; what it takes
    beyond its bucket, the key waits for.
    """

    now: Callable[[], float] = time.monotonic
    _left: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)  # and when

    def admit(self, key: ApiKey) -> float:
        """0 where a request may pass, which it then has; else the seconds to wait."""
        waits = [max(0.0, (LEAST[what] - self._fill(key.name, what, most)) * 60 / most) for most, what in key.limits]
        wait_s = max(waits, default=0.0)
        if wait_s == 0 and key.requests_per_minute is not None:
            self._take(key.name, "requests", 1)
        return wait_s

    def charge(self, key: ApiKey, tokens: int) -> None:
        """What a request came to."""
        if key.tokens_per_minute is not None:
            self._fill(key.name, "tokens", key.tokens_per_minute)
            self._take(key.name, "tokens", tokens)

    def _fill(self, name: str, kind: str, limit: int) -> float:
        now = self.now()
        left, before = self._left.get((name, kind), (float(limit), now))
        left = min(limit, left + (now - before) * limit / 60)
        self._left[name, kind] = left, now
        return left

    def _take(self, name: str, kind: str, amount: int) -> None:
        left, now = self._left[name, kind]
        self._left[name, kind] = left - amount, now
