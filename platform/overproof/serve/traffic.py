"""Recorded traffic: sampled and redacted requests and replies, in Parquet files that `prepare` reads.

Files are written atomically; a gateway that is killed loses the rows that it had not written yet.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from overproof.config import Traffic
from overproof.errors import InputError
from overproof.files import absolute_uri, atomic_write, filesystem, join_uri

LOG = logging.getLogger("overproof.serve")
REPLIES, RATINGS = "replies", "ratings"  # folders, one for each kind of row
MAX_PENDING_FILES = 10  # as many rows wait while the folder cannot be written; older ones are dropped
# What no training text should have, and its replacement; searched in this order. RE2's: its time grows with the text's
# length alone, whatever the text, and Arrow lets other threads run meanwhile. It looks neither back nor ahead, so what
# stands around a number is matched, too, and put back; two numbers may share that, hence each is searched twice.
DIGIT, WORD = r"\p{Nd}", r"\pL\pN_"
BEFORE = rf"(^|[^{WORD}.])"
PRIVATE_PATTERNS = (
    (r"\b(?:op-|sk-|ghp_|gho_|xox[abpr]-|AKIA|eyJ)[A-Za-z0-9_.\-]{12,}", "[secret]"),
    (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*KEY-----|\z)", "[secret]"),
    (rf"[{WORD}.%+\-]+@[\pL\pN\-]+(?:\.[\pL\pN\-]+)+", "[address]"),
    (r"\b(?:\d{1,3}\.){3}\d{1,3}\b", "[ip]"),
    # Cards and accounts, then telephones:
    *2 * ((rf"{BEFORE}(?:{DIGIT}[ \-]?){{12,18}}{DIGIT}($|[^{WORD}.]|\.$|\.[^{WORD}])", r"\1[number]\2"),),
    *2 * ((rf"{BEFORE}\+{DIGIT}(?:[ ()\-./]{{0,3}}{DIGIT}){{6,14}}($|[^{WORD}])", r"\1[number]\2"),),
)  # fmt: skip


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
    """A user's rating of a reply."""

    id: str  # of the reply
    created: datetime
    rating: float  # -1 to 1
    comment: str


TIMESTAMP = pa.timestamp("us", tz="UTC")
SCHEMAS = {
    REPLIES: pa.schema([
        ("id", pa.string()), ("created", TIMESTAMP), ("package", pa.string()), ("model", pa.string()),
        ("index", pa.int32()), ("prompt", pa.string()), ("reply", pa.string()), ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()), ("completion_tokens", pa.int32()), ("seconds", pa.float64()),
        ("first_event_s", pa.float64()), ("text", pa.string()),
    ]),
    RATINGS: pa.schema([
        ("id", pa.string()), ("created", TIMESTAMP), ("rating", pa.float64()), ("comment", pa.string()),
    ]),
}  # fmt: skip


def prepare_traffic(settings: Traffic) -> Traffic:
    """The settings with an absolute folder, which is made here.

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
    """Whether an id falls into a random share of all ids; the same id always does or does not."""
    return int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8], "big") < share * 2**64


@dataclass(frozen=True)
class Redactor:
    """Replaces what is private, and what the settings' own patterns (RE2's) find."""

    patterns: tuple[str, ...] = ()

    def __call__(self, text: str) -> str:
        own = ((pattern, "[redacted]") for pattern in self.patterns)
        found = pa.array([text.encode(errors="replace").decode()], pa.string())  # half of a UTF-16 pair is no text
        for pattern, replacement in (*PRIVATE_PATTERNS, *own):
            found = pc.replace_substring_regex(found, pattern=pattern, replacement=replacement)
        redacted: str = found[0].as_py()
        return redacted


class Recorder:
    """Collects rows, and writes a file when there are enough of them or enough time has passed.

    Every method may be called from any thread; only ``close`` waits for the folder.
    """

    def __init__(self, settings: Traffic) -> None:
        self._settings = settings
        self._redact = Redactor(settings.redact)
        self._name, self._files = secrets.token_hex(4), 0
        self._rows: dict[str, list[Exchange | Rating]] = {REPLIES: [], RATINGS: []}
        self._changed, self._closed, self._dropped = threading.Condition(), False, 0
        self._writer = threading.Thread(target=self._run, daemon=True, name="traffic")
        self._writer.start()

    def record(self, exchange: Exchange) -> None:
        """Take a reply, if it is in the sample."""
        if in_sample(exchange.id, self._settings.sample):
            self._add(REPLIES, exchange)

    def rate(self, rating: Rating) -> None:
        """Take a rating, if its reply is in the sample."""
        if in_sample(rating.id, self._settings.sample):
            self._add(RATINGS, rating)

    def close(self) -> None:
        """Write the rows that wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._writer.join()

    def _add(self, kind: str, row: Exchange | Rating) -> None:
        with self._changed:
            self._rows[kind].append(row)
            extra = len(self._rows[kind]) - MAX_PENDING_FILES * self._settings.rows_per_file
            if extra > 0:
                del self._rows[kind][:extra]
                self._dropped += extra
            if len(self._rows[kind]) >= self._settings.rows_per_file:
                self._changed.notify_all()

    def _run(self) -> None:
        closed = False
        while not closed:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._file_is_due(), self._settings.seconds_per_file)
                closed = self._closed
                rows_by_kind, self._rows = self._rows, {kind: [] for kind in self._rows}
                dropped, self._dropped = self._dropped, 0
            if dropped:
                LOG.error("traffic: %d rows were dropped: %s could not be written", dropped, self._settings.folder)
            for kind, rows in rows_by_kind.items():
                self._write_or_requeue(kind, rows)

    def _file_is_due(self) -> bool:
        return any(len(rows) >= self._settings.rows_per_file for rows in self._rows.values())

    def _write_or_requeue(self, kind: str, rows: list[Exchange | Rating]) -> None:
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
        table = pa.Table.from_pylist([self._redact_row(row) for row in rows], SCHEMAS[kind])
        pq.write_table(table, sink, compression="zstd")
        files, folder = filesystem(join_uri(self._settings.folder, kind))
        files.create_dir(folder, recursive=True)
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{self._name}-{self._files:06d}.parquet"
        atomic_write(files, f"{folder}/{name}", sink.getvalue().to_pybytes())
        self._files += 1

    def _redact_row(self, row: Exchange | Rating) -> dict[str, object]:
        if isinstance(row, Rating):
            return asdict(row) | {"comment": self._redact(row.comment)}
        # Their text as one is redacted anew: what is private may begin in the prompt and end in the reply.
        texts = {"prompt": row.prompt, "reply": row.reply, "text": row.prompt + row.reply}
        return asdict(row) | {name: self._redact(text) for name, text in texts.items()}
