"""Texts of any source as shards: read, split class by class, tokenised and cut, and written.

Shapes: R texts, K of them in a split, T tokens in a row, V classes.

A text has one class or several: ``Labelling`` is what a task says of that.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv, fs
from pyarrow import parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from overproof.data.manifest import TOKENIZER, Column, Manifest
from overproof.data.parquet_reader import refuse_objects
from overproof.data.parquet_writer import write_file
from overproof.data.sources import files_below, sha256_of
from overproof.data.stratified import stratified, write_splits
from overproof.errors import InputError, suggest_name
from overproof.files import filesystem
from overproof.models.encoder import PADDING
from overproof.stage_context import Notice, StageContext, TaskProgress

Labelled = tuple[str, str, tuple[str, ...]]  # where it is from, the text, its classes

SUFFIXES = {"jsonl": ".jsonl", "csv": ".csv", "parquet": ".parquet", "folder": ".txt"}
PAD, START, END = "[PAD]", "[CLS]", "[SEP]"
SPECIAL = (START, PAD, END)  # by their ids: a RoBERTa counts positions from behind id 1, which it takes for padding
PADDINGS = (PAD, "<pad>", "<|padding|>")  # as tokenizers name it
EXAMPLE_CHARACTERS = 500  # of the text that goes with the model as an example


@dataclass(frozen=True)
class Texts:
    """The texts of a source in an order of their own, none twice; and how many were left out, by reason."""

    texts: list[str]
    labels: list[tuple[str, ...]]  # the classes of each
    dropped: dict[str, int]

    @property
    def classes(self) -> list[str]:
        return _ordered({name for labels in self.labels for name in labels})


@dataclass(frozen=True)
class TextCounts:
    """How many texts a source has, and of each class, as ``read_texts`` would give them."""

    texts: int
    by_class: Mapping[str, int]  # in the classes' order


class Labelling(Protocol):
    """How the texts of a task have their classes."""

    @property
    def differing(self) -> str:
        """What texts are that stand there more than once, with other classes each time."""

    @property
    def details(self) -> Mapping[str, Any]:
        """Of the manifest, beside those of all texts."""

    def read(self, where: str, value: Any) -> tuple[str, ...]:
        """The classes of a text, from the value of its column or its folder's name.

        Raises:
            InputError: it is not what the recipe says.
        """

    def encode(self, there_RV: NDArray[np.bool_]) -> NDArray[np.int32]:
        """The column ``label`` of a shard, one number or several a row: which classes each text has."""

    def strata(self, there_RV: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Of each text, the group that gives each split its share."""

    def shape(self, classes: int) -> tuple[int, int]:
        """Predictions in a row, and outputs of each."""

    def weights(self, classes: list[str], train_KV: NDArray[np.bool_]) -> NDArray[np.float32] | None:
        """How much a text of each class counts, by the classes of the train texts; None where all count alike."""


@dataclass(frozen=True)
class EncodedTexts:
    """Rows of tokens, which texts were cut, and which have no token at all."""

    tokens_RT: NDArray[np.int32]  # ``PADDING`` beyond the text
    truncated: list[int]
    empty: list[int]


def texts_digest(data: Any) -> str:
    """Sha256, in hex, over the names, sizes and times of a source's files, and the tokenizer's content.

    Raises:
        InputError: there are none.
    """
    identity: list[object] = [[info.path, info.size, info.mtime_ns or 0] for info in _files(data.source)]
    if data.tokenizer.kind == "file":
        identity.append(hashlib.sha256(tokenizer_file(data.tokenizer.path)).hexdigest())
    return sha256_of(identity)


def describe_texts(data: Any, labelling: Labelling) -> dict[str, Any]:
    """What models must fit, as far as it is known before the texts are split: a vocabulary may be the recipe's limit.

    Raises:
        InputError: a file cannot be read, a text or its class is missing, or there is one class alone.
    """
    classes = list(count_texts(data, labelling).by_class)
    if data.tokenizer.kind == "bpe":
        return _details(data, labelling, classes, data.tokenizer.vocab_size, SPECIAL.index(PAD))
    tokenizer = read_tokenizer(tokenizer_file(data.tokenizer.path), data.tokenizer.path, data.sequence_length)
    return _details(data, labelling, classes, *_vocabulary(tokenizer))


