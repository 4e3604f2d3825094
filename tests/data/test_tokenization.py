"""The tokenizer and the packing of documents into rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from overproof.data import tokenization
from overproof.errors import InputError

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * 3 for i in range(40)]

documents = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=30).map(np.int32), min_size=1, max_size=6)


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    assert tokenization.train_bpe(TEXTS, 288).to_str() == tokenization.train_bpe(reversed(TEXTS), 288).to_str()


def test_any_text_comes_back_whole() -> None:
    tokenizer = tokenization.train_bpe(TEXTS, 288)
    text = " \u00e9\U0001f600\tNever seen\x00\n\n"
    assert tokenizer.decode(tokenization.encode(tokenizer, [text])[0].tolist()) == text


def test_token_zero_ends_a_text_and_cannot_be_spelled_by_one() -> None:
    tokenizer = tokenization.train_bpe(TEXTS, 288)
    assert tokenizer.token_to_id(tokenization.END) == tokenization.END_ID
    (ids,) = tokenization.encode(tokenizer, [f"a{tokenization.END}b"])
    assert tokenization.END_ID not in ids
    assert tokenizer.decode(ids.tolist()) == f"a{tokenization.END}b"


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
    rows_RS, lengths_R = tokenization.pack_document(document, length)
    predicted = np.concatenate([row[1 : 1 + n] for row, n in zip(rows_RS, lengths_R, strict=True)])
    assert np.array_equal(predicted, document)
    assert rows_RS[0, 0] == tokenization.END_ID
    assert len(rows_RS) == tokenization.document_rows(len(document), length)
    assert (lengths_R[:-1] == length).all()
    assert 1 <= lengths_R[-1] <= length
    assert (rows_RS[-1, 1 + lengths_R[-1] :] == 0).all()


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill 3 rows of 4"):
        tokenization.pack_stream(np.int32([0, 1, 2, 3]), 4, 3)


def test_an_existing_tokenizer_is_read_as_it_is(tmp_path: Path) -> None:
    text = tokenization.train_bpe(TEXTS, 288).to_str()
    (tmp_path / "tokenizer.json").write_text(text)
    assert tokenization.read_tokenizer(tmp_path / "tokenizer.json") == text


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        tokenization.read_tokenizer(path)
    tree = json.loads(tokenization.train_bpe(TEXTS, 288).to_str())
    path.write_text(json.dumps(tree | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(InputError, match="expected byte-level BPE"):
        tokenization.read_tokenizer(path)
    plain = tree | {"added_tokens": [], "model": tree["model"] | {"vocab": {"a": 0, "b": 1}, "merges": []}}
    path.write_text(json.dumps(plain))
    assert Tokenizer.from_file(str(path)).id_to_token(0) == "a"
    with pytest.raises(InputError, match="token 0 is 'a'"):
        tokenization.read_tokenizer(path)
