"""Near-copies among documents in parts: what one task does with its share, from and to files. No Ray here.

Bands go to parts of their own, by their hashes, so that documents that agree in a band meet; then the runs of words of
the pairs that are found go to buckets, which one task holds each. Documents are known by their ranks. P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from overproof.config import NearDuplicates
from overproof.data.document_parts import BAND_SCHEMA, TEXT_COLUMNS, Part, Parts, document_pieces, iter_part
from overproof.data.minhash import band_count, shingles
from overproof.data.near_duplicates import Pairs, are_copies, band_pairs, few_partners, no_pairs
from overproof.data.part_files import RunWriter, read_part

BUCKET_BYTES = 64 << 20  # of text whose runs of words one task holds at once, or those of one pair

SHINGLE_SCHEMA = pa.schema([("document", pa.int64()), ("shingles", pa.large_list(pa.uint64()))])


@dataclass(frozen=True)
class Candidates:
    """Pairs of documents that may be near-copies: a train document or a test one, and a held-out one."""

    pairs: Pairs
    sizes_P2: NDArray[np.int64]  # bytes of both

    @classmethod
    def joined(cls, found: Sequence[Candidates]) -> Self:
        """Those of all parts, each once, and few of each document."""
        pairs = np.concatenate([no_pairs(), *(each.pairs for each in found)])
        kept = few_partners(pairs)
        return cls(pairs[kept], np.concatenate([no_pairs(), *(each.sizes_P2 for each in found)])[kept])

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Candidates:
        """Some of them."""
        return Candidates(self.pairs[chosen], self.sizes_P2[chosen])

    def bucketed(self) -> tuple[Candidates, NDArray[np.int64]]:
        """With the pairs of a held-out document side by side, and for each pair its bucket, of about
        ``BUCKET_BYTES`` of text; ascending.
        """
        ordered = self.take(np.argsort(self.pairs[:, 1], kind="stable"))
        others = ordered.pairs[:, 1]
        begins = np.append(True, others[1:] != others[:-1])[: len(others)]
        return ordered, np.cumsum(ordered.sizes_P2[:, 0] + ordered.sizes_P2[:, 1] * begins) // BUCKET_BYTES

    @property
    def left_out_bytes(self) -> int:
        """Of the first documents of the pairs, each once."""
        return int(self.sizes_P2[np.unique(self.pairs[:, 0], return_index=True)[1], 0].sum())

    @property
    def copied_bytes(self) -> int:
        """Of the second documents of the pairs, each once."""
        return int(self.sizes_P2[np.unique(self.pairs[:, 1], return_index=True)[1], 1].sum())


@dataclass(frozen=True)
class Finder:
    """Finds candidates by bands."""

    parts: Parts
    runs: Sequence[str]
    settings: NearDuplicates

    def find(self, number: int) -> Candidates:
        """The candidates that agree in one of a part's bands."""
        table = read_part(self.parts.uri, self.runs, number, BAND_SCHEMA)
        bands, seconds, numbers, part, place, sizes = (
            table[name].to_numpy() for name in ("band", "second", "number", "part", "place", "size_bytes")
        )
        ranks, found = self.parts.firsts[part] + place, list[Candidates]()
        held, tested = ranks < self.parts.borders.held_out, ranks < self.parts.borders.test
        for own in (np.flatnonzero(numbers == band) for band in range(band_count(self.settings))):
            places = own[band_pairs(bands[own], seconds[own], ranks[own], held[own], tested[own])]
            found.append(Candidates(ranks[places], sizes[places]))
        return Candidates.joined(found)


@dataclass(frozen=True)
class Hasher:
    """Hashes the runs of words of the documents that are in pairs."""

    parts: Parts
    words: int
    buckets: int

    def hash(self, part: Part, documents: NDArray[np.int64], buckets: NDArray[np.int64]) -> list[str]:
        """Of a part's documents (ranks, ascending, some several times), for the bucket that each is in."""
        with RunWriter(self.parts.uri, f"shingles-{part.number}", self.buckets) as writer:
            for batch, ranks_N in iter_part(self.parts, part, TEXT_COLUMNS):
                first, last = (np.searchsorted(documents, ranks_N, side=side) for side in ("left", "right"))
                for place in np.flatnonzero(last > first).tolist():
                    pieces = document_pieces(self.parts.source, batch, place)
                    hashes = np.unique(np.concatenate([shingles(piece.decode(), self.words) for piece in pieces]))
                    own = buckets[first[place] : last[place]]
                    columns = [np.full(len(own), ranks_N[place]), [hashes] * len(own)]
                    writer.add(pa.table(dict(zip(SHINGLE_SCHEMA.names, columns, strict=True)), SHINGLE_SCHEMA), own)
        return writer.runs


@dataclass(frozen=True)
class Checker:
    """Holds candidates against each other."""

    uri: str
    runs: Sequence[str]
    threshold: float

    def check(self, bucket: int, pairs: Pairs) -> NDArray[np.bool_]:
        """Which pairs of a bucket are near-copies."""
        table = read_part(self.uri, self.runs, bucket, SHINGLE_SCHEMA)
        hashes = (value.values.to_numpy() for value in table["shingles"])
        sets = dict(zip(table["document"].to_pylist(), hashes, strict=True))
        return are_copies(pairs, sets.__getitem__, self.threshold)
