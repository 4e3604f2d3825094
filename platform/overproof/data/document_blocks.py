"""What one Ray Data task does with one block of documents. No Ray here: blocks in, blocks out.

Documents come in pieces (``documents.iter_pieces``), one row each. N documents, R rows, S = T + 1 tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tokenizers import Tokenizer

from overproof.config import NearDuplicates, TextData
from overproof.data import tokenization
from overproof.data.cleaning import EMPTY, NUL_LINES, DocumentCheck
from overproof.data.columns import token_dtype
from overproof.data.documents import NulLines, iter_documents, iter_pieces
from overproof.data.manifest import START, Column, shard_schema
from overproof.data.near_duplicates import MinHash, Pairs, are_copies, shingles
from overproof.data.order import permutation
from overproof.data.parquet_writer import write_shard
from overproof.data.shard_layout import ShardPlan
from overproof.data.source_files import reason_of
from overproof.data.sources import Source
from overproof.data.text_tokenizer import SAME, TextTokenizer, how_it_comes_back
from overproof.data.tokenizer_json import continuing, special_names_as_text
from overproof.errors import InputError

TABLE_BYTES = 8 << 20  # of text handed on at once
BUCKET_BYTES = 64 << 20  # of text whose runs of words one task holds at once, or those of one pair
SAMPLED_BYTES = 4096  # of each document of the sample
SHARD_STREAM = 1 << 32  # sets the permutation inside a shard apart from those of `Order`

PIECE_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("piece", pa.int32()),
        ("content", pa.large_binary()),
        # Of the whole document, and so in the row of its last piece alone:
        ("sha256", pa.string()),
        ("size_bytes", pa.int64()),
        ("fault", pa.string()),
        ("nul_lines", pa.int64()),
        ("file", pa.string()),
        ("bands", pa.list_(pa.uint64())),  # of its MinHash; null where near-copies are not looked for
        # Of a file that cannot be read, in a row of its own:
        ("error", pa.string()),
        ("reason", pa.string()),
    ]
)


def read_block(block: pa.Table, source: Source, near_duplicates: NearDuplicates | None = None) -> Iterator[pa.Table]:
    """The documents of the files that a block lists: their pieces and what the rules say of each document alone.

    A file that is not what the recipe says becomes a row with its ``error``: raised here, it would reach the
    driver as a traceback.
    """
    rows: list[dict[str, Any]] = []
    held_bytes = 0
    for file in chain.from_iterable(block["files"].to_pylist()):
        try:
            for name, content in iter_documents(source, file):
                check, lines = DocumentCheck(), NulLines()
                sketch = near_duplicates and MinHash(near_duplicates)
                for number, piece in enumerate(iter_pieces(lines.dropped_from(content))):
                    if held_bytes >= TABLE_BYTES:
                        yield pa.Table.from_pylist(rows, PIECE_SCHEMA)
                        rows, held_bytes = [], 0
                    check.update(piece)
                    if sketch:
                        sketch.update(piece.decode(errors="ignore"))
                    rows.append({"name": name, "piece": number, "content": piece, "file": file})
                    held_bytes += len(piece)
                fault = check.finish()
                if fault == EMPTY and lines.count:
                    fault = NUL_LINES
                found = {"sha256": check.sha256, "size_bytes": check.size_bytes, "fault": fault}
                rows[-1] |= found | {"nul_lines": lines.count, "bands": sketch.bands() if sketch else None}
        except InputError as error:
            rows.append({"name": file, "file": file, "error": str(error), "reason": reason_of(error)})
    yield pa.Table.from_pylist(rows, PIECE_SCHEMA)


@dataclass(frozen=True)
class DocumentIndex:
    """The documents that are kept, by name."""

    names_N: NDArray[np.bytes_]  # ascending
    documents_N: NDArray[np.int64]

    @classmethod
    def of(cls, names_N: NDArray[Any]) -> Self:
        """From the name of document 0, 1 and so on."""
        names = _flat_strings(names_N.tolist())
        order = np.argsort(names, kind="stable")
        return cls(names[order], order)

    def select(self, block: pa.Table) -> tuple[pa.Table, NDArray[np.int64]]:
        """The rows of a block whose document is kept, and the number of that document."""
        names = _flat_strings(block["name"].to_pylist())
        place = np.minimum(np.searchsorted(self.names_N, names), len(self.names_N) - 1)
        kept = self.names_N[place] == names
        return block.filter(pa.array(kept)), self.documents_N[place[kept]]


def _flat_strings(values: Sequence[str]) -> NDArray[np.bytes_]:
    """Strings as one flat array, which tasks share without a copy."""
    return np.array([value.encode() for value in values], np.bytes_)


@lru_cache(maxsize=1)
def _tokenizers(tokenizer_json: str) -> tuple[Tokenizer, Tokenizer]:
    """Of the first piece of a document, and of its later ones."""
    first, later = (special_names_as_text(text) for text in (tokenizer_json, continuing(tokenizer_json)))
    return Tokenizer.from_str(first), Tokenizer.from_str(later)


def tokenise_block(block: pa.Table, index: DocumentIndex, tokenizer: TextTokenizer) -> Iterator[pa.Table]:
    """The kept documents of a block as tokens; the first piece of each begins with the boundary."""
    block, documents = index.select(block)
    sizes = np.array([len(content.as_buffer()) for content in block["content"]], np.int64)
    table_of = (np.cumsum(sizes) - sizes) // TABLE_BYTES
    for rows in np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(table_of)) + 1):
        texts = [content.as_py().decode() for content in block["content"].take(rows)]
        pieces = block["piece"].take(rows).to_numpy()
        tokens, altered = _tokenise(texts, pieces, tokenizer)
        yield pa.table(
            {
                "document": pa.array(documents[rows], pa.int32()),
                "piece": pa.array(pieces, pa.int32()),
                "tokens": pa.array(tokens, pa.large_list(pa.int32())),
                "tokens_count": pa.array([len(ids) for ids in tokens], pa.int64()),
                "altered": pa.array(altered, pa.int8()),
            }
        )


def _tokenise(
    texts: Sequence[str], pieces: NDArray[np.int32], tokenizer: TextTokenizer
) -> tuple[list[tokenization.Tokens], list[int]]:
    """The tokens of each piece, and how each comes back by them."""
    first, later = _tokenizers(tokenizer.json)
    tokens: list[tokenization.Tokens] = [np.zeros(0, np.int32)] * len(texts)
    altered = [SAME] * len(texts)
    places = range(len(texts))
    for chosen, own in (([i for i in places if not pieces[i]], first), ([i for i in places if pieces[i]], later)):
        encoded = tokenization.encode(own, [texts[i] for i in chosen])
        back = own.decode_batch([ids.tolist() for ids in encoded], skip_special_tokens=False)
        for place, ids, text in zip(chosen, encoded, back, strict=True):
            tokens[place] = ids if pieces[place] else np.insert(ids, 0, tokenizer.boundary)
            altered[place] = how_it_comes_back(texts[place], text)
    return tokens, altered


def sample_block(block: pa.Table, index: DocumentIndex, chosen: NDArray[np.int64]) -> pa.Table:
    """How the chosen documents of a block begin."""
    block, documents = index.select(block)
    rows = np.flatnonzero((block["piece"].to_numpy() == 0) & np.isin(documents, chosen))
    starts = [content.as_py()[:SAMPLED_BYTES] for content in block["content"].take(rows)]
    texts = [start.decode(errors="ignore") for start in starts]  # a character may be cut
    return pa.table({"document": pa.array(documents[rows], pa.int32()), "text": pa.array(texts, pa.string())})


# --- near-copies ----------------------------------------------------------------------------------


def bands_block(block: pa.Table, index: DocumentIndex, first: int, last: int) -> pa.Table:
    """Some bands of the MinHash of each document whose last piece is in a block."""
    block, documents = index.select(block.filter(pc.is_valid(block["bands"])))
    bands = np.stack(block["bands"].to_numpy()) if len(block) else np.zeros((0, last), np.uint64)
    columns = {f"band{number}": pa.array(bands[:, number]) for number in range(first, last)}
    return pa.table({"document": pa.array(documents, pa.int64()), **columns})


SHINGLE_SCHEMA = pa.schema([("bucket", pa.int64()), ("document", pa.int64()), ("shingles", pa.large_list(pa.uint64()))])


@dataclass(frozen=True)
class Candidates:
    """Pairs of documents to be held against each other, in buckets that one task holds each."""

    pairs: Pairs
    buckets_P: NDArray[np.int64]  # ascending
    words: int  # in a run
    threshold: float

    @classmethod
    def of(cls, pairs: Pairs, sizes_N: NDArray[np.int64], settings: NearDuplicates) -> Self:
        """In buckets of about ``BUCKET_BYTES`` of text; a held-out document's pairs are side by side."""
        pairs = pairs[np.argsort(pairs[:, 1], kind="stable")]
        begins = np.append(True, pairs[1:, 1] != pairs[:-1, 1])[: len(pairs)]
        sizes_P = sizes_N[pairs[:, 0]] + sizes_N[pairs[:, 1]] * begins
        buckets = np.cumsum(sizes_P) // BUCKET_BYTES
        return cls(pairs, buckets, settings.words, settings.threshold)

    def shingle_block(self, block: pa.Table, index: DocumentIndex) -> Iterator[pa.Table]:
        """The runs of words of the documents in a block that are in pairs, for each bucket that they are in."""
        block, documents = index.select(block)
        own, buckets = self._memberships()
        first, last = np.searchsorted(own, documents), np.searchsorted(own, documents, side="right")
        yield SHINGLE_SCHEMA.empty_table()
        for row in np.flatnonzero(last > first).tolist():
            hashes = np.unique(shingles(block["content"][row].as_py().decode(), self.words))
            of_row = buckets[first[row] : last[row]]
            columns = [of_row, np.full(len(of_row), documents[row]), [hashes] * len(of_row)]
            yield pa.table(dict(zip(SHINGLE_SCHEMA.names, columns, strict=True)), SHINGLE_SCHEMA)

    def _memberships(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each document of a pair, ascending, and a bucket that it is in."""
        both = np.stack([self.pairs.ravel(), np.repeat(self.buckets_P, 2)], axis=1)
        documents, buckets = np.unique(both, axis=0).T
        return documents, buckets

    def check_bucket(self, group: pa.Table) -> pa.Table:
        """The near-copies among the pairs of a bucket."""
        bucket = group["bucket"][0].as_py()
        pieces = dict[int, list[NDArray[np.uint64]]]()
        for document, hashes in zip(group["document"].to_pylist(), group["shingles"], strict=True):
            pieces.setdefault(document, []).append(hashes.values.to_numpy())
        sets = {document: np.unique(np.concatenate(own)) for document, own in pieces.items()}
        pairs = self.pairs[self.buckets_P == bucket]
        copies = pairs[are_copies(pairs, sets.__getitem__, self.threshold)]
        return pa.table({"own": pa.array(copies[:, 0]), "other": pa.array(copies[:, 1])})


# --- tokens ---------------------------------------------------------------------------------------


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


def write_planned_shard(
    group: pa.Table, shards: Sequence[ShardPlan], data: TextData, tokenizer: TextTokenizer, seed: int, uri: str
) -> pa.Table:
    """Pack and write one shard from its pieces of documents, whatever order they arrive in."""
    index = group["shard"][0].as_py()
    plan, length = shards[index], data.sequence_length
    group = group.sort_by([("document", "ascending"), ("piece", "ascending")])
    stream = np.concatenate([tokens.values.to_numpy() for tokens in group["tokens"]])
    if plan.split == "train":
        rows_RS = tokenization.pack_stream(stream, length, plan.rows)
        order_R = permutation(seed, 0, SHARD_STREAM + plan.index, plan.rows)
        columns = tokenization.token_columns(plan.first_sample, rows_RS[order_R], length, -1)
    else:
        firsts = np.flatnonzero(group["piece"].to_numpy() == 0)
        counts = pc.list_value_length(group["tokens"]).to_numpy()
        starts = (np.cumsum(counts) - counts)[firsts]
        ends, skipped = (tokenizer.start_id, tokenizer.end_id), len(tokenizer.boundary)
        packed = [tokenization.pack_document(ids[skipped:], length, *ends) for ids in np.split(stream, starts[1:])]
        owners_R = np.repeat(group["document"].to_numpy()[firsts], [len(rows_RS) for rows_RS, _ in packed])
        rows_RS, lengths_R = (np.concatenate(values) for values in zip(*packed, strict=True))
        columns = tokenization.token_columns(plan.first_sample, rows_RS, lengths_R, owners_R)
    if data.apart:
        columns[START] = np.full(len(columns["tokens"]), tokenizer.start_id, np.int32)
    schema = shard_schema(text_columns(length, tokenizer.outputs, data.apart))
    predictions = int(columns["length"].sum())
    shard = write_shard(uri, plan.path, columns, schema, data.rows_per_group, predictions)
    return pa.table({"shard": pa.array([index], pa.int32()), "entry": [shard.model_dump_json()]})
