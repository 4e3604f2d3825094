"""Which documents are near-copies of each other: MinHash bands find candidates, the Jaccard index decides. Pure numpy.

What is compared are the sets of runs of words, and documents that agree in a band are candidates: see ``minhash``.

Everything follows from content: documents are numbered in the order of their hashes, and ties are decided by that.
N documents, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from overproof.config.data import NearDuplicates
from overproof.data.manifest import NearDuplicatesFound
from overproof.data.minhash import NO_WORDS, Hashes, band_count, shingles, sketch
from overproof.errors import InputError

NEAR_DUPLICATE = "near_duplicate"  # reason to leave a document out

Pairs = NDArray[np.int64]  # (P, 2): a train or test document, and the held-out one that it is held against

HELD_SETS = 256  # of shingles, while pairs are checked in the order of their held-out documents
NEIGHBOURS = 8  # held-out documents on either side that a document of a large band is held against
MOST_PARTNERS = 32  # candidates of one document: more only where many are copies of each other


# --- candidates -----------------------------------------------------------------------------------


def no_pairs() -> Pairs:
    return np.zeros((0, 2), np.int64)


def candidate_pairs(bands: Sequence[Hashes], splits_N: NDArray[np.str_], found: Pairs) -> Pairs:
    """``found``, and the pairs that agree in one of these bands at least: a train document and a held-out one, or two
    test documents. Bands, (N,) each, may be given some at a time.
    """
    tested_N, held_N = splits_N == "test", splits_N != "train"
    for number, band_N in enumerate(bands):
        second_N = bands[(number + 1) % len(bands)]
        found = np.concatenate([found, band_pairs(band_N, second_N, np.arange(len(band_N)), held_N, tested_N)])
        found = found[few_partners(found)]
    return found


def band_pairs(
    band_N: Hashes, second_N: Hashes, documents_N: NDArray[np.int64],
    held_N: NDArray[np.bool_], tested_N: NDArray[np.bool_],
) -> Pairs:  # fmt: skip
    """The pairs of places whose documents agree in a band.

    In a band that very many share, a document is held against the nearest held-out ones of the order by a second band.
    """
    order = _sharing(band_N)
    order = order[np.lexsort((documents_N[order], second_N[order], band_N[order]))]
    held = np.flatnonzero(held_N[order])
    nearest = np.searchsorted(held, np.arange(len(order)))
    pairs = [no_pairs()]
    for offset in range(-NEIGHBOURS, NEIGHBOURS + 1):
        places = np.flatnonzero((nearest + offset >= 0) & (nearest + offset < len(held)))
        own, other = order[places], order[held[nearest[places] + offset]]
        both_tested = tested_N[own] & tested_N[other] & (documents_N[own] > documents_N[other])
        wanted = (band_N[own] == band_N[other]) & (~held_N[own] | both_tested)
        pairs.append(np.stack([own[wanted], other[wanted]], axis=1))
    return np.concatenate(pairs)


def _sharing(band_N: Hashes) -> NDArray[np.int64]:
    """The documents that have the hash of a band in common with others."""
    order = np.argsort(band_N)
    ordered = band_N[order]
    follows = np.append(False, (ordered[1:] == ordered[:-1]) & (ordered[1:] != NO_WORDS))[: len(order)]
    shared: NDArray[np.int64] = order[follows | np.append(follows[1:], False)[: len(order)]]
    return shared


def few_partners(pairs: Pairs) -> NDArray[np.int64]:
    """Where each pair of documents stands first among these, in their order; of each document's the first
    ``MOST_PARTNERS``. What is found of some pairs and then of the rest is what is found of all.
    """
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    ordered = pairs[order]
    order = order[np.append(True, (ordered[1:] != ordered[:-1]).any(1))[: len(order)]]
    own = pairs[order, 0]
    found: NDArray[np.int64] = order[np.arange(len(own)) - np.searchsorted(own, own) < MOST_PARTNERS]
    return found


def jaccard(one: Hashes, other: Hashes) -> float:
    """The share of two sets that they have in common; the hashes of each stand there once. 0 for empty ones."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(1, len(one) + len(other) - common)


def are_copies(pairs: Pairs, shingles_of: Callable[[int], Hashes], threshold: float) -> NDArray[np.bool_]:
    """Which pairs are near-copies, from the set of shingles of each document."""
    found = (jaccard(shingles_of(own), shingles_of(other)) >= threshold for own, other in pairs.tolist())
    return np.fromiter(found, bool, len(pairs))


