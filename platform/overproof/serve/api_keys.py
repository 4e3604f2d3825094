"""API keys: a file of their hashes, which can be changed while servers run, and the rate limits of each."""

from __future__ import annotations

import fcntl
import hashlib
import logging
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

LOG = logging.getLogger("overproof.serve")
KEY_PREFIX = "op-"  # by which scanners for leaked secrets recognise a key
SECRET_BYTES = 32  # as many as sha256 has: too many to guess, so a fast hash will do
REFRESH_S = 2.0  # between two readings of the file
MIN_LEVEL = {"requests": 1.0, "tokens": 0.0}  # of a bucket, for a request to pass
Spent = dict[tuple[str, str, int], int]  # by a key's name, the unit, and its limit of that a minute
KeyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class ApiKey(BaseModel):
    """What is stored of a key: its hash, and its limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: KeyName
    sha256: str
    created: str  # UTC, ISO 8601
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)  # of prompts and completions
    operator: bool = False  # may also read what all keys do: metrics

    @property
    def limits(self) -> tuple[tuple[int, str], ...]:
        """Amounts a minute, and of what: requests or tokens."""
        limits = ((self.requests_per_minute, "requests"), (self.tokens_per_minute, "tokens"))
        return tuple((limit, unit) for limit, unit in limits if limit is not None)


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


def add_key(
    uri: str, name: str, requests_per_minute: int | None, tokens_per_minute: int | None, operator: bool = False
) -> str:
    """Add a new key to a file and give it back: it cannot be read from the file again.

    Raises:
        InputError: the name is taken or malformed, a limit is less than 1, or the file cannot be read or written.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        new_key = ApiKey(
            name=name,
            sha256=hash_key(key),
            created=created,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            operator=operator,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{first['loc'][0]}: found {first['input']!r}; {first['msg']}") from None
    with _locked(uri) as key_file:
        if any(each.name == name for each in key_file.keys):
            raise InputError(f"{uri}: has a key {name!r}; revoke it first, or take another name")
        _write(uri, KeyFile(keys=(*key_file.keys, new_key)))
    return key


def revoke_key(uri: str, name: str) -> None:
    """Remove a key; servers refuse it within seconds.

    Raises:
        InputError: there is none of that name.
    """
    with _locked(uri) as key_file:
        remaining = tuple(each for each in key_file.keys if each.name != name)
        if len(remaining) == len(key_file.keys):
            known = ", ".join(each.name for each in key_file.keys) or "none"
            raise InputError(f"{uri}: no key {name!r}; found {known}")
        _write(uri, KeyFile(keys=remaining))


@contextmanager
def _locked(uri: str) -> Iterator[KeyFile]:
    """The content of a file that is to be changed; of a local file one process at a time has it."""
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


def _write(uri: str, key_file: KeyFile) -> None:
    files, path = filesystem(uri)
    atomic_write(files, path, key_file.model_dump_json(indent=1).encode() + b"\n", private=True)


class KeysUnavailable(Exception):
    """The file of keys could not be read, not once."""


@dataclass
class KeyStore:
    """The keys of a file, read again every ``REFRESH_S``, so that a change needs no restart.

    A file that is not there for a moment, or cannot be read, changes nothing: the keys that were read last are good.
    """

    uri: str
    clock: Callable[[], float] = time.monotonic
    _by_sha256: dict[str, ApiKey] | None = None
    _read_at_s: float = float("-inf")

    def find(self, sha256: str) -> ApiKey | None:
        """The key with this hash.

        Raises:
            KeysUnavailable: the file has never been read.
        """
        if self.clock() - self._read_at_s > REFRESH_S:
            self._read_at_s = self.clock()
            try:
                self._by_sha256 = {key.sha256: key for key in _read_existing(self.uri).keys}
            except (InputError, OSError) as error:
                LOG.error("%s: %s", self.uri, error)
        if self._by_sha256 is None:
            raise KeysUnavailable(self.uri)
        return self._by_sha256.get(sha256)


def _read_existing(uri: str) -> KeyFile:
    files, path = filesystem(uri)
    if files.get_file_info(path).type != fs.FileType.File:
        raise InputError("missing; the keys that were read last stay good")
    return read_keys(uri)


@dataclass
class RateLimiter:
    """Token buckets of each key, which fill up evenly to what its limits allow in a minute.

    A request is admitted while its key's buckets are not empty, and charged for its tokens when they are counted; a
    bucket may go below zero, and the key then waits until it has filled up. Several servers of the same keys tell each
    other what they have taken (``take_spent``, ``charge_elsewhere``).
    """

    clock: Callable[[], float] = time.monotonic
    _buckets: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)  # by key, unit: level, at time
    _spent: Spent = field(default_factory=dict)  # here, since it was taken

    def admit(self, key: ApiKey) -> float:
        """0 where a request may pass, which is then counted; else the seconds to wait."""
        waits = [
            max(0.0, (MIN_LEVEL[unit] - self._refill(key.name, unit, limit)) * 60 / limit) for limit, unit in key.limits
        ]
        wait_s = max(waits, default=0.0)
        if wait_s == 0 and key.requests_per_minute is not None:
            self._spend(key.name, "requests", key.requests_per_minute, 1)
        return wait_s

    def charge(self, key: ApiKey, tokens: int) -> None:
        """Take the tokens of a finished request from the key's bucket."""
        if key.tokens_per_minute is not None:
            self._refill(key.name, "tokens", key.tokens_per_minute)
            self._spend(key.name, "tokens", key.tokens_per_minute, tokens)

    def take_spent(self) -> Spent:
        """What was taken from the buckets here since this was last called."""
        spent, self._spent = self._spent, {}
        return spent

    def charge_elsewhere(self, spent: Spent) -> None:
        """Take from the buckets what another server of the same keys has."""
        for (name, unit, limit), amount in spent.items():
            self._refill(name, unit, limit)
            self._take(name, unit, amount)

    def _refill(self, name: str, unit: str, limit: int) -> float:
        now_s = self.clock()
        level, filled_s = self._buckets.get((name, unit), (float(limit), now_s))
        level = min(limit, level + (now_s - filled_s) * limit / 60)
        self._buckets[name, unit] = level, now_s
        return level

    def _spend(self, name: str, unit: str, limit: int, amount: int) -> None:
        self._take(name, unit, amount)
        self._spent[name, unit, limit] = self._spent.get((name, unit, limit), 0) + amount

    def _take(self, name: str, unit: str, amount: int) -> None:
        level, filled_s = self._buckets[name, unit]
        self._buckets[name, unit] = level - amount, filled_s
