"""The tokenizer and the packing of documents into rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overproof.data import tokenization

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * 3 for i in range(40)]

documents = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=30).map(np.int32), min_size=1, max_size=6)


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    assert tokenization.train_bpe(TEXTS, 288).to_str() == tokenization.train_bpe(reversed(TEXTS), 288).to_str()


def test_any_text_comes_back_whole() -> None:
    tokenizer = tokenization.train_bpe(TEXTS, 288)
    text = " \u00e9\U0001f600\tNever seen\x00\n\n"
    assert tokenizer.decode(tokenization.encode(tokenizer, [text])[0].tolist()) == text


def test_the_end_of_a_text_cannot_be_spelled_by_one() -> None:
    tokenizer = tokenization.train_bpe(TEXTS, 288)
    end = tokenizer.token_to_id(tokenization.END)
    (ids,) = tokenization.encode(tokenizer, [f"a{tokenization.END}b"])
    assert end not in ids
    assert tokenizer.decode(ids.tolist()) == f"a{tokenization.END}b"
    assert tokenizer.encode("a").ids == [end, *tokenizer.encode("a", add_special_tokens=False).ids]


@given(documents, st.integers(1, 9), st.integers(1, 4))
def test_train_rows_predict_each_token_once(found: list[np.ndarray], length: int, group: int) -> None:
    stream = np.concatenate([np.concatenate([[0], document]) for document in found])
    rows = tokenization.train_rows(len(stream), length, group)
    assert rows % group == 0
    assert rows * length <= len(stream) - 1 < (rows + group) * length
    packed_RS = tokenization.pack_stream(stream, length, rows)
    assert packed_RS.shape == (rows, length + 1)
    assert np.array_equal(packed_RS[:, 1:].reshape(-1), stream[1 : 1 + rows * length])
    assert np.array_equal(packed_RS[:, :-1].reshape(-1), stream[: rows * length])


@given(st.lists(st.integers(1, 99), min_size=1, max_size=40).map(np.int32), st.integers(1, 9))
def test_a_held_out_document_is_predicted_whole_and_alone(document: np.ndarray, length: int) -> None:
    rows_RS, lengths_R = tokenization.pack_document(document, length, start_id=200, end_id=300)
    predicted = np.concatenate([row[1 : 1 + n] for row, n in zip(rows_RS, lengths_R, strict=True)])
    assert np.array_equal(predicted, document)
    assert rows_RS[0, 0] == 200
    assert len(rows_RS) == tokenization.document_rows(len(document), length)
    assert (lengths_R[:-1] == length).all()
    assert 1 <= lengths_R[-1] <= length
    assert (rows_RS[-1, 1 + lengths_R[-1] :] == 300).all()


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill 3 rows of 4"):
        tokenization.pack_stream(np.int32([0, 1, 2, 3]), 4, 3)
