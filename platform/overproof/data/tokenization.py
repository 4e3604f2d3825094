"""From text to rows of tokens: training a byte-level BPE tokenizer (Sennrich et al., arXiv 1508.07909), and packing.

Shapes: R rows, T predictions in a row, a row holds T + 1 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"  # of tokenizers that are trained here

# A byte-level vocabulary spells each byte as one printable character: GPT-2's table (openai/gpt-2, `encoder.py`).
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_BY_CHARACTER = {chr(byte): byte for byte in PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(b for b in range(0x100) if b not in PRINTABLE)
}

Tokens = NDArray[np.int32]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most ``vocab_size`` entries; a small corpus may not have that many pairs to merge.

    Before a text it puts the end of the one before, which every document has in front that a model is trained on.
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
    start = (END, tokenizer.token_to_id(END))
    tokenizer.post_processor = processors.TemplateProcessing(f"{END} $A", special_tokens=[start])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """The tokens of each text. A text that spells a special token is text: it cannot end its own document."""
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def boundary_of(start_id: int, end_id: int) -> tuple[int, ...]:
    """What stands before every document of a stream: the end of the one before, and its own start."""
    return (end_id,) if start_id == end_id else (end_id, start_id)


def train_rows(tokens: int, sequence_length: int, rows_per_group: int) -> int:
    """Rows that a stream of tokens, with those between documents, fills: whole groups, so that every group is full."""
    rows = max(tokens - 1, 0) // sequence_length
    return rows // rows_per_group * rows_per_group


def document_rows(tokens: int, sequence_length: int) -> int:
    """Rows of one held-out document."""
    return -(-tokens // sequence_length)


def pack_stream(stream: Tokens, sequence_length: int, rows: int) -> Tokens:
    """The start of a stream of documents, cut with stride T: (rows, T + 1), each token but the first predicted once.

    Raises:
        ValueError: the stream is too short.
    """
    if len(stream) < rows * sequence_length + 1:
        raise ValueError(f"{len(stream)} tokens do not fill {rows} rows of {sequence_length}")
    starts_R1 = np.arange(rows)[:, None] * sequence_length
    rows_RS: Tokens = stream[starts_R1 + np.arange(sequence_length + 1)]
    return rows_RS


def pack_document(document: Tokens, sequence_length: int, start_id: int, end_id: int) -> tuple[Tokens, Tokens]:
    """One document after its start: rows (R, T + 1), padded with its end, and the predictions in each row (R,)."""
    rows = document_rows(len(document), sequence_length)
    stream = np.full(rows * sequence_length + 1, end_id, np.int32)
    stream[0] = start_id
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
