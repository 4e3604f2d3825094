"""The rules that keep, drop and place documents."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overproof.data import cleaning
from overproof.tasks.language_modeling import LanguageModelingData


def checked(*pieces: bytes) -> cleaning.DocumentCheck:
    check = cleaning.DocumentCheck()
    for piece in pieces:
        check.update(piece)
    return check


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"text", ""),
        ("\u00e9\U0001f600".encode(), ""),
        (b"", cleaning.EMPTY),
        (b" \n\t", cleaning.EMPTY),
        ("\u00a0".encode(), cleaning.EMPTY),
        (b"text \xc3", cleaning.UNDECODABLE),
        ("caf\u00e9 cr\u00e8me".encode("latin-1"), cleaning.UNDECODABLE),
        (b"\xff\xfe", cleaning.UTF_16),
        ("plain".encode("utf-16"), cleaning.UTF_16),
        ("plain".encode("utf-32"), cleaning.UTF_16),
        (b"\xfe\xff" + "plain".encode("utf-16-be"), cleaning.UTF_16),
        ("a\ud800".encode("utf-8", "surrogatepass"), cleaning.UNDECODABLE),
    ],
)
@pytest.mark.parametrize("piece_bytes", [1, 2, 100])
def test_a_document_is_checked_whatever_pieces_it_comes_in(content: bytes, fault: str, piece_bytes: int) -> None:
    check = checked(*(content[start : start + piece_bytes] for start in range(0, len(content), piece_bytes)))
    assert check.finish() == fault
    assert check.size_bytes == len(content)
    assert check.sha256 == hashlib.sha256(content).hexdigest()


documents = st.lists(st.tuples(st.text("abc", min_size=1), st.binary(max_size=3)))


@given(documents, st.randoms(use_true_random=False), st.integers(0, 5))
def test_what_is_left_out_is_the_same_in_any_order(found: list[tuple[str, bytes]], random: object, border: int) -> None:
    def count(rows: list[tuple[str, bytes]]) -> cleaning.LeftOut:
        left_out = cleaning.LeftOut()
        for name, content in rows:
            left_out.check(name, checked(content).finish(), 1)
        return left_out

    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = count(found), count(shuffled[:border])
    other.merge(count(shuffled[border:]))
    assert (one.dropped, one.lines) == (other.dropped, other.lines)
    unusable = sum(checked(content).finish() != "" for _, content in found)
    assert sum(one.dropped.values()) - one.counts[cleaning.NUL_LINES] == unusable


def test_documents_of_other_encodings_are_named() -> None:
    left_out = cleaning.LeftOut()
    for number, fault in enumerate([cleaning.UNDECODABLE, "", cleaning.UTF_16, *[cleaning.UNDECODABLE] * 3]):
        left_out.check(f"{number}.txt", fault, 0)
    assert left_out.dropped == {"empty": 0, "undecodable": 4, "UTF-16": 1, "duplicate": 0}
    assert [line.partition(";")[0] for line in left_out.lines] == [
        "left out, not UTF-8 (Latin-1 perhaps): 0.txt, 3.txt, 4.txt and 1 more",
        "left out, in UTF-16 or UTF-32: 2.txt",
    ]


def hashes_of(count: int) -> list[str]:
    return [hashlib.sha256(b"%d" % i).hexdigest() for i in range(count)]


def test_no_document_of_a_large_corpus_moves_when_others_are_added() -> None:
    hashes = hashes_of(4000)
    splits = cleaning.split_of(hashes, 0.05, 0.1)
    assert np.array_equal(splits[:100], cleaning.split_of(hashes[:100], 0.05, 0.1))
    assert abs(np.mean(splits == "validation") - 0.05) < 0.02
    assert abs(np.mean(splits == "test") - 0.1) < 0.02


def test_a_split_is_pinned() -> None:
    low, middle, high = "00" * 32, "0f" + "ff" * 31, "ff" * 32
    assert cleaning.split_of([low, middle, high], 0.05, 0.05).tolist() == ["test", "validation", "train"]


@given(st.sets(st.integers(0, 2**64 - 1), min_size=3, max_size=40), st.floats(1e-9, 0.98), st.data())
def test_every_split_gets_a_document_and_as_few_as_can_be_move(
    words: set[int], test_fraction: float, data: st.DataObject
) -> None:
    validation_fraction = data.draw(st.floats(1e-9, 0.99 - test_fraction, exclude_min=True))
    hashes = data.draw(st.permutations([f"{word:016x}{'0' * 48}" for word in words]))
    found = dict(zip(hashes, cleaning.split_of(hashes, validation_fraction, test_fraction).tolist(), strict=True))
    in_order = [found[each] for each in sorted(hashes)]
    assert in_order == sorted(in_order, key=["test", "validation", "train"].index)
    assert set(in_order) == {"test", "validation", "train"}
    ends = (test_fraction, test_fraction + validation_fraction)
    by_share = [["test", "validation", "train"][np.searchsorted(ends, int(h[:16], 16) / 2**64, "right")]
                for h in sorted(hashes)]  # fmt: skip
    if set(by_share) == set(in_order):
        assert in_order == by_share
    for split in set(in_order) - set(by_share):
        assert in_order.count(split) == 1


@pytest.mark.parametrize("count", [3, 4, 7, 73])
def test_few_documents_are_enough_for_the_default_fractions(count: int) -> None:
    data = LanguageModelingData()
    splits = cleaning.split_of(hashes_of(count), data.validation_fraction, data.test_fraction)
    assert set(splits) == {"train", "validation", "test"}
    assert np.sum(splits == "train") >= count // 3


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_documents_than_splits_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} documents; expected at least 3"):
        cleaning.split_of(hashes_of(count), 0.05, 0.05)
