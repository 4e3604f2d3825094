"""Near-copies: what is found of planted ones, that order does not matter, and what becomes of them."""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from overproof.config import NearDuplicates
from overproof.data.minhash import BINS, MinHash, _ascii_words, _words, band_count, band_rows, shingles, sketch
from overproof.data.near_duplicates import (
    MOST_PARTNERS,
    candidate_pairs,
    decide,
    find_near_duplicates,
    jaccard,
    no_pairs,
)
from overproof.errors import InputError

SETTINGS = NearDuplicates()
STDLIB = Path(sysconfig.get_paths()["stdlib"])
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def silent(note: str) -> None:
    del note


def plain_jaccard(one: str, other: str, words: int = 5) -> float:
    """Of the sets of runs of words, as a textbook has it."""

    def runs(text: str) -> set[tuple[str, ...]]:
        found = re.findall(r"\w+", text.lower())
        return {tuple(found[i : i + words]) for i in range(max(1, len(found) - words + 1))}

    return len(runs(one) & runs(other)) / len(runs(one) | runs(other))


def bands_of(text: str, settings: NearDuplicates = SETTINGS) -> np.ndarray:
    sketch = MinHash(settings)
    sketch.update(text)
    return sketch.bands()


def made(generator: random.Random, words: int, vocabulary: int = 4000) -> list[str]:
    return [f"w{generator.randrange(vocabulary)}" for _ in range(words)]


def edited(generator: random.Random, words: list[str], least: float) -> list[str]:
    """Words replaced, put in and taken out, as long as the Jaccard index is not below ``least``."""
    found = words
    while True:
        place, edit = generator.randrange(len(found)), generator.randrange(3)
        put = [f"x{generator.randrange(10**6)}"] if edit else []
        tried = [*found[:place], *put, *found[place + (edit != 2) :]]
        if plain_jaccard(" ".join(words), " ".join(tried)) < least:
            return found
        found = tried


def test_runs_of_words_are_those_of_the_plain_definition() -> None:
    generator = random.Random(0)
    for words in (1, 3, 8, 60, 400):
        one = made(generator, words, 50)
        other = edited(generator, one, 0.5)
        sets = [np.unique(shingles(" ".join(text), 5)) for text in (one, other)]
        assert jaccard(*sets) == plain_jaccard(" ".join(one), " ".join(other))
    source = (STDLIB / "argparse.py").read_text(encoding="utf-8")
    assert len(np.unique(shingles(source, 5))) == len({tuple(r) for r in _runs(re.findall(r"\w+", source.lower()))})
    for text in (source, "_a1 b--c", " x", "a"):
        assert np.array_equal(np.append(_ascii_words(text)[0], _words("\u03b1")), _words(f"{text} \u03b1"))
    assert shingles("", 5).size == shingles(" \n-!", 5).size == 0
    same = ("The Straße, is LONG: e\u0301t\u00e9!", "the stra\u00dfe is\n\nlong \u00e9t\u00e9")
    assert np.array_equal(*(shingles(text, 2) for text in same))


def _runs(words: list[str]) -> Iterator[list[str]]:
    return (words[i : i + 5] for i in range(len(words) - 4))


@pytest.mark.parametrize(
    "text", ["\u673a\u5668\u5b66\u4e60\u662f\u4eba\u5de5", "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22"]
)
def test_characters_are_words_where_a_script_has_no_spaces(text: str) -> None:
    assert len(shingles(text, 5)) == len(text) - 4
    assert len(shingles(f"{text} in English", 1)) == len(text) + 2
    assert len(shingles("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", 1)) == 2  # Korean has spaces


@pytest.mark.parametrize("words", [12, 80, 600])
@pytest.mark.parametrize("join", [" ", ""], ids=["words", "Chinese"])
def test_copies_just_above_the_threshold_are_candidates(words: int, join: str) -> None:
    generator, pairs, missed = random.Random(words), 150, 0
    for _ in range(pairs):
        one = made(generator, words) if join else [generator.choice(HAN) for _ in range(words)]
        other = edited(generator, one, 0.8) if join else _cut(one)
        missed += not (bands_of(join.join(one)) == bands_of(join.join(other))).any()
    assert missed <= 0.02 * pairs