def prepare_texts(context: StageContext, labelling: Labelling) -> Manifest:
    """Read, split by class and content, tokenise, cut and write.

    Raises:
        InputError: the source is not what the recipe says, a class has no train text, a split is left empty, or there
            are more shards than row groups.
    """
    data: Any = context.recipe.data
    context.progress(TaskProgress("prepare", 0, 3, "reading the texts"))
    found = read_texts(data, labelling)
    classes = found.classes
    there_RV = _class_matrix(found, classes)
    splits = stratified(labelling.strata(there_RV), data.validation_fraction, data.test_fraction, context.recipe.seed)
    splits["train"] = splits["train"][: len(splits["train"]) // data.rows_per_group * data.rows_per_group]
    _require_train_texts(classes, there_RV, splits["train"])
    content = _tokenizer_content(data, (found.texts[row] for row in splits["train"]))
    tokenizer = read_tokenizer(content, "data.tokenizer", data.sequence_length)
    context.progress(TaskProgress("prepare", 1, 3, f"tokenising {len(found.texts):,} texts"))
    encoded = encode_texts(tokenizer, found.texts)
    if encoded.empty:
        raise InputError(
            f"data: the tokenizer finds no token in {found.texts[encoded.empty[0]]!r:.80}; expected texts that it can "
            "read: leave this one out, or take another tokenizer"
        )
    kept_K = np.concatenate(list(splits.values()))
    truncated = int(np.isin(encoded.truncated, kept_K).sum())
    if truncated:
        longer = f"{truncated:,} of {len(kept_K):,} texts are longer than {data.sequence_length} tokens"
        context.progress(Notice(f"{longer} (data.sequence_length) and are cut"))
    context.progress(TaskProgress("prepare", 2, 3, f"writing {len(found.texts):,} texts"))
    labels = labelling.encode(there_RV)
    columns: tuple[Column, ...] = (
        Column(name="tokens", dtype="<i4", shape=(data.sequence_length,)),
        Column(name="label", dtype="<i4", shape=labels.shape[1:]),
    )
    rows: dict[str, NDArray[Any]] = {"tokens": encoded.tokens_RT, "label": labels}
    weights_V = labelling.weights(classes, there_RV[splits["train"]])
    if weights_V is not None:
        columns += (Column(name="weight", dtype="<f4"),)
        rows["weight"] = weights_V[labels]
    positions, outputs = labelling.shape(len(classes))
    written = write_splits(rows, splits, columns, data, context.draft.uri, "texts", np.full(len(labels), positions))
    write_file(context.draft.uri, TOKENIZER, content)
    example = found.texts[int(splits["test"][0])][:EXAMPLE_CHARACTERS]
    details = _details(data, labelling, classes, *_vocabulary(tokenizer))
    return Manifest(
        task=data.kind,
        columns=columns,
        splits=written.splits,
        rows_per_group=data.rows_per_group,
        positions=positions,
        outputs=outputs,
        tokenizer_sha256=hashlib.sha256(content).hexdigest(),
        dropped=found.dropped,
        details=details | {"truncated": truncated, "example": example},
    )


def read_texts(data: Any, labelling: Labelling) -> Texts:
    """Every text once, ordered by the hash of its content, so that it does not matter where it was read.

    A text that stands there with other classes each time is left out: whatever a model said of it would be wrong
    somewhere.

    Raises:
        InputError: a file cannot be read, a text or its class is missing, or there is one class alone.
    """
    rows, labels_of = 0, dict[str, set[frozenset[str]]]()
    for _, text, labels in _labelled_texts(data.source, labelling):
        rows += 1
        labels_of.setdefault(text, set()).add(frozenset(labels))
    kept = {text: tuple(sorted(next(iter(found)))) for text, found in labels_of.items() if len(found) == 1}
    texts = sorted(kept, key=lambda text: hashlib.sha256(text.encode()).digest())
    dropped = {"duplicates": rows - len(labels_of), labelling.differing: len(labels_of) - len(kept)}
    found = Texts(texts, [kept[text] for text in texts], dropped)
    _require_classes(data.source, found.classes, len(texts))
    return found


_counted: dict[tuple[Any, ...], TextCounts] = {}  # of the source that was asked for last


def count_texts(data: Any, labelling: Labelling) -> TextCounts:
    """How many texts of each class ``read_texts`` would give, held by their digests alone.

    Raises:
        InputError: as ``read_texts``.
    """
    files = tuple((info.path, info.size, info.mtime_ns) for info in _files(data.source))
    key = (data.model_dump_json(), files)
    if key not in _counted:
        _counted.clear()
        _counted[key] = _count_texts(data.source, labelling)
    return _counted[key]


def _count_texts(source: Any, labelling: Labelling) -> TextCounts:
    labels_of = dict[bytes, frozenset[str] | None]()  # None where a text stands there with others, too
    for _, text, labels in _labelled_texts(source, labelling):
        digest, found = hashlib.blake2b(text.encode(), digest_size=16).digest(), frozenset(labels)
        if labels_of.setdefault(digest, found) != found:
            labels_of[digest] = None
    kept = [labels for labels in labels_of.values() if labels is not None]
    counts = Counter(name for labels in kept for name in labels)
    classes = _ordered(set(counts))
    _require_classes(source, classes, len(kept))
    return TextCounts(len(kept), {name: counts[name] for name in classes})


def _ordered(classes: set[str]) -> list[str]:
    """Numbers in their order, else by name."""
    numbers = all(name.isdecimal() for name in classes)
    return sorted(classes, key=lambda name: (int(name), name)) if numbers else sorted(classes)


def _require_classes(source: Any, classes: Sequence[str], texts: int) -> None:
    if len(classes) < 2:
        only = f"there is no class but {classes[0]!r}" if classes else "no text has a class"
        only = only if texts else "there is no text"
        raise InputError(f"data.source.path: {source.path}: {only}; expected texts of two classes at least")


def read_tokenizer(content: bytes, where: object, length: int) -> Tokenizer:
    """A tokenizer that cuts texts to ``length`` tokens, the special ones that its post-processor adds included.

    Raises:
        InputError: it is none.
    """
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"{where}: not a tokenizer.json: {error}") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    tokenizer.encode_special_tokens = True  # a text that spells a special token is text
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> EncodedTexts:
    """Texts as rows, by a tokenizer of ``read_tokenizer``."""
    assert tokenizer.truncation is not None
    encodings = tokenizer.encode_batch(list(texts))
    tokens_RT = np.full((len(texts), tokenizer.truncation["max_length"]), PADDING, np.int32)
    for tokens_T, encoding in zip(tokens_RT, encodings, strict=True):
        tokens_T[: len(encoding.ids)] = encoding.ids
    empty = [row for row, encoding in enumerate(encodings) if not encoding.ids]
    truncated = [row for row, encoding in enumerate(encodings) if encoding.overflowing]
    return EncodedTexts(tokens_RT, truncated, empty)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with special tokens around a text, as BERT has them.

    WordPiece is not trained here: the library's trainer gives other entries each time.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    return tokenizer