# --- decisions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """What follows from near-copies, by the numbers of the documents that are among them."""

    left_out: NDArray[np.int64]  # of the train split, ascending
    copied: NDArray[np.int64]  # of the test split, ascending: those with near-copies in the train split
    members: NDArray[np.int64]  # of the test split, ascending: those that near-copies join
    firsts: NDArray[np.int64]  # of each member the first that it belongs together with

    @classmethod
    def of(cls, copies: Pairs, across_P: NDArray[np.bool_], tested_P: NDArray[np.bool_]) -> Self:
        """From pairs, and whether their first document is a train one, and their second a test one. The held-out side
        wins: a train document that is a near-copy of one of it is left out.
        """
        from scipy.sparse import coo_array  # here alone: tasks that read documents have no use for it
        from scipy.sparse.csgraph import connected_components

        inside = copies[~across_P]
        members, places = np.unique(inside, return_inverse=True)
        own, other = places.reshape(-1, 2).T
        graph = coo_array((np.ones(len(inside)), (own, other)), shape=(len(members), len(members)))
        _, labels = connected_components(graph, directed=False)
        _, first, component = np.unique(labels, return_index=True, return_inverse=True)
        left_out, copied = np.unique(copies[across_P, 0]), np.unique(copies[across_P & tested_P, 1])
        return cls(left_out, copied, members, members[first[component]])

    def clusters(self, documents_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of each document the first that it belongs together with; itself where none does."""
        clusters_N = documents_N.copy()
        _, own, place = np.intersect1d(documents_N, self.members, assume_unique=True, return_indices=True)
        clusters_N[own] = self.firsts[place]
        return clusters_N

    def found(
        self, settings: NearDuplicates, train_share: float, test_share: float, tested: int
    ) -> NearDuplicatesFound:
        """For the manifest, with the shares of the bytes of both splits, and the documents of the test split."""
        return NearDuplicatesFound(
            threshold=settings.threshold,
            words=settings.words,
            documents=len(self.left_out),
            train_bytes_share=train_share,
            test_documents=len(self.copied),
            test_bytes_share=test_share,
            test_clusters=tested - len(self.members) + len(np.unique(self.firsts)),
        )


def require_train_documents(left_out: int, trained: int, settings: NearDuplicates) -> None:
    """
    Raises:
        InputError: no train document is left.
    """
    if trained and left_out == trained:
        raise InputError(
            f"data.near_duplicates: all {trained:,} train documents are near-copies of held-out ones (of their "
            f"runs of {settings.words} words, {settings.threshold:g} at least are the same); expected others to train "
            "on: give more data, a higher threshold or more words, or null, which leaves them in"
        )


def dropped_copies(left_out: int) -> dict[str, int]:
    """How many are left out, by reason, as other reasons are counted; empty where none is."""
    return {NEAR_DUPLICATE: left_out} if left_out else {}


@dataclass(frozen=True)
class Decision:
    """The same for documents that are in memory: which train ones are left out, and what belongs together in the test
    split.
    """

    left_out_N: NDArray[np.bool_]
    clusters_N: NDArray[np.int64]  # of each document the first that it belongs together with; itself where none does
    found: NearDuplicatesFound

    @property
    def dropped(self) -> dict[str, int]:
        """See ``dropped_copies``."""
        return dropped_copies(self.found.documents)

    @property
    def kept(self) -> NDArray[np.int64]:
        return np.flatnonzero(~self.left_out_N)

    @property
    def kept_clusters(self) -> NDArray[np.int64]:
        """The clusters of those that are kept, by their new numbers."""
        return np.searchsorted(self.kept, self.clusters_N[self.kept])


def decide(copies: Pairs, splits_N: NDArray[np.str_], sizes_N: NDArray[np.int64], settings: NearDuplicates) -> Decision:
    """From the near-copies among the candidates.

    Raises:
        InputError: no train document is left.
    """
    trained_N, tested_N = splits_N == "train", splits_N == "test"
    resolved = Resolved.of(copies, trained_N[copies[:, 0]], tested_N[copies[:, 1]])
    require_train_documents(len(resolved.left_out), int(trained_N.sum()), settings)
    left_out_N = np.zeros(len(splits_N), bool)
    left_out_N[resolved.left_out] = True
    found = resolved.found(
        settings,
        float(sizes_N[left_out_N].sum() / max(1, sizes_N[trained_N].sum())),
        float(sizes_N[resolved.copied].sum() / max(1, sizes_N[tested_N].sum())),
        int(tested_N.sum()),
    )
    return Decision(left_out_N, resolved.clusters(np.arange(len(splits_N))), found)


def find_near_duplicates(
    texts: Sequence[str], splits_N: NDArray[np.str_], settings: NearDuplicates, tell: Callable[[str], None]
) -> Decision:
    """For texts that are in memory, numbered in an order that their content decides; ``tell`` hears how far it is."""
    found = [np.zeros((0, band_count(settings)), np.uint64)]
    for number in range(0, len(texts), 1000):
        tell(f"near-copies, {number:,} of {len(texts):,} texts hashed")
        found.append(sketch(texts[number : number + 1000], settings))
    bands_BN = np.concatenate(found).T
    pairs = candidate_pairs(list(bands_BN), splits_N, no_pairs())
    pairs = pairs[np.argsort(pairs[:, 1], kind="stable")]
    tell(f"near-copies, {len(pairs):,} candidates")
    of_document = lru_cache(maxsize=HELD_SETS)(lambda number: np.unique(shingles(texts[number], settings.words)))
    copies = pairs[are_copies(pairs, of_document, settings.threshold)]
    sizes_N = np.array([len(text.encode()) for text in texts], np.int64)
    return decide(copies, splits_N, sizes_N, settings)
