"""Requests and replies kept for later, as Parquet files that `prepare` reads: sampled, redacted, written at once.

A replica that is killed loses the rows that it had not written yet; no file is ever half there.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq

from overproof.config import Traffic
from overproof.errors import InputError
from overproof.files import absolute_uri, atomic_write, filesystem, join_uri

LOG = logging.getLogger("overproof.serve")
REPLIES, RATINGS = "replies", "ratings"  # folders
MOST_FILES = 10  # of rows in memory while the folder cannot be written; older rows are dropped then
# What no training text should have, and what stands in its place. Looked for in this order.
PRIVATE = (
    (re.compile(r"\b(?:op-|sk-|ghp_|gho_|xox[abpr]-|AKIA|eyJ)[A-Za-z0-9_.\-]{12,}"), "[secret]"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*KEY-----|\Z)", re.DOTALL), "[secret]"),
    (re.compile(r"\b[A-Za-z0-9._%+\-]+@[A-Za-z0-9\-]+(?:\.[A-Za-z0-9\-]+)+\b"), "[address]"),
    (re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b"), "[ip]"),
    (re.compile(r"(?<![\w.])(?:\d[ \-]?){12,18}\d(?![\w.])"), "[number]"),  # of cards and accounts
    (re.compile(r"(?<![\w.])\+\d(?:[ ()\-./]{0,3}\d){6,14}(?![\w])"), "[number]"),  # of telephones
)


@dataclass(frozen=True)
class Exchange:
    """A prompt and one reply to it."""

    id: str  # of the reply
    created: datetime
    package: str
    model: str
    index: int  # of the choice
    prompt: str
    reply: str
    finish_reason: str | None  # None where the client went before the end
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    first_event_s: float | None  # of a stream


@dataclass(frozen=True)
class Rating:
    """What a user thought of a reply."""

    id: str  # of the reply
    created: datetime
    rating: float  # -1 to 1
    comment: str


WHEN = pa.timestamp("us", tz="UTC")
SCHEMAS = {
    REPLIES: pa.schema([
        ("id", pa.string()), ("created", WHEN), ("package", pa.string()), ("model", pa.string()),
        ("index", pa.int32()), ("prompt", pa.string()), ("reply", pa.string()), ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()), ("completion_tokens", pa.int32()), ("seconds", pa.float64()),
        ("first_event_s", pa.float64()), ("text", pa.string()),
    ]),
    RATINGS: pa.schema([
        ("id", pa.string()), ("created", WHEN), ("rating", pa.float64()), ("comment", pa.string()),
    ]),
}  # fmt: skip


def prepare_traffic(settings: Traffic) -> Traffic:
    """The same folder, made and named for replicas wherever they start.

    Raises:
        InputError: it cannot be written.
    """
    files, path = filesystem(settings.folder)
    try:
        files.create_dir(path, recursive=True)
    except OSError as error:
        raise InputError(f"serve.traffic.folder: {settings.folder}: {error}; expected one you may write to") from None
    return settings.model_copy(update={"folder": absolute_uri(settings.folder)})


def in_sample(id_: str, share: float) -> bool:
    """Whether a reply is among those that are kept; every replica says the same of the same reply."""
    return int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8], "big") < share * 2**64


@dataclass(frozen=True)
class Redactor:
    """Takes out what is private, and what a recipe's own patterns find."""

    patterns: tuple[re.Pattern[str], ...] = ()

    def __call__(self, text: str) -> str:
        for pattern, word in (*PRIVATE, *((own, "[redacted]") for own in self.patterns)):
            text = pattern.sub(word, text)
        return text


class Recorder:
    """Keeps rows of one replica, and writes a file when there are enough of them or enough time has passed.

    Every method may be called from any thread, and none waits for the folder but ``close``.
    """

    def __init__(self, settings: Traffic) -> None:
        self._settings = settings
        self._redact = Redactor(tuple(re.compile(pattern) for pattern in settings.redact))
        self._name, self._files = secrets.token_hex(4), 0
        self._rows: dict[str, list[Exchange | Rating]] = {REPLIES: [], RATINGS: []}
        self._changed, self._over, self._dropped = threading.Condition(), False, 0
        self._writer = threading.Thread(target=self._run, daemon=True, name="traffic")
        self._writer.start()

    def keep(self, exchange: Exchange) -> None:
        """Take a reply, if it is one of the sample."""
        if in_sample(exchange.id, self._settings.sample):
            self._add(REPLIES, exchange)

    def rate(self, rating: Rating) -> None:
        """Take a rating, if it is of one of the sample."""
        if in_sample(rating.id, self._settings.sample):
            self._add(RATINGS, rating)

    def close(self) -> None:
        """Write what is left."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._writer.join()

    def _add(self, kind: str, row: Exchange | Rating) -> None:
        with self._changed:
            self._rows[kind].append(row)
            extra = len(self._rows[kind]) - MOST_FILES * self._settings.rows_per_file
            if extra > 0:
                del self._rows[kind][:extra]
                self._dropped += extra
            if len(self._rows[kind]) >= self._settings.rows_per_file:
                self._changed.notify_all()

    def _run(self) -> None:
        over = False
        while not over:
            with self._changed:
                self._changed.wait_for(lambda: self._over or self._full(), self._settings.seconds_per_file)
                over = self._over
                taken, self._rows = self._rows, {kind: [] for kind in self._rows}
                dropped, self._dropped = self._dropped, 0
            if dropped:
                LOG.error("traffic: %d rows were dropped: %s could not be written", dropped, self._settings.folder)
            for kind, rows in taken.items():
                self._write_or_keep(kind, rows)

    def _full(self) -> bool:
        return any(len(rows) >= self._settings.rows_per_file for rows in self._rows.values())

    def _write_or_keep(self, kind: str, rows: list[Exchange | Rating]) -> None:
        if not rows:
            return
        try:
            self._write(kind, rows)
        except Exception:  # whatever a store may raise: serving goes on
            LOG.exception("traffic: %s cannot be written; its rows wait", self._settings.folder)
            with self._changed:
                self._rows[kind] = rows + self._rows[kind]
                self._changed.wait(timeout=1)

    def _write(self, kind: str, rows: Sequence[Exchange | Rating]) -> None:
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist([self._redacted(row) for row in rows], SCHEMAS[kind])
        pq.write_table(table, sink, compression="zstd")
        files, folder = filesystem(join_uri(self._settings.folder, kind))
        files.create_dir(folder, recursive=True)
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{self._name}-{self._files:06d}.parquet"
        atomic_write(files, f"{folder}/{name}", sink.getvalue().to_pybytes())
        self._files += 1

    def _redacted(self, row: Exchange | Rating) -> dict[str, object]:
        if isinstance(row, Rating):
            return asdict(row) | {"comment": self._redact(row.comment)}
        # Their text once more as one: what is private may lie across both.
        texts = {"prompt": row.prompt, "reply": row.reply, "text": row.prompt + row.reply}
        return asdict(row) | {name: self._redact(text) for name, text in texts.items()}
