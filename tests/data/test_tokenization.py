"""The tokenizer and the packing of documents into rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpus import RECIPES
from hypothesis import given
from hypothesis import strategies as st

from overproof import pipeline
from overproof.config import TextData, load_recipe
from overproof.data import tokenization
from overproof.data.manifest import START, shard_schema
from overproof.data.parquet_reader import table_to_numpy
from overproof.data.part_files import TapeWriter
from overproof.data.row_files import open_shard
from overproof.data.shard_layout import ShardPlan
from overproof.data.text_tokenizer import trained
from overproof.data.token_parts import ShardWriter, row_dtype, text_columns

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


def test_rows_say_what_begins_their_documents_unless_they_are_read_across_them(tmp_path: Path) -> None:
    """The rows are the same either way; held-out rows say it as train rows do, and every later artifact is another."""
    tokenizer, words = trained(tokenization.train_bpe(["a b c"] * 3, 288).to_str()), [[3, 4, 5, 6, 7], [8, 9, 10, 11]]
    held_out = np.zeros(2, row_dtype(8, tokenizer.outputs))
    for row, ids in zip(held_out, words, strict=True):
        packed_RS, (row["length"],) = tokenization.pack_document(np.int32(ids), 8, tokenizer.start_id, tokenizer.end_id)
        row["tokens"] = packed_RS[0]
    with TapeWriter(str(tmp_path)) as writer:
        writer.write("train", np.uint16([id_ for ids in words for id_ in (*tokenizer.boundary, *ids)]))
        writer.write("validation", held_out)
    tapes = {name: [tape] for name, tape in writer.tapes.items()}
    found = {}
    for across in (False, True):
        changes = (f"data.cross_document_attention={across}", "data.sequence_length=8", "data.rows_per_group=1")
        recipe = load_recipe(RECIPES / "stdlib-lm.yaml", changes)
        assert isinstance(recipe.data, TextData)
        for split in ("train", "validation"):
            plan, folder = ShardPlan(split, 0, 0, 1 if split == "train" else 2), tmp_path / f"{across}"
            ShardWriter(str(tmp_path), str(folder), tapes, recipe.data, tokenizer, 0).write(plan)
            file = open_shard(folder / plan.path)
            assert file.schema_arrow.equals(shard_schema(text_columns(8, tokenizer.outputs, apart=not across)))
            found[split, across] = table_to_numpy(file.read())
        prepare = next(stage for stage in pipeline.STAGES if stage.name == "prepare")
        found["part", across] = prepare.part(recipe)
    for split in ("train", "validation"):
        starts = found[split, False].pop(START)
        assert set(starts.tolist()) == {tokenizer.start_id}
        assert found[split, False].keys() == found[split, True].keys()
        for name, values in found[split, True].items():
            assert np.array_equal(values, found[split, False][name]), name
    assert found["train", True]["tokens"].tolist() == [[0, 3, 4, 5, 6, 7, 0, 8, 9]]
    assert found["part", False] != found["part", True]
