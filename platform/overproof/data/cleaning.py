"""Which documents are kept, and where each goes: rules on bytes and on hashes, the same in any order.

N documents; hashes are sha256 of a document's bytes, as hex.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

EMPTY = "empty"
UNDECODABLE = "undecodable"
DUPLICATE = "duplicate"
REASONS = (EMPTY, UNDECODABLE, DUPLICATE)

Strings = Sequence[str] | NDArray[Any]

SPLIT_NAMES = np.array(["train", "validation", "test"])


def document_fault(content: bytes) -> str:
    """Why a document cannot be used by itself: ``empty`` (white space alone), ``undecodable`` as UTF-8, or ``""``."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return UNDECODABLE
    return "" if text.strip() else EMPTY


def content_hash(content: bytes) -> str:
    """Sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


def split_of(hashes_N: Strings, validation_fraction: float, test_fraction: float) -> NDArray[np.str_]:
    """The split of each hash. The first 8 bytes decide, so that no document moves when others are added."""
    shares_N = _words(hashes_N)[:, 0].astype(np.float64) / 2.0**64
    held_out_N = (shares_N < test_fraction).astype(np.int64) + (shares_N < test_fraction + validation_fraction)
    names: NDArray[np.str_] = SPLIT_NAMES[held_out_N]
    return names


def shard_of(hashes_N: Strings, shards: int) -> NDArray[np.int64]:
    """The train shard of each hash. The last 8 bytes decide: the first ones are spent on the split."""
    return (_words(hashes_N)[:, 3] % np.uint64(shards)).astype(np.int64)


def _words(hashes_N: Strings) -> NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex("".join(hashes_N)), ">u8").reshape(-1, 4).astype(np.uint64)


@dataclass(frozen=True)
class KeptDocuments:
    """The documents that are kept, by hash: document i is the i-th."""

    names_N: NDArray[Any]  # str; of exact duplicates, the first name
    hashes_N: NDArray[Any]  # str
    sizes_N: NDArray[np.int64]  # bytes
    dropped: dict[str, int]


def select_documents(
    names_N: Sequence[str], hashes_N: Strings, sizes_N: Sequence[int], faults_N: Sequence[str]
) -> KeptDocuments:
    """Drop the faulty and, of exact duplicates, all but one. The order of the input does not matter."""
    faults = np.array(faults_N, dtype=object)
    dropped = {reason: int((faults == reason).sum()) for reason in REASONS}
    usable = np.flatnonzero(faults == "")
    names, hashes = (np.array(values, dtype=object)[usable] for values in (names_N, hashes_N))
    sizes = np.array(sizes_N, dtype=np.int64)[usable]
    order = np.lexsort((names, hashes))
    names, hashes, sizes = names[order], hashes[order], sizes[order]
    first = np.ones(len(hashes), bool)
    first[1:] = hashes[1:] != hashes[:-1]
    dropped[DUPLICATE] = int((~first).sum())
    return KeptDocuments(names[first], hashes[first], sizes[first], dropped)
