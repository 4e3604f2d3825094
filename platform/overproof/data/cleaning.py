"""Which documents are used, and the split of each: rules on bytes and on hashes, the same in any order.

N documents; hashes are sha256 of a document's bytes, as hex.
"""

from __future__ import annotations

import codecs
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

EMPTY = "empty"
UNDECODABLE = "undecodable"  # as UTF-8
BINARY = "binary"  # undecodable, with NULs
UTF_16 = "UTF-16"  # or UTF-32, by the mark that such a text begins with
NUL_LINES = "lines of NULs"  # which are left out of their documents
DUPLICATE = "duplicate"
ENCODINGS = {UNDECODABLE: "not UTF-8 (Latin-1 perhaps)", UTF_16: "in UTF-16 or UTF-32", BINARY: "binary"}
REASONS = (EMPTY, UNDECODABLE, DUPLICATE)
SHOWN_NAMES = 3  # of documents that were left out for their encoding

Strings = Sequence[str] | NDArray[Any]

SPLITS_BY_HASH = np.array(["test", "validation", "train"])  # from the lowest hashes to the highest


class DocumentCheck:
    """What the rules say of one document by itself; its bytes come in pieces, none of which is held."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._hash = hashlib.sha256()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._decodable, self._blank = True, True
        self._first, self._nul = b"", False

    def update(self, content: bytes) -> None:
        """Take the next bytes of the document."""
        self._first = (self._first + content[:2])[:2]
        self._nul = self._nul or b"\0" in content
        self.size_bytes += len(content)
        self._hash.update(content)
        self._decode(content, final=False)

    @property
    def sha256(self) -> str:
        """The hash of the bytes so far, in hex."""
        return self._hash.hexdigest()

    def finish(self) -> str:
        """Why the whole document cannot be used: ``empty`` (white space alone), ``undecodable`` as UTF-8, ``binary`` or
        ``UTF-16``; else ``""``.
        """
        self._decode(b"", final=True)
        if not self._decodable:
            if self._first in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                return UTF_16
            return BINARY if self._nul else UNDECODABLE
        return EMPTY if self._blank else ""

    def _decode(self, content: bytes, final: bool) -> None:
        if self._decodable:
            try:
                text = self._decoder.decode(content, final)
            except UnicodeDecodeError:
                self._decodable = False
            else:
                self._blank = self._blank and not text.strip()


def hash_shares(hashes_N: Strings) -> NDArray[np.float64]:
    """The first 8 bytes of each hash as a number in [0, 1]."""
    words_N4 = np.frombuffer(bytes.fromhex("".join(hashes_N)), ">u8").reshape(len(hashes_N), -1)
    return shares(words_N4[:, 0])


def shares(words_N: NDArray[Any]) -> NDArray[np.float64]:
    """The first 8 bytes of hashes as numbers in [0, 1]."""
    found: NDArray[np.float64] = words_N.astype(np.float64) / 2.0**64
    return found


@dataclass(frozen=True)
class Borders:
    """Where the splits lie among documents in the order of their hashes: those of the test split come first."""

    test: int  # documents
    held_out: int  # of both splits that are not trained on

    @classmethod
    def of(cls, count: int, below_test: int, below_held_out: int) -> Self:
        """From how many documents are below the borders that the fractions set: see ``split_of``.

        Raises:
            ValueError: there are fewer documents than splits.
        """
        if count < len(SPLITS_BY_HASH):
            raise ValueError(f"{count} documents; expected at least {len(SPLITS_BY_HASH)}, one for each split")
        test = int(np.clip(below_test, 1, count - 2))
        return cls(test, int(np.clip(below_held_out, test + 1, count - 1)))

    def splits(self, ranks_N: NDArray[np.int64]) -> NDArray[np.str_]:
        """The split of each document, by its rank."""
        found: NDArray[np.str_] = SPLITS_BY_HASH[(ranks_N >= self.test).astype(np.int64) + (ranks_N >= self.held_out)]
        return found


def split_of(hashes_N: Strings, validation_fraction: float, test_fraction: float) -> NDArray[np.str_]:
    """The split of each of at least three distinct hashes, wherever it stands among them.

    The first 8 bytes of a hash are a number in [0, 1). Below ``test_fraction`` it is a test document, in the
    ``validation_fraction`` above that one for validation, else for training: no document moves when others are
    added. Only where that leaves a split without a document (there are few documents, or a fraction is tiny) the
    border beside it moves by as few documents, in the order of the hashes, as give every split one.

    Raises:
        ValueError: there are fewer hashes than splits.
    """
    shares_N = hash_shares(hashes_N) if len(hashes_N) else np.zeros(0)
    below = (int(np.sum(shares_N < end)) for end in (test_fraction, test_fraction + validation_fraction))
    borders = Borders.of(len(hashes_N), *below)
    ranks_N = np.empty(len(hashes_N), np.int64)
    ranks_N[np.argsort(np.asarray(hashes_N, np.str_))] = np.arange(len(hashes_N))
    return borders.splits(ranks_N)


@dataclass
class LeftOut:
    """Documents that are not used, by reason: how many, and the first names. Made up in any order, it is the same."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)  # ascending

    def add(self, reason: str, names: Sequence[str]) -> None:
        """Count documents."""
        self.counts[reason] += len(names)
        self.names[reason] = sorted([*self.names.get(reason, ()), *names])[:SHOWN_NAMES]

    def check(self, name: str, fault: str, nul_lines: int) -> None:
        """Count a document that cannot be used (see ``DocumentCheck.finish``), and the lines that it lost."""
        if fault not in ENCODINGS:
            self.counts[NUL_LINES] += nul_lines
        if fault and fault != NUL_LINES:
            self.add(fault, [name])

    def merge(self, other: LeftOut) -> None:
        """Count what another has counted."""
        self.counts += other.counts
        for reason, names in other.names.items():
            self.names[reason] = sorted([*self.names.get(reason, ()), *names])[:SHOWN_NAMES]

    @property
    def dropped(self) -> dict[str, int]:
        """How many, by reason: of the usual reasons whether there are any or not."""
        return {reason: self.counts[reason] for reason in REASONS} | {
            reason: count for reason, count in self.counts.items() if count and reason not in REASONS
        }

    @property
    def lines(self) -> list[str]:
        """For people: those of other encodings, and the duplicates."""
        found = []
        for reason, encoding in ENCODINGS.items():
            if self.counts[reason]:
                remedy = "" if reason == BINARY else "; `iconv -f ENCODING -t UTF-8` converts text"
                found.append(list_left_out(encoding, self.names[reason], self.counts[reason]) + remedy)
        if self.counts[DUPLICATE]:
            found.append(list_left_out("the same as another", self.names[DUPLICATE], self.counts[DUPLICATE]))
        return found


def list_left_out(why: str, names: Sequence[str], count: int) -> str:
    """A line for people, with the first names of so many."""
    more = f" and {count - SHOWN_NAMES:,} more" if count > SHOWN_NAMES else ""
    return f"left out, {why}: {', '.join(names[:SHOWN_NAMES])}{more}"
