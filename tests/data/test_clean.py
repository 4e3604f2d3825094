"""The rules that keep, drop and place documents."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overproof.data import cleaning


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"text", ""),
        ("\u00e9\U0001f600".encode(), ""),
        (b"", cleaning.EMPTY),
        (b" \n\t", cleaning.EMPTY),
        (b"\xff\xfe", cleaning.UNDECODABLE),
        ("a\ud800".encode("utf-8", "surrogatepass"), cleaning.UNDECODABLE),
    ],
)
def test_fault(content: bytes, fault: str) -> None:
    assert cleaning.document_fault(content) == fault


documents = st.lists(st.tuples(st.text("abc", min_size=1), st.binary(max_size=3)), unique_by=lambda d: d[0])


@given(documents, st.randoms(use_true_random=False))
def test_the_order_of_the_documents_does_not_matter(found: list[tuple[str, bytes]], random: object) -> None:
    def decide(rows: list[tuple[str, bytes]]) -> cleaning.KeptDocuments:
        return cleaning.select_documents(
            [name for name, _ in rows],
            [cleaning.content_hash(content) for _, content in rows],
            [len(content) for _, content in rows],
            [cleaning.document_fault(content) for _, content in rows],
        )

    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = decide(found), decide(shuffled)
    assert one.names_N.tolist() == other.names_N.tolist()
    assert one.hashes_N.tolist() == other.hashes_N.tolist() == sorted(set(one.hashes_N))
    assert one.dropped == other.dropped
    assert len(one.hashes_N) + sum(one.dropped.values()) == len(found)


def test_of_exact_duplicates_the_first_name_stays() -> None:
    digest = cleaning.content_hash(b"same")
    kept = cleaning.select_documents(["b", "a", "c"], [digest] * 3, [4] * 3, [""] * 3)
    assert kept.names_N.tolist() == ["a"]
    assert kept.sizes_N.tolist() == [4]
    assert kept.dropped == {"empty": 0, "undecodable": 0, "duplicate": 2}


def test_a_split_depends_on_the_content_alone() -> None:
    hashes = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(4000)]
    splits = cleaning.split_of(hashes, 0.05, 0.1)
    assert np.array_equal(splits[:10], cleaning.split_of(hashes[:10], 0.05, 0.1))
    assert abs(np.mean(splits == "validation") - 0.05) < 0.02
    assert abs(np.mean(splits == "test") - 0.1) < 0.02


def test_split_and_shard_are_pinned() -> None:
    low, middle, high = "00" * 32, "0f" + "ff" * 31, "ff" * 32
    assert cleaning.split_of([low, middle, high], 0.05, 0.05).tolist() == ["test", "validation", "train"]
    assert cleaning.shard_of([low, "00" * 31 + "07", high], 4).tolist() == [0, 3, 3]


def test_shards_fill_evenly_within_the_train_split() -> None:
    hashes = np.array([hashlib.sha256(b"%d" % i).hexdigest() for i in range(8000)])
    train = hashes[cleaning.split_of(hashes, 0.25, 0.25) == "train"]
    counts = np.bincount(cleaning.shard_of(train, 4), minlength=4)
    assert counts.min() > 0.85 * len(train) / 4
