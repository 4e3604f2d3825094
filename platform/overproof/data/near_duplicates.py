"""Which documents are near-copies of each other: MinHash bands find candidates, the Jaccard index decides. Pure numpy.

What is compared are the sets of runs of words (shingles: Broder, 1997, doi 10.1109/SEQUEN.1997.666900). A word is in
any case and form of Unicode (NFKC); where a script has no spaces between words, each character is one. A document's
signature is a one-permutation MinHash (Li, Owen and Zhang, NIPS 2012), whose empty bins are filled from others
(Shrivastava, arXiv 1703.04664); it is cut into bands, and documents that agree in a band are candidates.

Everything follows from content: documents are numbered in the order of their hashes, and ties are decided by that.
N documents, B bands, P pairs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from overproof.config.data import NearDuplicates
from overproof.data.manifest import NearDuplicatesFound
from overproof.errors import InputError

NEAR_DUPLICATE = "near_duplicate"  # reason to leave a document out

Hashes = NDArray[np.uint64]
Pairs = NDArray[np.int64]  # (P, 2): a train or test document, and the held-out one that it is held against

BINS = 112  # of a signature
RECALL = 0.999  # of pairs at the threshold itself that are to be candidates, at least
HELD_SETS = 256  # of shingles, while pairs are checked in the order of their held-out documents
NO_WORDS = 0  # instead of the hash of a band
NEIGHBOURS = 8  # held-out documents on either side that a document of a large band is held against
MOST_PARTNERS = 32  # candidates of one document: more only where many are copies of each other
EMPTY_BIN = np.uint64(2**64 - 1)
BASE, WORD_BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd
INVERSE = np.uint64(pow(int(BASE), -1, 1 << 64))
CODES = 0x20000  # of characters that a table holds; what is beyond is Han
NEITHER, PART, WHOLE = 0, 1, 2  # of a word: what a character is
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE")


def shingles(text: str, words: int) -> Hashes:
    """The hash of each run of ``words`` words, some of them twice; that of all words where there are fewer, and none
    where there is no word.
    """
    hashes = _ascii_words(text)[0] if text.isascii() else _words(text)
    if not len(hashes):
        return hashes
    return _runs(hashes, min(words, len(hashes)))


def _runs(hashes: Hashes, words: int) -> Hashes:
    """The hash of each run of so many words, from theirs."""
    last = len(hashes) - words + 1
    return _mixed(sum(hashes[i : last + i] * power for i, power in enumerate(_powers(WORD_BASE, words))))


def _words(text: str) -> Hashes:
    """The hash of each word: the sum of its letters' hashes, each times a power of ``BASE``."""
    folded = unicodedata.normalize("NFKC", text).lower()
    codes = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[np.minimum(codes, CODES - 1)]
    inside = np.flatnonzero(kinds)
    if not len(inside):
        return np.zeros(0, np.uint64)
    follows = np.zeros(len(kinds), bool)
    follows[1:] = (kinds[1:] == PART) & (kinds[:-1] == PART)
    starts = np.flatnonzero(~follows[inside])
    lengths = np.diff(starts, append=len(inside))
    places = np.arange(len(inside)) - np.repeat(starts, lengths)
    letters = _mixed(codes[inside].astype(np.uint64)) * _powers(BASE, int(lengths.max()))[places]
    return _mixed(np.add.reduceat(letters, starts))


def _ascii_words(text: str) -> tuple[Hashes, NDArray[np.int64]]:
    """The same in less time, and where each word begins: powers count from the start of the text, and are divided out
    of each word.
    """
    content = text.lower().encode()
    codes = np.frombuffer(content, np.uint8)
    inside = np.frombuffer(b"\0" + content.translate(_ascii_kinds()), np.bool_)
    starts = np.flatnonzero(inside[1:] > inside[:-1])
    if not len(starts):
        return np.zeros(0, np.uint64), starts
    letters = _ascii_letters()[codes]
    letters *= _powers(BASE, len(codes))
    return _mixed(np.add.reduceat(letters, starts) * _powers(INVERSE, len(codes))[starts] * BASE), starts


@lru_cache(maxsize=1)
def _ascii_kinds() -> bytes:
    """Of each character 1 where it is part of a word."""
    return bytes(_kinds()[:256] != NEITHER)


@lru_cache(maxsize=1)
def _ascii_letters() -> Hashes:
    """0 of what is in no word."""
    return np.where(_kinds()[:128] != NEITHER, _mixed(np.arange(128, dtype=np.uint64)), np.uint64(0))


@lru_cache(maxsize=1)
def _kinds() -> NDArray[np.uint8]:
    """Whether a character is part of a word, a whole one, or neither, by its number."""

    def kind(character: str) -> int:
        category = unicodedata.category(character)
        if category == "So" or (category[0] == "L" and unicodedata.name(character, "").startswith(UNSPACED)):
            return WHOLE
        return PART if category[0] in "LMN" or character == "_" else NEITHER

    return np.fromiter((kind(chr(code)) for code in range(CODES)), np.uint8, CODES)