def _details(
    data: Any, labelling: Labelling, classes: list[str], vocabulary: int, padding: int | None
) -> dict[str, Any]:
    return {
        **labelling.details,
        "classes": classes,
        "sequence_length": data.sequence_length,
        "vocabulary": vocabulary,
        "padding": padding,
    }


def _vocabulary(tokenizer: Tokenizer) -> tuple[int, int | None]:
    """Ids there are, those of added tokens included, and which stands for padding, if one does."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return max(ids.values()) + 1, next((ids[name] for name in PADDINGS if name in ids), None)


def _tokenizer_content(data: Any, train: Iterable[str]) -> bytes:
    if data.tokenizer.kind == "bpe":
        return str(train_tokenizer(train, data.tokenizer.vocab_size).to_str()).encode()
    return tokenizer_file(data.tokenizer.path)


def tokenizer_file(path: str) -> bytes:
    """Of a tokenizer.json, or of the one in a folder.

    Raises:
        InputError: there is none.
    """
    files, found = filesystem(path)
    if files.get_file_info(found).type == fs.FileType.Directory:
        found = f"{found.rstrip('/')}/{TOKENIZER}"
    if files.get_file_info(found).type != fs.FileType.File:
        raise InputError(f"data.tokenizer.path: {path}: no {TOKENIZER} there; expected the file or its folder")
    with files.open_input_stream(found) as stream:
        content: bytes = stream.read()
    return content


def _class_matrix(found: Texts, classes: list[str]) -> NDArray[np.bool_]:
    numbers = {name: number for number, name in enumerate(classes)}
    there_RV = np.zeros((len(found.texts), len(classes)), np.bool_)
    for there_V, labels in zip(there_RV, found.labels, strict=True):
        there_V[[numbers[name] for name in labels]] = True
    return there_RV


def _require_train_texts(classes: list[str], there_RV: NDArray[np.bool_], train: NDArray[np.int64]) -> None:
    """Raises InputError where a class has texts in other splits alone: no model could learn it."""
    unseen = np.flatnonzero(~there_RV[train].any(0))
    if len(unseen) and len(train):
        raise InputError(
            f"data: class {classes[unseen[0]]!r} has {there_RV[:, unseen[0]].sum()} texts, and none falls into the "
            "train split; expected several texts of each class: give more, or leave the class out"
        )


def _files(source: Any) -> list[fs.FileInfo]:
    suffix = SUFFIXES[source.kind]
    found = files_below(source.path, (suffix,))
    if not found:
        raise InputError(f"data.source.path: {source.path}: no {suffix} file; expected one at least")
    return found


def _labelled_texts(source: Any, labelling: Labelling) -> Iterator[Labelled]:
    """Every text of a source with its classes, in the order of files and rows."""
    files, root = filesystem(source.path)
    for info in _files(source):
        if source.kind == "folder":
            yield _one_file(files, info.path, root, source, labelling)
        elif source.kind == "jsonl":
            with files.open_input_stream(info.path) as stream:
                yield from _lines(io.BufferedReader(stream), info.path, source, labelling)
        else:
            yield from _rows(files, info.path, source, labelling)


def _one_file(files: fs.FileSystem, path: str, root: str, source: Any, labelling: Labelling) -> Labelled:
    name = path.removeprefix(root).strip("/").split("/")
    if len(name) < 2:
        raise InputError(f"{path}: lies beside the classes' folders; expected {source.path}/CLASS/{name[-1] or 'FILE'}")
    with files.open_input_stream(path) as stream:
        content: bytes = stream.read()
    try:
        return path, _as_text(path, content.decode()), labelling.read(path, name[0])
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}; expected text in UTF-8") from None


def _lines(lines: Iterable[bytes], path: str, source: Any, labelling: Labelling) -> Iterator[Labelled]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record: Any = json.loads(line)
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8: {error}; expected text in UTF-8") from None
        except ValueError as error:
            raise InputError(f"{where}: not JSON: {error}; expected one JSON object on each line") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: found {record!r:.40}; expected an object with a text and its class")
        _require_columns(where, list(record), source)
        yield where, _as_text(where, record[source.text]), labelling.read(where, record[source.label])


def _rows(files: fs.FileSystem, path: str, source: Any, labelling: Labelling) -> Iterator[Labelled]:
    row = 0
    try:
        for batch in (_csv_batches if source.kind == "csv" else _parquet_batches)(files, path, source):
            texts, labels = (batch.column(name).to_pylist() for name in (source.text, source.label))
            for text, label in zip(texts, labels, strict=True):
                row += 1
                where = f"{path}, row {row}"
                yield where, _as_text(where, text), labelling.read(where, label)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}; expected text in UTF-8") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not {source.kind}: {error}; expected a table with a header") from None


def _csv_batches(files: fs.FileSystem, path: str, source: Any) -> Iterator[pa.RecordBatch]:
    """The two columns alone: what the others hold makes no difference."""
    both = [source.text, source.label]
    quoted = csv.ParseOptions(newlines_in_values=True)
    with files.open_input_stream(path) as stream, csv.open_csv(stream, parse_options=quoted) as head:
        _require_columns(path, head.schema.names, source)
    chosen = csv.ConvertOptions(include_columns=both, column_types=dict.fromkeys(both, pa.string()))
    with files.open_input_stream(path) as stream:
        yield from csv.open_csv(stream, parse_options=quoted, convert_options=chosen)


def _parquet_batches(files: fs.FileSystem, path: str, source: Any) -> Iterator[pa.RecordBatch]:
    with files.open_input_file(path) as handle:
        file = pq.ParquetFile(handle)
        refuse_objects(file.schema_arrow, path)
        _require_columns(path, file.schema_arrow.names, source)
        yield from file.iter_batches(columns=[source.text, source.label])


def _require_columns(where: str, found: Sequence[str], source: Any) -> None:
    for field, name in (("text", source.text), ("label", source.label)):
        if name not in found:
            near = suggest_name(name, found)
            raise InputError(f"{where}: found {', '.join(found)}; expected {name!r} (data.source.{field}){near}")
        if found.count(name) > 1:
            raise InputError(f"{where}: several columns are named {name!r} (data.source.{field}); expected one")


def _as_text(where: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: the text is {type(value).__name__}; expected a string")
    if value is None or not value.strip():
        raise InputError(f"{where}: the text is empty; expected one: leave it out")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{where}: the text holds half of a character; expected valid Unicode")
    return value


def as_class(where: str, value: Any) -> str:
    """The name of a class.

    Raises:
        InputError: there is none, or the value is neither a name nor a number.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if value is not None and not isinstance(value, str | int):
        raise InputError(f"{where}: the class is {type(value).__name__}; expected its name or number")
    if value is None or not str(value).strip():
        raise InputError(f"{where}: there is no class; expected its name or number")
    return str(value)
