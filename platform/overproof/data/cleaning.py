"""Which documents are used, and the split of each: rules on bytes and on hashes, the same in any order.

N documents; hashes are sha256 of a document's bytes, as hex.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def split_of(hashes_N: Strings, validation_fraction: float, test_fraction: float) -> NDArray[np.str_]:
    """The split of each of at least three distinct hashes, wherever it stands among them.

    The first 8 bytes of a hash are a number in [0, 1). Below ``test_fraction`` it is a test document, in the
    ``validation_fraction`` above that one for validation, else for training: no document moves when others are
    added. Only where that leaves a split without a document (there are few documents, or a fraction is tiny) the
    border beside it moves by as few documents, in the order of the hashes, as give every split one.

    Raises:
        ValueError: there are fewer hashes than splits.
    """
    count = len(hashes_N)
    if count < len(SPLITS_BY_HASH):
        raise ValueError(f"{count} documents; expected at least {len(SPLITS_BY_HASH)}, one for each split")
    words_N4 = np.frombuffer(bytes.fromhex("".join(hashes_N)), ">u8").reshape(count, -1)
    shares_N = words_N4[:, 0].astype(np.float64) / 2.0**64
    test = int(np.clip(np.sum(shares_N < test_fraction), 1, count - 2))
    held_out = int(np.clip(np.sum(shares_N < test_fraction + validation_fraction), test + 1, count - 1))
    ranks_N = np.empty(count, np.int64)
    ranks_N[np.argsort(np.asarray(hashes_N, np.str_))] = np.arange(count)
    splits_N: NDArray[np.str_] = SPLITS_BY_HASH[(ranks_N >= test).astype(np.int64) + (ranks_N >= held_out)]
    return splits_N


@dataclass(frozen=True)
class SelectedDocuments:
    """The documents that are used, sorted by hash: document i is the i-th."""

    names_N: NDArray[Any]  # str; of exact duplicates, the first name
    hashes_N: NDArray[Any]  # str
    sizes_N: NDArray[np.int64]  # bytes
    dropped: dict[str, int]
    left_out: tuple[str, ...] = ()  # lines about those of other encodings and the duplicates, with the first names

    def take(self, chosen: NDArray[np.int64], dropped: Mapping[str, int]) -> SelectedDocuments:
        """These of them; the others are left out for further reasons."""
        names, hashes, sizes = self.names_N[chosen], self.hashes_N[chosen], self.sizes_N[chosen]
        return SelectedDocuments(names, hashes, sizes, {**self.dropped, **dropped}, self.left_out)


def select_documents(
    names_N: Sequence[str],
    hashes_N: Strings,
    sizes_N: Sequence[int],
    faults_N: Sequence[str],
    nul_lines_N: Sequence[int] = (),
) -> SelectedDocuments:
    """Drop the faulty and, of exact duplicates, all but one. The order of the input does not matter.

    ``nul_lines_N`` are the lines of NULs that were left out of each document.
    """
    faults = np.array(faults_N, dtype=object)
    dropped = {reason: int((faults == reason).sum()) for reason in REASONS}
    lost = sum(lines for lines, fault in zip(nul_lines_N, faults_N, strict=False) if fault not in ENCODINGS)
    if lost:
        dropped[NUL_LINES] = lost
    left_out = []
    for reason in ENCODINGS:
        found = sorted(np.array(names_N, dtype=object)[faults == reason])
        if found:
            dropped[reason] = len(found)
            left_out.append(_describe_undecodable(reason, found))
    usable = np.flatnonzero(faults == "")
    names, hashes = (np.array(values, dtype=object)[usable] for values in (names_N, hashes_N))
    sizes = np.array(sizes_N, dtype=np.int64)[usable]
    order = np.lexsort((names, hashes))
    names, hashes, sizes = names[order], hashes[order], sizes[order]
    first = np.ones(len(hashes), bool)
    first[1:] = hashes[1:] != hashes[:-1]
    again, same = np.flatnonzero(~first), np.flatnonzero(first)[np.cumsum(first) - 1]
    dropped[DUPLICATE] = len(again)
    if len(again):
        left_out.append(list_left_out("the same as another", [f"{names[i]} ({names[same[i]]})" for i in again]))
    return SelectedDocuments(names[first], hashes[first], sizes[first], dropped, tuple(left_out))


def list_left_out(why: str, names: Sequence[str]) -> str:
    """A line for people, with the first names."""
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return f"left out, {why}: {', '.join(names[:SHOWN_NAMES])}{more}"


def _describe_undecodable(reason: str, names: Sequence[str]) -> str:
    remedy = "" if reason == BINARY else "; `iconv -f ENCODING -t UTF-8` converts text"
    return list_left_out(ENCODINGS[reason], names) + remedy
