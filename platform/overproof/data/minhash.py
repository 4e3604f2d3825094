"""Sketches of documents by which near-copies meet: hashes of runs of words, MinHash of them, and its bands. Pure numpy.

The runs of words are shingles (Broder, 1997, doi 10.1109/SEQUEN.1997.666900). A word is in any case and form of Unicode
(NFKC); where a script has no spaces between words, each character is one. A document's signature is a one-permutation
MinHash (Li, Owen and Zhang, NIPS 2012), whose empty bins are filled from others (Shrivastava, arXiv 1703.04664); it is
cut into bands. N documents, B bands.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overproof.config.data import NearDuplicates

Hashes = NDArray[np.uint64]

BINS = 112  # of a signature
RECALL = 0.999  # of pairs at the threshold itself that are to be candidates, at least
NO_WORDS = 0  # instead of the hash of a band
EMPTY_BIN = np.uint64(2**64 - 1)
BASE, WORD_BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd
INVERSE = np.uint64(pow(int(BASE), -1, 1 << 64))
SKETCHED_CHARACTERS = 1 << 17  # at once: with more, what is computed on the way leaves the processor's cache
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
    """Of each byte 1 where it is a character of ASCII that is part of a word."""
    return bytes(_kind(chr(code)) != NEITHER for code in range(128)) + bytes(128)


@lru_cache(maxsize=1)
def _ascii_letters() -> Hashes:
    """0 of what is in no word."""
    in_word = np.frombuffer(_ascii_kinds(), np.bool_)[:128]
    return np.where(in_word, _mixed(np.arange(128, dtype=np.uint64)), np.uint64(0))


@lru_cache(maxsize=1)
def _kinds() -> NDArray[np.uint8]:
    """What each character is, by its number."""
    return np.fromiter((_kind(chr(code)) for code in range(CODES)), np.uint8, CODES)


def _kind(character: str) -> int:
    """Whether a character is part of a word, a whole one, or neither."""
    category = unicodedata.category(character)
    if category == "So" or (category[0] == "L" and unicodedata.name(character, "").startswith(UNSPACED)):
        return WHOLE
    return PART if category[0] in "LMN" or character == "_" else NEITHER


@lru_cache(maxsize=8)
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
    begins = np.cumsum([0, *map(len, texts)])[:-1] // SKETCHED_CHARACTERS
    borders = [0, *(np.flatnonzero(np.diff(begins)) + 1).tolist(), len(texts)]
    return np.concatenate([_sketch(texts[first:last], settings) for first, last in pairwise(borders)])


def _sketch(texts: Sequence[str], settings: NearDuplicates) -> Hashes:
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
