"""From text to rows of tokens: a byte-level BPE tokenizer (Sennrich et al., arXiv 1508.07909) and packing.

Shapes: R rows, T predictions in a row, a row holds T + 1 tokens. Token 0 starts every document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from overproof.errors import InputError

END = "<|endoftext|>"
END_ID = 0

Tokens = NDArray[np.int32]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most ``vocab_size`` entries; a small corpus may not have that many pairs to merge.

    Counts of words alone decide, so the order of the texts does not matter.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_tokenizer(path: Path) -> str:
    """The JSON of an existing tokenizer.

    Raises:
        InputError: it is not a byte-level BPE tokenizer whose token 0 is ``<|endoftext|>``.
    """
    text = path.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"{path}: not a tokenizer.json: {error}") from None
    model_type = json.loads(text)["model"]["type"]
    if model_type != "BPE" or "ByteLevel" not in json.dumps(json.loads(text)["pre_tokenizer"]):
        raise InputError(f"{path}: a {model_type} tokenizer; expected byte-level BPE, which can write any bytes")
    if tokenizer.id_to_token(END_ID) != END:
        raise InputError(f"{path}: token 0 is {tokenizer.id_to_token(END_ID)!r}; expected {END!r}, the end of a text")
    return text


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """The tokens of each text. A text that spells a special token is text: it cannot end its own document."""
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def train_rows(tokens: int, sequence_length: int, rows_per_group: int) -> int:
    """Rows that a stream of tokens, end tokens among them, fills: whole row groups, so that every group is full."""
    rows = max(tokens - 1, 0) // sequence_length
    return rows // rows_per_group * rows_per_group


def document_rows(tokens: int, sequence_length: int) -> int:
    """Rows of one held-out document."""
    return -(-tokens // sequence_length)


def pack_stream(stream: Tokens, sequence_length: int, rows: int) -> Tokens:
    """The start of a stream, documents each after token 0, cut with stride T: (rows, T + 1), each token predicted once.

    Raises:
        ValueError: the stream is too short.
    """
    if len(stream) < rows * sequence_length + 1:
        raise ValueError(f"{len(stream)} tokens do not fill {rows} rows of {sequence_length}")
    starts_R1 = np.arange(rows)[:, None] * sequence_length
    rows_RS: Tokens = stream[starts_R1 + np.arange(sequence_length + 1)]
    return rows_RS


def pack_document(document: Tokens, sequence_length: int) -> tuple[Tokens, Tokens]:
    """One document after token 0: rows (R, T + 1), padded with 0, and the predictions in each row (R,)."""
    rows = document_rows(len(document), sequence_length)
    stream = np.zeros(rows * sequence_length + 1, np.int32)
    stream[1 : 1 + len(document)] = document
    starts_R1 = np.arange(rows)[:, None] * sequence_length
    lengths_R = np.minimum(len(document) - starts_R1[:, 0], sequence_length).astype(np.int32)
    return stream[starts_R1 + np.arange(sequence_length + 1)], lengths_R


def token_columns(first_sample: int, tokens_RS: Tokens, lengths_R: Any, documents_R: Any) -> dict[str, NDArray[Any]]:
    """The columns of a text shard."""
    rows = len(tokens_RS)
    return {
        "sample_id": np.arange(first_sample, first_sample + rows, dtype=np.int64),
        "document": np.broadcast_to(np.asarray(documents_R, np.int32), (rows,)),
        "tokens": tokens_RS,
        "length": np.broadcast_to(np.asarray(lengths_R, np.int32), (rows,)),
    }
