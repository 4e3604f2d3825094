"""The prepare stage: from a recipe's data to shards and their manifest. Text goes through tasks of the cluster.

What ends in a shard is a function of the content, the recipe and its seed: documents are ordered and split by their
hashes, never by where or when they were read. A task holds a part of the text, or a shard, and never a document that is
a file and long; this process holds a few numbers for each part. What tasks hand to each other lies in the store.

Ray Data's hash shuffle would bring the documents to parts as well: on two cores it took three to seven times as long
and three times the CPU seconds, with the parts in the memory of its actors or in the object store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from overproof.config import BpeTokenizer, NearDuplicates, TextData
from overproof.data.altered_texts import ALTERED, join_altered, tell_altered
from overproof.data.cleaning import SHOWN_NAMES, Borders, LeftOut, list_left_out
from overproof.data.document_parts import (
    Merger,
    PartCounts,
    Parts,
    Reader,
    Reading,
    count_parts,
    plan_spans,
    write_documents_file,
)
from overproof.data.documents import FileSpan, beginning_of, count_lines
from overproof.data.heartbeat import Heartbeat
from overproof.data.manifest import (
    DOCUMENTS,
    MANIFEST,
    SPLITS,
    TEST_TEXTS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Manifest,
    NearDuplicatesFound,
    Shard,
    Split,
)
from overproof.data.minhash import band_count
from overproof.data.near_duplicate_parts import Candidates, Checker, Finder, Hasher
from overproof.data.near_duplicates import Resolved, dropped_copies, require_train_documents
from overproof.data.parquet_writer import parquet_bytes
from overproof.data.part_files import Tape
from overproof.data.shard_layout import ShardPlan, plan_held_out_shards, plan_train_shards
from overproof.data.source_files import SourceReading, describe_skipped
from overproof.data.sources import Source, absolute_source, list_text_files
from overproof.data.text_tokenizer import TextTokenizer, read_tokenizer
from overproof.data.token_parts import ShardWriter, TokenisedPart, Tokeniser, row_dtype, text_columns, train_tokenizer
from overproof.errors import InputError
from overproof.files import filesystem, join_uri
from overproof.ray_tasks import run_tasks
from overproof.registry import FORMATS, TASKS
from overproof.stage_context import Notice, StageContext
from overproof.units import format_count

SCRATCH = "scratch"  # folder of the draft, for what tasks hand to each other
SAMPLED_DOCUMENTS = 128  # of the test split, for engines to split
EXAMPLE_CHARACTERS = 80  # of a test document, for whoever tries a model
PHASES = 4  # of the progress: reading, the tokenizer, tokenising, writing
AT_ONCE = 1024  # tasks that are asked for: more than there are CPUs, so that a cluster may add some

T = TypeVar("T")


def prepare(context: StageContext) -> dict[str, Any]:
    """Read, clean, split, tokenise, pack and write; returns counts.

    Raises:
        InputError: the source is missing or not what the recipe says, or too little text for its splits and shards.
    """
    manifest = TASKS[context.recipe.data.kind].prepare(context)
    context.draft.hand_in(manifest.shard_entries)
    context.draft.write(MANIFEST, manifest.model_dump_json(indent=1).encode())
    if manifest.near_duplicates and manifest.near_duplicates.documents:
        context.progress(Notice(manifest.near_duplicates.summary))
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in manifest.dropped.items() if count)
    if left_out:
        kept = sum(split.documents for split in manifest.splits.values())
        context.progress(Notice(f"kept {format_count(kept, TASKS[manifest.task].test_unit)}; left out: {left_out}"))
    return _metrics(manifest)


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
    scratch = join_uri(context.draft.uri, SCRATCH)
    files, path = filesystem(scratch)
    files.create_dir(path, recursive=True)
    try:
        with Heartbeat(context.progress, "prepare", PHASES) as heartbeat:
            return _prepare_documents(context, data, scratch, heartbeat)
    finally:
        files.delete_dir(path)


def _prepare_documents(context: StageContext, data: TextData, scratch: str, heartbeat: Heartbeat) -> Manifest:
    def tell(lines: Iterable[str]) -> None:
        for line in lines:
            context.progress(Notice(line))

    tasks, draft = _Tasks(heartbeat), context.draft
    tasks.start_phase(0, "listing files")
    reading = SourceReading(list_text_files(data), data.on_error)
    size_mb = sum(file.size_bytes for file in reading.listing.files) / 1e6
    tasks.start_phase(0, f"reading {format_count(len(reading.listing.files), 'file')}, {size_mb:,.1f} MB")
    parts, left_out, runs = _read(data, scratch, reading, tasks)
    tell([*describe_skipped(reading.skipped), *left_out.lines])
    tasks.start_phase(0, f"near-copies, among {parts.counts.sum():,} documents")
    copies, resolved = None, None
    if data.near_duplicates:
        copies, resolved = _near_duplicates(parts, runs, data.near_duplicates, tasks)
        parts = replace(parts, left_out=resolved.left_out)
    documents = {split: parts.documents(split) for split in SPLITS}
    tasks.start_phase(1, f"tokenizer, from {format_count(documents['train'], 'document')}")
    tokenizer = _tokenizer(parts, data, tasks)
    FORMATS[context.recipe.compress.kind].check_tokenizer(tokenizer.json, "data.tokenizer")
    tasks.start_phase(2, f"tokenising {sum(documents.values())} documents")
    sampled = np.unique(np.linspace(0, documents["test"] - 1, SAMPLED_DOCUMENTS).astype(np.int64))
    tokeniser = Tokeniser(parts, tokenizer, data.sequence_length, sampled)
    tokenised = tasks.run(tokeniser.tokenise, [(part,) for part in parts])
    altered = join_altered(each.altered for each in tokenised)
    tell(
        [
            *_describe_copies(tokenised, len(parts.left_out)),
            *tell_altered(altered, sum(documents.values()), "documents"),
        ]
    )
    plans, tapes = _plan(tokenised, documents["train"], data, tokenizer)
    tasks.start_phase(3, f"packing and writing {format_count(len(plans), 'shard')}")
    writer = ShardWriter(scratch, draft.uri, tapes, data, tokenizer, context.recipe.seed)
    shards = tasks.run(writer.write, [(plan,) for plan in plans])
    (documents_entry,) = tasks.run(write_documents_file, [(parts, resolved, draft.uri)])
    draft.hand_in({DOCUMENTS: documents_entry})
    draft.write(TOKENIZER, tokenizer.json.encode())
    draft.write(TOKENIZER_CONFIG, tokenizer.config().encode())
    texts = dict(sorted(chain.from_iterable(each.sampled.items() for each in tokenised)))
    draft.write(TEST_TEXTS, parquet_bytes(_texts_table(texts), SAMPLED_DOCUMENTS))
    tasks.start_phase(PHASES, "")
    return Manifest(
        task=data.kind,
        columns=text_columns(data.sequence_length, tokenizer.outputs, data.apart),
        splits={name: _split(name, plans, shards, documents[name]) for name in SPLITS},
        rows_per_group=data.rows_per_group,
        positions=data.sequence_length,
        outputs=tokenizer.outputs,
        tokenizer_sha256=hashlib.sha256(tokenizer.json.encode()).hexdigest(),
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        bos_id=tokenizer.bos_id,
        dropped=left_out.dropped | dropped_copies(len(parts.left_out)),
        skipped=reading.counts,
        altered=altered.get(ALTERED, (0, ""))[0],
        near_duplicates=_found(copies, resolved, tokenised, parts, data.near_duplicates),
        details={"example": beginning_of(next(iter(texts.values())), EXAMPLE_CHARACTERS)},
    )


def _split(name: str, plans: Sequence[ShardPlan], shards: Sequence[Shard], documents: int) -> Split:
    own = tuple(shard for plan, shard in zip(plans, shards, strict=True) if plan.split == name)
    return Split(
        shards=own, rows=sum(s.rows for s in own), predictions=sum(s.predictions for s in own), documents=documents
    )


def _texts_table(texts: dict[int, str]) -> pa.Table:
    """The beginnings of test documents, evenly spread, that engines are asked to split."""
    return pa.table({"document": pa.array(texts.keys(), pa.int32()), "text": pa.array(texts.values(), pa.string())})


# --- tasks ----------------------------------------------------------------------------------------


@dataclass
class _Tasks:
    """Runs the tasks of a phase, each on one CPU of the cluster, and tells how many are done."""

    heartbeat: Heartbeat
    note: str = ""

    def start_phase(self, done: int, note: str) -> None:
        self.note = note
        self.heartbeat.start_phase(done, note)

    def run(self, function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
        """``function(*call)`` for each call, in their order; raises as ``run_tasks``."""

        def tell(done: int, _: str) -> None:
            if len(calls) > 1:
                self.heartbeat.update_note(f"{self.note}, {done:,} of {len(calls):,} tasks done")

        named = {str(number): call for number, call in enumerate(calls)}
        return list(run_tasks(function, named, tell, AT_ONCE).values())


# --- reading and cleaning -------------------------------------------------------------------------


def _read(data: TextData, scratch: str, reading: SourceReading, tasks: _Tasks) -> tuple[Parts, LeftOut, list[str]]:
    """The documents of the source, in parts; those that are not used; and the runs of bands."""
    source, files = absolute_source(data.source), reading.listing.files
    count = count_parts(files, source)
    spans = _number_lines(plan_spans(files, source, count), source, tasks)
    reader = Reader(scratch, source, data.near_duplicates, count)
    found = tasks.run(reader.read, list(enumerate(spans)))
    failed, left_out = _failed(found, data, reading), LeftOut()
    for file, each in chain.from_iterable(each.left_out.items() for each in found):
        if file not in failed:
            left_out.merge(each)
    merger = Merger(
        scratch,
        list(chain.from_iterable(each.runs for each in found)),
        sorted(failed),
        data.test_fraction,
        data.validation_fraction,
        band_count(data.near_duplicates) if data.near_duplicates else 0,
    )
    counts = tasks.run(merger.merge, [(number, count) for number in range(count)])
    for part in counts:
        left_out.merge(part.duplicates)
    _delete(scratch, merger.runs)
    runs = list(chain.from_iterable(part.runs for part in counts))
    return (
        Parts(scratch, source, np.array([part.documents for part in counts]), _borders(counts, left_out, data)),
        left_out,
        runs,
    )


def _number_lines(planned: list[list[FileSpan]], source: Source, tasks: _Tasks) -> list[list[FileSpan]]:
    """Lines are named by their numbers: those before a part of a file are counted."""
    if source.kind != "jsonl":
        return planned
    split = [span for (span, *_) in planned if span.of > 1]
    lines = tasks.run(count_lines, [(source, span) for span in split])
    before, numbered = 0, dict[FileSpan, FileSpan]()
    for span, count in zip(split, lines, strict=True):
        before = before if span.number else 0
        numbered[span] = replace(span, lines_before=before)
        before += count
    return [[numbered.get(span, span) for span in spans] for spans in planned]


def _failed(found: Sequence[Reading], data: TextData, reading: SourceReading) -> set[str]:
    """The files that cannot be read, which are counted.

    Raises:
        InputError: there are some, and they are not to be skipped, or all are.
    """
    failed = dict[str, tuple[str, str]]()
    for file, why in chain.from_iterable(each.failed.items() for each in found):
        failed.setdefault(file, why)
    if failed and (data.on_error == "fail" or len(failed) == len(reading.listing.files)):
        raise InputError(failed[min(failed)][0])
    for file, (_, reason) in sorted(failed.items()):
        reading.skipped.setdefault(reason, []).append(file)
    return set(failed)


def _borders(counts: Sequence[PartCounts], left_out: LeftOut, data: TextData) -> Borders:
    documents = sum(part.documents for part in counts)
    if documents < len(SPLITS):
        dropped = ", ".join(f"{count} {reason}" for reason, count in left_out.dropped.items())
        raise InputError(
            f"data.source ({data.source.kind}): {documents} documents are left ({dropped}); expected at "
            f"least {len(SPLITS)}, one for each of the splits {', '.join(SPLITS)}: give more documents"
        )
    below = (sum(part.below_test for part in counts), sum(part.below_held_out for part in counts))
    return Borders.of(documents, *below)


def _delete(scratch: str, names: Iterable[str]) -> None:
    """Files that nobody reads again: at the most, the text lies there twice."""
    files, root = filesystem(scratch)
    for name in names:
        files.delete_file(f"{root}/{name}")


# --- near-copies ----------------------------------------------------------------------------------


def _near_duplicates(
    parts: Parts, runs: Sequence[str], settings: NearDuplicates, tasks: _Tasks
) -> tuple[Candidates, Resolved]:
    """The near-copies, and what follows from them.

    Raises:
        InputError: no train document is left.
    """
    finder = Finder(parts, runs, settings)
    found = Candidates.joined(tasks.run(finder.find, [(number,) for number in range(len(parts.counts))]))
    found, buckets_P = found.bucketed()
    both = np.stack([found.pairs.ravel(), np.repeat(buckets_P, 2)], axis=1)
    documents, buckets = np.unique(both, axis=0).T
    hasher, calls = Hasher(parts, settings.words, int(buckets_P.max(initial=-1)) + 1), []
    for part in parts:
        own = slice(*np.searchsorted(documents, [part.first, part.first + part.count]))
        if len(documents[own]):
            calls.append((part, documents[own], buckets[own]))
    shingles = tuple(chain.from_iterable(tasks.run(hasher.hash, calls)))
    checker = Checker(parts.uri, shingles, settings.threshold)
    by_bucket = [(bucket, found.pairs[buckets_P == bucket]) for bucket in range(hasher.buckets)]
    checked = tasks.run(checker.check, by_bucket)
    copies = found.take(np.concatenate([np.zeros(0, bool), *checked]))
    _delete(parts.uri, (*runs, *shingles))
    across = copies.pairs[:, 0] >= parts.borders.held_out
    resolved = Resolved.of(copies.pairs, across, copies.pairs[:, 1] < parts.borders.test)
    require_train_documents(len(resolved.left_out), parts.documents("train"), settings)
    return copies.take(across), resolved


def _describe_copies(tokenised: Sequence[TokenisedPart], count: int) -> list[str]:
    names = list(islice(chain.from_iterable(each.near_copies for each in tokenised), SHOWN_NAMES))
    return [list_left_out("near-copies of held-out documents", names, count)] if count else []


def _found(
    copies: Candidates | None, resolved: Resolved | None, tokenised: Sequence[TokenisedPart], parts: Parts,
    settings: NearDuplicates | None,
) -> NearDuplicatesFound | None:  # fmt: skip
    if copies is None or resolved is None or settings is None:
        return None
    train, test = (sum(each.split_bytes.get(split, 0) for each in tokenised) for split in ("train", "test"))
    tested = copies.take(copies.pairs[:, 1] < parts.borders.test)
    return resolved.found(
        settings, copies.left_out_bytes / max(1, train), tested.copied_bytes / max(1, test), parts.borders.test
    )


# --- tokens ---------------------------------------------------------------------------------------


def _tokenizer(parts: Parts, data: TextData, tasks: _Tasks) -> TextTokenizer:
    if not isinstance(data.tokenizer, BpeTokenizer):
        return read_tokenizer(data.tokenizer)
    return tasks.run(train_tokenizer, [(parts, data.tokenizer.vocab_size)])[0]


def _plan(
    tokenised: Sequence[TokenisedPart], documents: int, data: TextData, tokenizer: TextTokenizer
) -> tuple[list[ShardPlan], dict[str, list[Tape]]]:
    tapes = {split: [each.tapes[split] for each in tokenised if split in each.tapes] for split in SPLITS}
    counts = {split: sum(tape.count for tape in tapes[split]) for split in SPLITS}
    row_bytes = row_dtype(data.sequence_length, tokenizer.outputs).itemsize
    plans = plan_train_shards(counts["train"], documents, data, row_bytes)
    for split in SPLITS[1:]:
        plans += plan_held_out_shards(split, counts[split], data, row_bytes)
    return plans, tapes
