"""The prepare stage: from a recipe's data to shards and their manifest. Text goes through Ray Data.

What ends in a shard is a function of the content, the recipe and its seed: documents are ordered and placed by
their hashes, never by where or when they were read. N documents, T predictions in a row.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import DataContext, Dataset
from ray.data.context import ShuffleStrategy
from tokenizers import Tokenizer

from overproof.config import BpeTokenizer, TextData
from overproof.data import cleaning, tokenization
from overproof.data.document_blocks import (
    ShardAssignment,
    ShardPlan,
    fixed_width_strings,
    read_block,
    text_columns,
    tokenise_block,
    write_planned_shard,
)
from overproof.data.manifest import DOCUMENTS, MANIFEST, SPLITS, TOKENIZER, Manifest, Shard, Split
from overproof.data.parquet_writer import parquet_bytes, write_file
from overproof.data.sources import Source, SourceFile, absolute_source, list_files, tokenizer_path
from overproof.errors import InputError
from overproof.registry import TASKS
from overproof.stage_context import StageContext, TaskProgress

BLOCK_BYTES = 32 << 20  # of text read by one task
DOCUMENTS_PER_GROUP = 1 << 16
FACTS = ("name", "sha256", "size_bytes", "fault", "error")


def prepare(context: StageContext) -> dict[str, Any]:
    """Read, clean, split, tokenise, pack and write; returns counts.

    Raises:
        InputError: the source is missing, empty or not what the recipe says, or it leaves a split or shard empty.
    """
    manifest = TASKS[context.recipe.data.kind].prepare(context)
    write_file(context.draft.uri, MANIFEST, manifest.model_dump_json(indent=1).encode())
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
    def say(done: int, note: str) -> None:
        context.progress(TaskProgress("prepare", done, 4, note))

    uri, seed = context.draft.uri, context.recipe.seed
    files = list_files(data.source)
    say(0, f"reading {len(files)} files")
    found = _read(absolute_source(data.source), files)
    kept = _clean(found, data)
    splits_N = cleaning.split_of(kept.hashes_N, data.validation_fraction, data.test_fraction)
    _insist_on_splits(splits_N, kept, data)
    placement = _place(kept, splits_N, data)
    say(1, f"tokenizer, from {np.sum(splits_N == 'train')} documents")
    tokenizer_json = _tokenizer(found, placement, data)
    say(2, f"tokenising {len(splits_N)} documents")
    encoded = _each_block(found, partial(tokenise_block, placement=placement, tokenizer_json=tokenizer_json))
    parts = _layout(_facts(encoded, ("part", "tokens_count")), data)
    say(3, f"writing {len(parts)} shards")
    vocab_size = Tokenizer.from_str(tokenizer_json).get_vocab_size()
    shards = _write(encoded, parts, data, vocab_size, seed, uri)
    write_file(uri, TOKENIZER, tokenizer_json.encode())
    write_file(uri, DOCUMENTS, _documents(kept, splits_N))
    say(4, "")
    return Manifest(
        task=data.kind,
        columns=text_columns(data.sequence_length, vocab_size),
        splits={name: _split(name, parts, shards, int(np.sum(splits_N == name))) for name in SPLITS},
        rows_per_group=data.rows_per_group,
        positions=data.sequence_length,
        outputs=vocab_size,
        tokenizer_sha256=hashlib.sha256(tokenizer_json.encode()).hexdigest(),
        dropped=kept.dropped,
    )


def _split(name: str, parts: Sequence[ShardPlan], shards: Sequence[Shard], documents: int) -> Split:
    own = tuple(shard for part, shard in zip(parts, shards, strict=True) if part.split == name)
    return Split(
        shards=own, rows=sum(s.rows for s in own), predictions=sum(s.predictions for s in own), documents=documents
    )


# --- reading and cleaning -------------------------------------------------------------------------


def _read(source: Source, files: Sequence[SourceFile]) -> Dataset:
    """Every document of the source with its facts, in blocks of about ``BLOCK_BYTES``."""
    total = sum(file.size_bytes for file in files)
    readers = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    blocks = min(len(files), max(readers, -(-total // BLOCK_BYTES)))
    sizes = np.array([file.size_bytes for file in files])
    block_of = np.minimum((np.cumsum(sizes) - sizes) * blocks // max(total, 1), blocks - 1)
    names = np.array([file.name for file in files], dtype=object)
    items = [{"files": own.tolist()} for own in np.split(names, np.flatnonzero(np.diff(block_of)) + 1)]
    return _each_block(ray.data.from_items(items, override_num_blocks=len(items)), partial(read_block, source=source))


def _each_block(dataset: Dataset, function: Callable[[pa.Table], Any]) -> Dataset:
    done: Dataset = dataset.map_batches(function, batch_size=None, batch_format="pyarrow").materialize()
    return done


def _facts(dataset: Dataset, columns: Sequence[str]) -> pa.Table:
    """The small columns of a dataset, at the driver."""
    return pa.concat_tables(ray.get(dataset.select_columns(list(columns)).to_arrow_refs()))


def _clean(found: Dataset, data: TextData) -> cleaning.KeptDocuments:
    facts = _facts(found, FACTS)
    errors = sorted((n, e) for n, e in zip(*(facts[c].to_pylist() for c in ("name", "error")), strict=True) if e)
    if errors:
        raise InputError(errors[0][1])
    kept = cleaning.select_documents(
        *(facts[column].to_pylist() for column in ("name", "sha256", "size_bytes", "fault"))
    )
    if not len(kept.hashes_N):
        why = ", ".join(f"{count} {reason}" for reason, count in kept.dropped.items())
        raise InputError(f"data.source ({data.source.kind}): no document is left ({why}); expected some text")
    return kept


def _insist_on_splits(splits_N: NDArray[np.str_], kept: cleaning.KeptDocuments, data: TextData) -> None:
    counts = {name: int(np.sum(splits_N == name)) for name in SPLITS}
    for name, count in counts.items():
        if not count:
            raise InputError(
                f"data.source ({data.source.kind}): {len(kept.hashes_N)} documents leave no {name} split "
                f"({', '.join(f'{n} {c}' for n, c in counts.items())}); expected at least one document in each: "
                "give more documents, or set data.validation_fraction and data.test_fraction"
            )


def _place(kept: cleaning.KeptDocuments, splits_N: NDArray[np.str_], data: TextData) -> ShardAssignment:
    shards_N = cleaning.shard_of(kept.hashes_N, data.shards)
    parts_N = np.where(splits_N == "train", shards_N, data.shards + (splits_N == "test"))
    return ShardAssignment(
        fixed_width_strings(kept.hashes_N), fixed_width_strings(kept.names_N), parts_N.astype(np.int32), data.shards
    )


# --- tokens ---------------------------------------------------------------------------------------


def _tokenizer(found: Dataset, placement: ShardAssignment, data: TextData) -> str:
    if not isinstance(data.tokenizer, BpeTokenizer):
        return tokenization.read_tokenizer(tokenizer_path(data.tokenizer))

    def train_texts() -> Iterator[str]:
        for block in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            own, documents = placement.find(block)
            train = pa.array(placement.parts_N[documents] < placement.shards)
            for content in own["content"].filter(train):
                yield content.as_py().decode()

    return tokenization.train_bpe(train_texts(), data.tokenizer.vocab_size).to_str()


def _layout(counts: pa.Table, data: TextData) -> list[ShardPlan]:
    """Where every row goes, from the token counts alone.

    Raises:
        InputError: a train shard does not fill one row group.
    """
    part_N, tokens_N = (counts[column].to_numpy() for column in ("part", "tokens_count"))
    parts, first = [], 0
    for shard in range(data.shards):
        own = tokens_N[part_N == shard]
        rows = tokenization.train_rows(int(own.sum()), len(own), data.sequence_length, data.rows_per_group)
        if not rows:
            raise InputError(
                f"train shard {shard} has {own.sum()} tokens in {len(own)} documents; expected enough for one row "
                f"group, {data.rows_per_group} rows of {data.sequence_length}: lower data.shards ({data.shards}), "
                "data.rows_per_group or data.sequence_length, or give more text"
            )
        parts.append(ShardPlan("train", shard, first, rows))
        first += rows
    for held_out, split in enumerate(SPLITS[1:]):
        own = tokens_N[part_N == data.shards + held_out]
        parts.append(ShardPlan(split, 0, 0, sum(tokenization.document_rows(int(n), data.sequence_length) for n in own)))
    return parts


# --- writing --------------------------------------------------------------------------------------


def _write(
    encoded: Dataset, parts: Sequence[ShardPlan], data: TextData, vocab_size: int, seed: int, uri: str
) -> list[Shard]:
    write = partial(write_planned_shard, parts=parts, data=data, vocab_size=vocab_size, seed=seed, uri=uri)
    groups = encoded.groupby("part")
    written = pa.concat_tables(ray.get(groups.map_groups(write, batch_format="pyarrow").to_arrow_refs()))
    shards = dict(zip(written["part"].to_pylist(), written["shard"].to_pylist(), strict=True))
    return [Shard.model_validate_json(shards[i]) for i in range(len(parts))]


def _documents(kept: cleaning.KeptDocuments, splits_N: NDArray[np.str_]) -> bytes:
    table = pa.table(
        {
            "document": pa.array(np.arange(len(kept.hashes_N)), pa.int32()),
            "split": pa.array(splits_N.tolist(), pa.string()),
            "name": pa.array(kept.names_N.tolist(), pa.string()),
            "sha256": pa.array(kept.hashes_N.tolist(), pa.string()),
            "size_bytes": pa.array(kept.sizes_N, pa.int64()),
        }
    )
    return parquet_bytes(table, DOCUMENTS_PER_GROUP)
