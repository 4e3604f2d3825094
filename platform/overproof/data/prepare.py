"""The prepare stage: from a recipe's data to shards and their manifest. Text goes through Ray Data.

What ends in a shard is a function of the content, the recipe and its seed: documents are ordered and split by their
hashes, never by where or when they were read. No process holds a document that is a file, or the corpus: documents
go through in pieces, and Ray's object store moves to disk what does not fit. The largest thing one process holds is
the tokens of one shard, while it is written: more train shards are smaller ones. N documents.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray
from ray.data import DataContext, Dataset
from ray.data.context import ShuffleStrategy

from overproof.config import BpeTokenizer, NearDuplicates, TextData
from overproof.data import cleaning, tokenization
from overproof.data.document_blocks import (
    Candidates,
    DocumentIndex,
    bands_block,
    read_block,
    sample_block,
    text_columns,
    tokenise_block,
    write_planned_shard,
)
from overproof.data.documents import beginning_of
from overproof.data.heartbeat import Heartbeat
from overproof.data.manifest import (
    CLUSTER,
    DOCUMENTS,
    MANIFEST,
    SPLITS,
    TEST_TEXTS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Manifest,
    Shard,
    Split,
)
from overproof.data.near_duplicates import Decision, band_count, candidate_pairs, decide, no_pairs
from overproof.data.parquet_writer import parquet_bytes, write_file
from overproof.data.shard_layout import ShardLayout, plan_shards
from overproof.data.source_files import SourceFile, SourceReading, describe_skipped
from overproof.data.sources import Source, absolute_source, list_text_files
from overproof.data.text_tokenizer import ALTERED, TextTokenizer, read_tokenizer, tell_altered, trained
from overproof.errors import InputError
from overproof.registry import FORMATS, TASKS
from overproof.stage_context import Notice, StageContext
from overproof.units import format_count

BLOCK_BYTES = 32 << 20  # of text read by one task
DOCUMENTS_PER_GROUP = 1 << 16
SAMPLED_DOCUMENTS = 128  # of the test split, for engines to split
EXAMPLE_CHARACTERS = 80  # of a test document, for whoever tries a model
BANDS_BYTES = 128 << 20  # of MinHash bands that the driver holds at once, or two bands
PHASES = 4  # of the progress: reading, the tokenizer, tokenising, writing


def prepare(context: StageContext) -> dict[str, Any]:
    """Read, clean, split, tokenise, pack and write; returns counts.

    Raises:
        InputError: the source is missing or not what the recipe says, or too little text for its splits and shards.
    """
    manifest = TASKS[context.recipe.data.kind].prepare(context)
    write_file(context.draft.uri, MANIFEST, manifest.model_dump_json(indent=1).encode())
    if manifest.near_duplicates and manifest.near_duplicates.documents:
        context.progress(Notice(manifest.near_duplicates.summary))
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in manifest.dropped.items() if count)
    if left_out:
        kept = sum(split.documents for split in manifest.splits.values())
        context.progress(Notice(f"kept {format_count(kept, TASKS[manifest.task].test_unit)}; left out: {left_out}"))
    return _metrics(manifest)


def _data_context() -> DataContext:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet = DataContext.get_current().copy()
    quiet.enable_progress_bars = False
    quiet.print_on_execution_start = False
    # Measured on six shards and two cores: about 1 s, where the default strategy takes 7.
    quiet.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    return quiet


def _metrics(manifest: Manifest) -> dict[str, Any]:
    splits = manifest.splits.values()
    return {
        "documents": sum(split.documents for split in splits),
        "dropped": manifest.dropped,
        "skipped": manifest.skipped,
        "altered": manifest.altered,
        "rows": {name: split.rows for name, split in manifest.splits.items()},
        "predictions": {name: split.predictions for name, split in manifest.splits.items()},
        "size_bytes": sum(shard.size_bytes for split in splits for shard in split.shards),
        "outputs": manifest.outputs,
    }


def prepare_documents(context: StageContext, data: TextData) -> Manifest:
    """Text of any source as packed rows of tokens: the data of every task that reads documents.

    Raises:
        InputError: as ``prepare``.
    """
    with DataContext.current(_data_context()):
        return _prepare_documents(context, data)


def _prepare_documents(context: StageContext, data: TextData) -> Manifest:
    with Heartbeat(context.progress, "prepare", PHASES) as heartbeat:
        heartbeat.start_phase(0, "listing files")
        reading = SourceReading(list_text_files(data), data.on_error)
        files = reading.listing.files
        size_mb = sum(file.size_bytes for file in files) / 1e6
        heartbeat.start_phase(0, f"reading {format_count(len(files), 'file')}, {size_mb:,.1f} MB")
        pieces = _read(absolute_source(data.source), files, data.near_duplicates)
        documents = _select(pieces, data, reading)
        for line in (*describe_skipped(reading.skipped), *documents.left_out):
            context.progress(Notice(line))
        splits_N = cleaning.split_of(documents.hashes_N, data.validation_fraction, data.test_fraction)
        heartbeat.start_phase(0, f"near-copies, among {len(splits_N):,} documents")
        decision: Decision | None = None
        if data.near_duplicates:
            decision = _near_duplicates(pieces, documents, splits_N, data.near_duplicates)
            copies = np.delete(documents.names_N, decision.kept).tolist()
            if copies:
                context.progress(Notice(cleaning.list_left_out("near-copies of held-out documents", copies)))
            documents, splits_N = documents.take(decision.kept, decision.dropped), splits_N[decision.kept]
        index = DocumentIndex.of(documents.names_N)
        heartbeat.start_phase(1, f"tokenizer, from {format_count(int(np.sum(splits_N == 'train')), 'document')}")
        tokenizer = _tokenizer(pieces, index, splits_N, data, heartbeat)
        FORMATS[context.recipe.compress.kind].check_tokenizer(tokenizer.json, "data.tokenizer")
        heartbeat.start_phase(2, f"tokenising {len(splits_N)} documents, {documents.sizes_N.sum() / 1e6:,.1f} MB")
        tokens = _map_blocks(pieces, partial(tokenise_block, index=index, tokenizer=tokenizer))
        layout, altered_N = _plan(tokens, splits_N, data, len(tokenizer.boundary))
        for line in tell_altered(documents.names_N.tolist(), altered_N.tolist(), "documents"):
            context.progress(Notice(line))
        heartbeat.start_phase(3, f"packing and writing {format_count(len(layout.shards), 'shard')}")
        shards = _write(tokens, layout, data, tokenizer, context.recipe.seed, context.draft.uri)
        write_file(context.draft.uri, TOKENIZER, tokenizer.json.encode())
        write_file(context.draft.uri, TOKENIZER_CONFIG, tokenizer.config().encode())
        write_file(context.draft.uri, DOCUMENTS, _documents_file(documents, splits_N, decision))
        test_texts = _test_texts(pieces, index, splits_N)
        write_file(context.draft.uri, TEST_TEXTS, parquet_bytes(test_texts, SAMPLED_DOCUMENTS))
        heartbeat.start_phase(PHASES, "")
    return Manifest(
        task=data.kind,
        columns=text_columns(data.sequence_length, tokenizer.outputs, data.apart),
        splits={name: _split(name, layout, shards, int(np.sum(splits_N == name))) for name in SPLITS},
        rows_per_group=data.rows_per_group,
        positions=data.sequence_length,
        outputs=tokenizer.outputs,
        tokenizer_sha256=hashlib.sha256(tokenizer.json.encode()).hexdigest(),
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        bos_id=tokenizer.bos_id,
        dropped=documents.dropped,
        skipped=reading.counts,
        altered=int(np.sum(altered_N == ALTERED)),
        near_duplicates=decision and decision.found,
        details={"example": beginning_of(test_texts["text"][0].as_py(), EXAMPLE_CHARACTERS)},
    )


def _split(name: str, layout: ShardLayout, shards: Sequence[Shard], documents: int) -> Split:
    own = tuple(shard for plan, shard in zip(layout.shards, shards, strict=True) if plan.split == name)
    return Split(
        shards=own, rows=sum(s.rows for s in own), predictions=sum(s.predictions for s in own), documents=documents
    )


# --- reading and cleaning -------------------------------------------------------------------------


def _read(source: Source, files: Sequence[SourceFile], near_duplicates: NearDuplicates | None) -> Dataset:
    """Every document of the source in pieces, read in blocks of about ``BLOCK_BYTES`` of whole files."""
    total = sum(file.size_bytes for file in files)
    readers = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    blocks = min(len(files), max(readers, -(-total // BLOCK_BYTES)))
    sizes = np.array([file.size_bytes for file in files])
    block_of = np.minimum((np.cumsum(sizes) - sizes) * blocks // max(total, 1), blocks - 1)
    names = np.array([file.name for file in files], dtype=object)
    items = [{"files": own.tolist()} for own in np.split(names, np.flatnonzero(np.diff(block_of)) + 1)]
    read = partial(read_block, source=source, near_duplicates=near_duplicates)
    return _map_blocks(ray.data.from_items(items, override_num_blocks=len(items)), read)


def _map_blocks(dataset: Dataset, function: Callable[[pa.Table], Any]) -> Dataset:
    mapped: Dataset = dataset.map_batches(function, batch_size=None, batch_format="pyarrow").materialize()
    return mapped


def _collect(dataset: Dataset, columns: Sequence[str]) -> pa.Table:
    """Small columns of a dataset, at the driver."""
    return pa.concat_tables(ray.get(dataset.select_columns(list(columns)).to_arrow_refs()))


def _select(pieces: Dataset, data: TextData, reading: SourceReading) -> cleaning.SelectedDocuments:
    facts = _collect(pieces, ("name", "sha256", "size_bytes", "fault", "nul_lines", "file", "error", "reason"))
    failed = facts.filter(pc.is_valid(facts["error"])).sort_by("name")
    if len(failed) and (data.on_error == "fail" or len(failed) == len(reading.listing.files)):
        raise InputError(failed["error"][0].as_py())
    for file, reason in zip(failed["file"].to_pylist(), failed["reason"].to_pylist(), strict=True):
        reading.skipped.setdefault(reason, []).append(file)
    readable = pc.invert(pc.is_in(facts["file"], value_set=pc.unique(failed["file"])))
    whole = facts.filter(pc.and_(pc.is_valid(facts["sha256"]), readable))
    documents = cleaning.select_documents(
        *(whole[column].to_pylist() for column in ("name", "sha256", "size_bytes", "fault", "nul_lines"))
    )
    if len(documents.hashes_N) < len(SPLITS):
        dropped = ", ".join(f"{count} {reason}" for reason, count in documents.dropped.items())
        raise InputError(
            f"data.source ({data.source.kind}): {len(documents.hashes_N)} documents are left ({dropped}); expected at "
            f"least {len(SPLITS)}, one for each of the splits {', '.join(SPLITS)}: give more documents"
        )
    return documents


def _near_duplicates(
    pieces: Dataset, documents: cleaning.SelectedDocuments, splits_N: NDArray[np.str_], settings: NearDuplicates
) -> Decision:
    index, pairs = DocumentIndex.of(documents.names_N), no_pairs()
    bands, at_once = band_count(settings), max(2, BANDS_BYTES // (8 * len(splits_N)))
    for first in range(0, bands, at_once):
        last = min(first + at_once, bands)
        numbered = _map_blocks(pieces, partial(bands_block, index=index, first=first, last=last))
        table = _collect(numbered, ("document", *(f"band{number}" for number in range(first, last))))
        found = table.sort_by("document").drop("document")
        pairs = candidate_pairs([column.to_numpy() for column in found.itercolumns()], splits_N, pairs)
    if not len(pairs):
        return decide(pairs, splits_N, documents.sizes_N, settings)
    candidates = Candidates.of(pairs, documents.sizes_N, settings)
    hashed = _map_blocks(pieces, partial(candidates.shingle_block, index=index))
    checked = hashed.groupby("bucket").map_groups(candidates.check_bucket, batch_format="pyarrow")
    copies = np.stack([column.to_numpy() for column in _collect(checked, ("own", "other")).itercolumns()], axis=1)
    return decide(copies, splits_N, documents.sizes_N, settings)


# --- tokens ---------------------------------------------------------------------------------------


def _tokenizer(
    pieces: Dataset, index: DocumentIndex, splits_N: NDArray[np.str_], data: TextData, heartbeat: Heartbeat
) -> TextTokenizer:
    if not isinstance(data.tokenizer, BpeTokenizer):
        return read_tokenizer(data.tokenizer)

    def train_texts() -> Iterator[str]:
        counted_bytes = 0
        for block in pieces.iter_batches(batch_size=None, batch_format="pyarrow"):
            kept, documents = index.select(block)
            for content in kept["content"].filter(pa.array(splits_N[documents] == "train")):
                text = content.as_py().decode()
                yield text
                counted_bytes += len(content.as_buffer())
                heartbeat.update_note(f"tokenizer, words of {counted_bytes / 1e6:,.1f} MB counted")
        heartbeat.update_note(f"tokenizer, merging pairs of {counted_bytes / 1e6:,.1f} MB")

    return trained(tokenization.train_bpe(train_texts(), data.tokenizer.vocab_size).to_str())


def _plan(
    tokens: Dataset, splits_N: NDArray[np.str_], data: TextData, boundary: int
) -> tuple[ShardLayout, NDArray[np.int64]]:
    """The layout, and how each document comes back by its tokens."""
    counts = _collect(tokens, ("document", "piece", "tokens_count", "altered"))
    documents_P, pieces_P, tokens_P, altered_P = (column.to_numpy() for column in counts.itercolumns())
    altered_N = np.zeros(len(splits_N), np.int64)
    np.maximum.at(altered_N, documents_P, altered_P)
    return plan_shards(documents_P, pieces_P, tokens_P, splits_N, data, boundary), altered_N


# --- writing --------------------------------------------------------------------------------------


def _write(
    tokens: Dataset, layout: ShardLayout, data: TextData, tokenizer: TextTokenizer, seed: int, uri: str
) -> list[Shard]:
    write = partial(write_planned_shard, shards=layout.shards, data=data, tokenizer=tokenizer, seed=seed, uri=uri)
    cut = tokens.map_batches(layout.cut, batch_size=None, batch_format="pyarrow")
    written = _collect(cut.groupby("shard").map_groups(write, batch_format="pyarrow"), ("shard", "entry"))
    entries = dict(zip(written["shard"].to_pylist(), written["entry"].to_pylist(), strict=True))
    return [Shard.model_validate_json(entries[i]) for i in range(len(layout.shards))]


def _test_texts(pieces: Dataset, index: DocumentIndex, splits_N: NDArray[np.str_]) -> pa.Table:
    """The beginnings of test documents, evenly spread, that engines are asked to split."""
    tested = np.flatnonzero(splits_N == "test")
    chosen = tested[np.unique(np.linspace(0, len(tested) - 1, SAMPLED_DOCUMENTS).astype(np.int64))]
    found = _collect(_map_blocks(pieces, partial(sample_block, index=index, chosen=chosen)), ("document", "text"))
    return found.sort_by("document")


def _documents_file(
    documents: cleaning.SelectedDocuments, splits_N: NDArray[np.str_], decision: Decision | None
) -> bytes:
    table = pa.table(
        {
            "document": pa.array(np.arange(len(splits_N)), pa.int32()),
            "split": pa.array(splits_N.tolist(), pa.string()),
            "name": pa.array(documents.names_N.tolist(), pa.string()),
            "sha256": pa.array(documents.hashes_N.tolist(), pa.string()),
            "size_bytes": pa.array(documents.sizes_N, pa.int64()),
            **({CLUSTER: pa.array(decision.kept_clusters, pa.int32())} if decision else {}),
        }
    )
    return parquet_bytes(table, DOCUMENTS_PER_GROUP)