def _cut(characters: list[str]) -> list[str]:
    """Without the end, so that the Jaccard index is just above 0.8."""
    runs = len(characters) - 4
    return characters[: 4 + -(-8 * runs // 10)]


def test_bands_leave_nearly_every_pair_at_the_threshold() -> None:
    for threshold in (0.6, 0.7, 0.8, 0.9, 0.99):
        rows = band_rows(threshold)
        assert 1 - (1 - threshold**rows) ** (BINS // rows) >= 0.999
    assert band_rows(0.8) == 5


def test_pieces_of_a_document_have_its_bands() -> None:
    words = made(random.Random(3), 5000)
    whole, pieces = MinHash(SETTINGS), MinHash(SETTINGS)
    whole.update(" ".join(words))
    for start in range(0, len(words), 500):
        pieces.update(" ".join(words[start : start + 504]))
    assert np.array_equal(whole.bands(), pieces.bands())


def test_many_texts_at_once_have_the_bands_of_each() -> None:
    generator = random.Random(4)
    texts = [" ".join(made(generator, words)) for words in (0, 1, 4, 5, 6, 40, 900)]
    texts += ["\u00e9 " + texts[5], "\u673a\u5668\u5b66\u4e60\u662f\u4eba\u5de5", "!?\n", texts[6]]
    for chosen in (texts, texts[::-1], texts[:1], []):
        assert [bands.tolist() for bands in sketch(chosen, SETTINGS)] == [bands_of(text).tolist() for text in chosen]


def corpus(generator: random.Random) -> tuple[list[str], np.ndarray]:
    """Texts of all splits, in which some train and test ones are copies of test and validation ones; and the splits."""
    texts = [" ".join(made(generator, 60)) for _ in range(200)]
    splits = np.array(["test"] * 20 + ["validation"] * 20 + ["train"] * 160)
    for own, other in ((40, 0), (41, 0), (42, 21), (43, 1), (2, 3), (4, 3)):
        texts[own] = " ".join(edited(generator, texts[other].split(), 0.85))
    texts[50] = texts[51] = "!?"  # no word
    texts[52] = " ".join(edited(generator, texts[60].split(), 0.9))  # both in train
    return texts, splits


def test_the_held_out_side_wins_and_copies_in_the_test_split_are_one() -> None:
    texts, splits = corpus(random.Random(1))
    found = find_near_duplicates(texts, splits, SETTINGS, silent)
    assert np.flatnonzero(found.left_out_N).tolist() == [40, 41, 42, 43]
    assert found.clusters_N[[2, 3, 4]].tolist() == [2, 2, 2]
    others = np.delete(np.arange(200), [2, 3, 4])
    assert np.array_equal(found.clusters_N[others], others)
    told = found.found
    assert (told.documents, told.test_documents, told.test_clusters) == (4, 2, 18)
    sizes = np.array([len(text) for text in texts])
    assert told.train_bytes_share == pytest.approx(sizes[40:44].sum() / sizes[40:].sum())
    assert told.test_bytes_share == pytest.approx(sizes[:2].sum() / sizes[:20].sum())
    kept = np.delete(np.arange(200), [40, 41, 42, 43])
    assert np.array_equal(found.kept, kept)
    assert kept[found.kept_clusters].tolist() == found.clusters_N[kept].tolist()


def test_copies_of_copies_are_no_copies() -> None:
    generator = random.Random(2)
    first = made(generator, 200)
    second = edited(generator, first, 0.82)
    third = edited(generator, second, 0.82)
    assert plain_jaccard(" ".join(first), " ".join(third)) < 0.8
    texts = [" ".join(text) for text in (first, second, third)]
    found = find_near_duplicates(texts, np.array(["test", "train", "train"]), SETTINGS, silent)
    assert found.left_out_N.tolist() == [False, True, False]


def test_the_order_of_documents_changes_nothing() -> None:
    texts, splits = corpus(random.Random(1))
    found = find_near_duplicates(texts, splits, SETTINGS, silent)
    together = {frozenset(np.flatnonzero(found.clusters_N == c).tolist()) for c in set(found.clusters_N.tolist())}
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(texts))
        again = find_near_duplicates([texts[i] for i in order], splits[order], SETTINGS, silent)
        assert np.array_equal(again.left_out_N, found.left_out_N[order])
        assert again.found == found.found
        clusters = set(again.clusters_N.tolist())
        assert {frozenset(order[again.clusters_N == c].tolist()) for c in clusters} == together


def test_bands_some_at_a_time_give_the_same_candidates() -> None:
    texts, splits = corpus(random.Random(1))
    bands = list(np.stack([bands_of(text) for text in texts], axis=1))
    whole, found = candidate_pairs(bands, splits, no_pairs()), no_pairs()
    for first in range(0, len(bands), 4):
        found = candidate_pairs(bands[first : first + 4], splits, found)
    assert len(bands) == band_count(SETTINGS) == 22
    assert np.array_equal(found, whole)


def test_many_copies_of_one_text_are_found_with_few_candidates() -> None:
    generator = random.Random(5)
    seed = made(generator, 200)
    texts = [" ".join(edited(generator, seed, 0.97)) for _ in range(600)]
    texts[-1] = " ".join(made(generator, 200))
    splits = np.array((["test"] + ["train"] * 4) * 120)
    pairs = candidate_pairs(list(np.stack([bands_of(text) for text in texts], axis=1)), splits, no_pairs())
    assert len(pairs) <= MOST_PARTNERS * len(texts) < 600 * 120
    found = find_near_duplicates(texts, splits, SETTINGS, silent)
    assert np.array_equal(found.kept, [*np.flatnonzero(splits == "test"), 599])
    assert found.found.test_clusters == 1
    with pytest.raises(InputError, match="all 479 train documents are near-copies of held-out ones"):
        find_near_duplicates(texts[:-1], splits[:-1], SETTINGS, silent)


def test_a_threshold_is_met_exactly() -> None:
    words = [f"w{i}" for i in range(104)]  # 100 runs
    texts = [" ".join(words), " ".join(words[:-10]), " ".join(words[:-11])]  # 0.9 and 0.89 of them
    splits = np.array(["test", "train", "train"])
    found = find_near_duplicates(texts, splits, NearDuplicates(threshold=0.9), silent)
    assert found.left_out_N.tolist() == [False, True, False]
    strict = find_near_duplicates([texts[0], texts[0].upper(), texts[1]], splits, NearDuplicates(threshold=1), silent)
    assert strict.left_out_N.tolist() == [False, True, False]


def test_the_tables_of_code_pages_are_near_copies() -> None:
    """The demo's own: test documents whose like was in the train split."""
    names = ("cp1254", "cp1252", "iso8859_15", "iso8859_1", "cp424")
    texts = [(STDLIB / f"encodings/{name}.py").read_text(encoding="utf-8") for name in names]
    assert plain_jaccard(texts[0], texts[1]) == pytest.approx(0.88, abs=0.01)
    splits = np.array(["test", "train", "test", "train", "train"])
    found = find_near_duplicates(texts, splits, SETTINGS, silent)
    assert found.left_out_N.tolist() == [False, True, False, True, False]


def test_nothing_is_found_without_copies() -> None:
    nothing = decide(no_pairs(), np.array(["train", "test", "validation"]), np.array([1, 2, 3]), SETTINGS)
    assert not nothing.left_out_N.any()
    assert nothing.clusters_N.tolist() == [0, 1, 2]
    assert nothing.found.summary.startswith("No train document was a near-copy of a held-out one")
