"""Documents in parts to tokens and shards: what one task does with its share, from and to files. No Ray here.

The tokens of a part's train documents, each after its boundary, are one tape, and the rows of its held-out documents
are others: parts follow each other in the order of the documents, so that a shard is a range of some tapes.
R rows, S = T + 1 tokens in a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from overproof.config import TextData
from overproof.data import tokenization
from overproof.data.altered_texts import SAME, AlteredTexts, count_altered, how_it_comes_back
from overproof.data.columns import token_dtype
from overproof.data.document_parts import TEXT_COLUMNS, Part, Parts, document_pieces, iter_part
from overproof.data.manifest import START, Column, Shard, shard_schema
from overproof.data.order import permutation
from overproof.data.parquet_writer import write_shard
from overproof.data.part_files import BATCH_BYTES, Tape, TapeWriter, read_tapes
from overproof.data.shard_layout import ShardPlan
from overproof.data.text_tokenizer import TextTokenizer, trained
from overproof.data.tokenization import BYTE_BY_CHARACTER
from overproof.data.tokenizer_json import continuing, special_names_as_text

SAMPLED_BYTES = 4096  # of each document of the sample
SHARD_STREAM = 1 << 32  # sets the permutation inside a shard apart from those of `Order`
TRAINING_BYTES = 1 << 30  # of text that a tokenizer is trained on: what it counts is held in memory


def train_tokenizer(parts: Parts, vocab_size: int) -> TextTokenizer:
    """From the train documents, those with the lowest hashes where they have more than ``TRAINING_BYTES``."""

    def texts() -> Iterator[str]:
        counted_bytes = 0
        for part in parts:
            if part.first + part.count <= parts.borders.held_out:
                continue
            for batch, ranks_N in iter_part(parts, part, TEXT_COLUMNS):
                is_kept, _ = part.kept(ranks_N)
                for place in np.flatnonzero(is_kept & (ranks_N >= parts.borders.held_out)).tolist():
                    for piece in document_pieces(parts.source, batch, place):
                        yield piece.decode()
                    counted_bytes += batch["size_bytes"][place].as_py()
                    if counted_bytes >= TRAINING_BYTES:
                        return

    return trained(tokenization.train_bpe(texts(), vocab_size).to_str())


@lru_cache(maxsize=2)
def _tokenizer(tokenizer_json: str, is_first: bool) -> Tokenizer:
    """Of the first piece of a document, or of its later ones."""
    return Tokenizer.from_str(special_names_as_text(tokenizer_json if is_first else continuing(tokenizer_json)))


@lru_cache(maxsize=1)
def _spelled(tokenizer_json: str) -> list[bytes]:
    """The bytes of each token of a byte-level tokenizer, which writes them back one by one; none of another."""
    if (json.loads(tokenizer_json).get("decoder") or {}).get("type") != "ByteLevel":
        return []
    vocabulary = Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True)
    spelled = [b""] * (1 + max(vocabulary.values()))
    for token, number in vocabulary.items():
        if all(character in BYTE_BY_CHARACTER for character in token):
            spelled[number] = bytes(BYTE_BY_CHARACTER[character] for character in token)
    return spelled


def text_columns(sequence_length: int, vocab_size: int, apart: bool = False) -> tuple[Column, ...]:
    """Of a text shard: a row's sequence_length + 1 tokens, of which ``length`` + 1 are there; its document, or -1; and,
    where its documents are kept ``apart``, the token that begins each.
    """
    columns = (
        Column(name="document", dtype="<i4", batch=False),
        Column(name="tokens", dtype=token_dtype(vocab_size), shape=(sequence_length + 1,)),
        Column(name="length", dtype="<i4"),
    )
    return (*columns, Column(name=START, dtype="<i4")) if apart else columns


def row_dtype(sequence_length: int, vocab_size: int) -> np.dtype[Any]:
    """A held-out row on its tape."""
    tokens = (token_dtype(vocab_size), (sequence_length + 1,))
    return np.dtype([("document", "<i8"), ("length", "<i4"), ("tokens", *tokens)])


@dataclass
class TokenisedPart:
    """What became of a part."""

    tapes: dict[str, Tape] = field(default_factory=dict)  # by split
    split_bytes: dict[str, int] = field(default_factory=dict)  # of all documents, near-copies among them
    altered: AlteredTexts = field(default_factory=dict)
    near_copies: list[str] = field(default_factory=list)  # names of those that are left out
    sampled: dict[int, str] = field(default_factory=dict)  # documents, and how they begin


Altered = dict[int, tuple[str, int]]  # documents that do not come back as they were: the name, and the way


@dataclass(frozen=True)
class Piece:
    content: bytes
    name: str
    document: int
    split: str
    is_first: bool
    is_last: bool


def encode_pieces(pieces: Sequence[Piece], tokenizer: TextTokenizer, altered: Altered) -> list[tokenization.Tokens]:
    """The tokens of each piece; ``altered`` is told of documents that do not come back by theirs."""
    tokens: list[tokenization.Tokens] = [np.zeros(0, np.int32)] * len(pieces)
    for is_first in (True, False):
        chosen = [place for place, piece in enumerate(pieces) if piece.is_first == is_first]
        if not chosen:
            continue
        own = _tokenizer(tokenizer.json, is_first)
        texts = [pieces[place].content.decode() for place in chosen]
        encoded = tokenization.encode(own, texts)
        spelled = _spelled(tokenizer.json)
        for place, ids, text in zip(chosen, encoded, texts, strict=True):
            piece, tokens[place], numbers = pieces[place], ids, ids.tolist()
            if spelled and b"".join(map(spelled.__getitem__, numbers)) == piece.content:
                continue
            how = how_it_comes_back(text, own.decode(numbers, skip_special_tokens=False))
            if how != SAME:
                altered[piece.document] = (piece.name, max(how, altered.get(piece.document, ("", SAME))[1]))
    return tokens


@dataclass(frozen=True)
class Tokeniser:
    """Makes tokens of documents."""

    parts: Parts
    tokenizer: TextTokenizer
    sequence_length: int
    sampled: NDArray[np.int64]  # test documents

    def tokenise(self, part: Part) -> TokenisedPart:
        """The documents of a part that are used."""
        found, altered = TokenisedPart(), Altered()
        with TapeWriter(self.parts.uri) as tapes:
            rows = _RowTapes(tapes, self.tokenizer, self.sequence_length)
            held, held_bytes = list[Piece](), 0
            for piece in self._pieces(part, found):
                held.append(piece)
                held_bytes += len(piece.content)
                if held_bytes >= BATCH_BYTES:
                    self._write(held, part, tapes, rows, altered)
                    held, held_bytes = [], 0
            self._write(held, part, tapes, rows, altered)
        found.altered = count_altered(altered[document] for document in sorted(altered))
        found.tapes = {name.partition("-")[0]: tape for name, tape in tapes.tapes.items()}
        return found

    def _pieces(self, part: Part, found: TokenisedPart) -> Iterator[Piece]:
        for batch, ranks_N in iter_part(self.parts, part, TEXT_COLUMNS):
            splits, names = self.parts.borders.splits(ranks_N).tolist(), batch["name"].to_pylist()
            is_kept, numbers_N = part.kept(ranks_N)
            for place, size_bytes in enumerate(batch["size_bytes"].to_pylist()):
                split, document = splits[place], int(numbers_N[place])
                found.split_bytes[split] = found.split_bytes.get(split, 0) + size_bytes
                if not is_kept[place]:
                    found.near_copies.append(names[place])
                    continue
                pieces = document_pieces(self.parts.source, batch, place)
                piece, is_first = next(pieces), True
                if split == "test" and document in self.sampled:
                    found.sampled[document] = piece[:SAMPLED_BYTES].decode(errors="ignore")  # a character may be cut
                while (following := next(pieces, None)) is not None:
                    yield Piece(piece, names[place], document, split, is_first, is_last=False)
                    piece, is_first = following, False
                yield Piece(piece, names[place], document, split, is_first, is_last=True)

    def _write(self, held: Sequence[Piece], part: Part, tapes: TapeWriter, rows: _RowTapes, altered: Altered) -> None:
        boundary = np.array(self.tokenizer.boundary, np.int32)
        train = list[tokenization.Tokens]()
        for piece, ids in zip(held, encode_pieces(held, self.tokenizer, altered), strict=True):
            if piece.split == "train":
                train += [boundary, ids] if piece.is_first else [ids]
            else:
                rows.write(f"{piece.split}-{part.number}", piece.document, ids, piece.is_last)
        if train:
            tapes.write(f"train-{part.number}", np.concatenate(train).astype(token_dtype(self.tokenizer.outputs)))


class _RowTapes:
    """Packs held-out documents, whose tokens come a piece at a time, each by itself."""

    def __init__(self, tapes: TapeWriter, tokenizer: TextTokenizer, sequence_length: int) -> None:
        self._tapes, self._tokenizer, self._length = tapes, tokenizer, sequence_length
        self._dtype = row_dtype(sequence_length, tokenizer.outputs)
        self._rest = np.array([tokenizer.start_id], np.int32)  # what the next row begins with

    def write(self, name: str, document: int, ids: tokenization.Tokens, is_last: bool) -> None:
        """Append the rows that are full, and at the end of a document the one that is not."""
        stream, length = np.concatenate([self._rest, ids]), self._length
        if is_last:
            ends = int(stream[0]), self._tokenizer.end_id
            self._append(name, document, *tokenization.pack_document(stream[1:], length, *ends))
            self._rest = np.array([self._tokenizer.start_id], np.int32)
        else:
            full = (len(stream) - 1) // length
            self._append(name, document, tokenization.pack_stream(stream, length, full), length)
            self._rest = stream[full * length :]

    def _append(self, name: str, document: int, tokens_RS: tokenization.Tokens, lengths_R: Any) -> None:
        if len(tokens_RS):
            rows = np.empty(len(tokens_RS), self._dtype)
            rows["document"], rows["length"], rows["tokens"] = document, lengths_R, tokens_RS
            self._tapes.write(name, rows)


# --- shards ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards from tapes."""

    scratch: str
    uri: str
    tapes: Mapping[str, Sequence[Tape]]  # of each split, in the order of the documents
    data: TextData
    tokenizer: TextTokenizer
    seed: int

    def write(self, plan: ShardPlan) -> Shard:
        """One shard."""
        length, outputs, tapes = self.data.sequence_length, self.tokenizer.outputs, self.tapes[plan.split]
        first, stop = plan.first_sample, plan.first_sample + plan.rows
        if plan.split == "train":
            stream = read_tapes(self.scratch, tapes, token_dtype(outputs), first * length, stop * length + 1)
            order_R = permutation(self.seed, 0, SHARD_STREAM + plan.index, plan.rows)
            rows_RS = tokenization.pack_stream(stream, length, plan.rows)[order_R]
            columns = tokenization.token_columns(first, rows_RS, length, -1)
        else:
            rows_R = read_tapes(self.scratch, tapes, row_dtype(length, outputs), first, stop)
            columns = tokenization.token_columns(first, rows_R["tokens"], rows_R["length"], rows_R["document"])
        if self.data.apart:
            columns[START] = np.full(plan.rows, self.tokenizer.start_id, np.int32)
        schema, predictions = shard_schema(text_columns(length, outputs, self.data.apart)), int(columns["length"].sum())
        return write_shard(self.uri, plan.path, columns, schema, self.data.rows_per_group, predictions)