@lru_cache(maxsize=4)
def _powers_upto(base: int, count: int) -> Hashes:
    return np.cumprod(np.full(count, base, np.uint64), dtype=np.uint64)


def _powers(base: np.uint64, count: int) -> Hashes:
    return _powers_upto(int(base), 1 << max(6, (count - 1).bit_length()))[:count]


def _mixed(values: Any) -> Hashes:
    """The last steps of SplitMix64: every bit of the result depends on all (Steele, 2014, doi 10.1145/2714064)."""
    mixed = values ^ (values >> np.uint64(30))
    mixed = mixed * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    found: Hashes = mixed
    return found


def band_rows(threshold: float) -> int:
    """Bins in a band: as many as leave ``RECALL`` of the pairs at the threshold. More give fewer candidates."""
    return max(r for r in range(1, 13) if r == 1 or 1 - (1 - threshold**r) ** (BINS // r) >= RECALL)


def band_count(settings: NearDuplicates) -> int:
    """B, of each document."""
    return BINS // band_rows(settings.threshold)


class MinHash:
    """The bands of a document, whose text comes in pieces; runs across their borders are left out."""

    def __init__(self, settings: NearDuplicates) -> None:
        self._words, self._rows = settings.words, band_rows(settings.threshold)
        self._least = np.full(BINS, EMPTY_BIN)

    def update(self, text: str) -> None:
        """Take the next piece."""
        hashes = shingles(text, self._words)
        np.minimum.at(self._least, _bins(hashes), _ranked(hashes))

    def bands(self) -> Hashes:
        """The hash of each band, (B,), or ``NO_WORDS`` in all of them."""
        found: Hashes = _bands(self._least[None], self._rows)[0]
        return found


def sketch(texts: Sequence[str], settings: NearDuplicates) -> Hashes:
    """The bands of texts, (N, B), each as ``MinHash`` has it: many short ones at once take half the time."""
    bands_NB = np.zeros((len(texts), band_count(settings)), np.uint64)
    plain = np.array([number for number, text in enumerate(texts) if text.isascii()], np.int64)
    lengths = np.array([len(texts[number]) + 1 for number in plain], np.int64)
    hashes, starts = _ascii_words("\n".join(texts[number] for number in plain))
    owner = np.searchsorted(np.cumsum(lengths), starts, side="right")
    is_whole = owner[settings.words - 1 :] == owner[: len(owner) - settings.words + 1]
    runs, owner = (
        (_runs(hashes, settings.words) if len(is_whole) else hashes[:0])[is_whole],
        owner[: len(is_whole)][is_whole],
    )
    least = np.full((len(plain), BINS), EMPTY_BIN)
    np.minimum.at(least.ravel(), owner * BINS + _bins(runs), _ranked(runs))
    bands_NB[plain] = _bands(least, band_rows(settings.threshold))
    for number in np.flatnonzero(bands_NB[:, 0] == NO_WORDS).tolist():  # of fewer words, or not in ASCII
        own = MinHash(settings)
        own.update(texts[number])
        bands_NB[number] = own.bands()
    return bands_NB


def _bins(hashes: Hashes) -> NDArray[np.intp]:
    return ((hashes >> np.uint64(32)) * np.uint64(BINS) >> np.uint64(32)).astype(np.intp)


def _ranked(hashes: Hashes) -> Hashes:
    """What the least is taken of: other bits come first than those that decide on the bin."""
    return hashes << np.uint64(32) | hashes >> np.uint64(32)


def _bands(least_NL: Hashes, rows: int) -> Hashes:
    """(N, B), from the least of each bin; those of empty bins are taken from others."""
    count, empty_NL = BINS // rows, least_NL == EMPTY_BIN
    filled_NL = least_NL.copy()
    for own, empty_L in zip(np.flatnonzero(empty_NL.any(1)), empty_NL[empty_NL.any(1)], strict=True):
        orders = _filling()[empty_L]
        filled_NL[own, empty_L] = least_NL[own, orders[np.arange(len(orders)), (~empty_L)[orders].argmax(1)]]
    filled_NBR = filled_NL[:, : count * rows].reshape(len(least_NL), count, rows)
    hashed: Hashes = _mixed((filled_NBR * _powers(WORD_BASE, rows)).sum(2, dtype=np.uint64)) | np.uint64(1)
    hashed[empty_NL.all(1)] = NO_WORDS
    return hashed


@lru_cache(maxsize=1)
def _filling() -> NDArray[np.int64]:
    """Of each bin, the order in which others are asked when it is empty."""
    return np.argsort(_mixed(np.arange(1, BINS * BINS + 1, dtype=np.uint64)).reshape(BINS, BINS), axis=1)


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
