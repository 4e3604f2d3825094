"""Texts of any source as shards: read, split class by class, tokenised and cut, and written.

Shapes: R texts, K of them in a split, T tokens in a row, V classes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from overproof.tasks.text_classification import TextClassificationData

Labelled = tuple[str, str, str]  # where it is from, the text, its class

SUFFIXES = {"jsonl": ".jsonl", "csv": ".csv", "parquet": ".parquet", "folder": ".txt"}
PAD, START, END = "[PAD]", "[CLS]", "[SEP]"
SPECIAL = (START, PAD, END)  # by their ids: a RoBERTa counts positions from behind id 1, which it takes for padding
PADDINGS = (PAD, "<pad>", "<|padding|>")  # as tokenizers name it
EXAMPLE_CHARACTERS = 500  # of the text that goes with the model as an example


@dataclass(frozen=True)
class Texts:
    """The texts of a source in an order of their own, none twice; and how many were left out, by reason."""

    texts: list[str]
    labels: list[str]
    dropped: dict[str, int]

    @property
    def classes(self) -> list[str]:
        """In their order."""
        return _ordered(set(self.labels))


@dataclass(frozen=True)
class TextCounts:
    """How many texts of each class a source has, as ``read_texts`` would give them."""

    by_class: Mapping[str, int]  # in the classes' order

    @property
    def texts(self) -> int:
        """In all."""
        return sum(self.by_class.values())


@dataclass(frozen=True)
class EncodedTexts:
    """Rows of tokens, which texts were cut, and which have no token at all."""

    tokens_RT: NDArray[np.int32]  # ``PADDING`` beyond the text
    truncated: list[int]
    empty: list[int]


def texts_digest(data: TextClassificationData) -> str:
    """Sha256, in hex, over the names, sizes and times of a source's files, and the tokenizer's content.

    Raises:
        InputError: there are none.
    """
    identity: list[object] = [[info.path, info.size, info.mtime_ns or 0] for info in _files(data.source)]
    if data.tokenizer.kind == "file":
        identity.append(hashlib.sha256(tokenizer_file(data.tokenizer.path)).hexdigest())
    return sha256_of(identity)


def describe_texts(data: TextClassificationData) -> dict[str, Any]:
    """What models must fit, as far as it is known before the texts are split: a vocabulary may be the recipe's limit.

    Raises:
        InputError: a file cannot be read, a text or its class is missing, or there is one class alone.
    """
    classes = list(count_texts(data).by_class)
    if data.tokenizer.kind == "bpe":
        return _details(data, classes, data.tokenizer.vocab_size, SPECIAL.index(PAD))
    tokenizer = read_tokenizer(tokenizer_file(data.tokenizer.path), data.tokenizer.path, data.sequence_length)
    return _details(data, classes, *_vocabulary(tokenizer))


def prepare_texts(context: StageContext) -> Manifest:
    """Read, split by class and content, tokenise, cut and write.

    Raises:
        InputError: the source is not what the recipe says, a class has no train text, a split is left empty, or there
            are more shards than row groups.
    """
    data: Any = context.recipe.data
    context.progress(TaskProgress("prepare", 0, 3, "reading the texts"))
    found = read_texts(data)
    numbers = {name: number for number, name in enumerate(found.classes)}
    labels_R = np.array([numbers[label] for label in found.labels], np.int32)
    splits = stratified(labels_R, data.validation_fraction, data.test_fraction, context.recipe.seed)
    splits["train"] = splits["train"][: len(splits["train"]) // data.rows_per_group * data.rows_per_group]
    _require_train_texts(found, labels_R, splits["train"])
    content = _tokenizer_content(data, (found.texts[row] for row in splits["train"]))
    tokenizer = read_tokenizer(content, "data.tokenizer", data.sequence_length)
    context.progress(TaskProgress("prepare", 1, 3, f"tokenising {len(labels_R):,} texts"))
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
    context.progress(TaskProgress("prepare", 2, 3, f"writing {len(labels_R):,} texts"))
    columns: tuple[Column, ...] = (
        Column(name="tokens", dtype="<i4", shape=(data.sequence_length,)),
        Column(name="label", dtype="<i4"),
    )
    rows: dict[str, NDArray[Any]] = {"tokens": encoded.tokens_RT, "label": labels_R}
    if data.class_weights is not None:
        columns += (Column(name="weight", dtype="<f4"),)
        rows["weight"] = _weights(data.class_weights, found.classes, labels_R[splits["train"]])[labels_R]
    written = write_splits(rows, splits, columns, data, context.draft.uri, "texts")
    write_file(context.draft.uri, TOKENIZER, content)
    example = found.texts[int(splits["test"][0])][:EXAMPLE_CHARACTERS]
    return Manifest(
        task=data.kind,
        columns=columns,
        splits=written.splits,
        rows_per_group=data.rows_per_group,
        positions=1,
        outputs=len(numbers),
        tokenizer_sha256=hashlib.sha256(content).hexdigest(),
        dropped=found.dropped,
        details=_details(data, found.classes, *_vocabulary(tokenizer)) | {"truncated": truncated, "example": example},
    )


def read_texts(data: TextClassificationData) -> Texts:
    """Every text once, ordered by the hash of its content, so that it does not matter where it was read.

    A text that stands there with several classes is left out: whatever a model said of it would be wrong somewhere.

    Raises:
        InputError: a file cannot be read, a text or its class is missing, or there is one class alone.
    """
    rows, classes_of = 0, dict[str, set[str]]()
    for _, text, label in _labelled_texts(data.source):
        rows += 1
        classes_of.setdefault(text, set()).add(label)
    kept = {text: next(iter(labels)) for text, labels in classes_of.items() if len(labels) == 1}
    _require_classes(data.source, set(kept.values()))
    texts = sorted(kept, key=lambda text: hashlib.sha256(text.encode()).digest())
    dropped = {"duplicates": rows - len(classes_of), "texts of several classes": len(classes_of) - len(kept)}
    return Texts(texts, [kept[text] for text in texts], dropped)


def count_texts(data: TextClassificationData) -> TextCounts:
    """How many texts of each class ``read_texts`` would give, held by their digests alone.

    Raises:
        InputError: as ``read_texts``.
    """
    return _count_texts(data.source, tuple((info.path, info.size, info.mtime_ns) for info in _files(data.source)))


@lru_cache(maxsize=1)
def _count_texts(source: Any, files: tuple[tuple[str, int, int | None], ...]) -> TextCounts:
    del files  # whose change makes another source of it
    class_of = dict[bytes, str | None]()  # None where a text stands there with several
    for _, text, label in _labelled_texts(source):
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if class_of.setdefault(digest, label) != label:
            class_of[digest] = None
    counts = Counter(label for label in class_of.values() if label is not None)
    _require_classes(source, set(counts))
    return TextCounts({name: counts[name] for name in _ordered(set(counts))})


def _ordered(classes: set[str]) -> list[str]:
    """Numbers in their order, else by name."""
    numbers = all(name.isdecimal() for name in classes)
    return sorted(classes, key=lambda name: (int(name), name)) if numbers else sorted(classes)


def _require_classes(source: Any, classes: set[str]) -> None:
    if len(classes) < 2:
        only = f"every text is of class {next(iter(classes))!r}" if classes else "there is no text"
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


def _details(data: TextClassificationData, classes: list[str], vocabulary: int, padding: int | None) -> dict[str, Any]:
    return {
        "classes": classes,
        "sequence_length": data.sequence_length,
        "vocabulary": vocabulary,
        "padding": padding,
    }


def _vocabulary(tokenizer: Tokenizer) -> tuple[int, int | None]:
    """Ids there are, those of added tokens included, and which stands for padding, if one does."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return max(ids.values()) + 1, next((ids[name] for name in PADDINGS if name in ids), None)


def _tokenizer_content(data: TextClassificationData, train: Iterable[str]) -> bytes:
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


def _require_train_texts(found: Texts, labels_R: NDArray[np.int32], train: NDArray[np.int64]) -> None:
    """Raises InputError where a class has texts in other splits alone: no model could learn it."""
    unseen = sorted(set(range(len(found.classes))) - set(labels_R[train].tolist()))
    if unseen and len(train):
        name = found.classes[unseen[0]]
        raise InputError(
            f"data: class {name!r} has {Counter(found.labels)[name]} texts, and none falls into the train split; "
            "expected several texts of each class: give more, or leave the class out"
        )


def _weights(chosen: Any, classes: list[str], train_labels_R: NDArray[np.int32]) -> NDArray[np.float32]:
    """Of each class; their mean over the train texts is 1."""
    counts_V = np.bincount(train_labels_R, minlength=len(classes))
    if chosen == "balanced":
        weights_V = 1 / counts_V
    else:
        for name in chosen:
            if name not in classes:
                near = suggest_name(name, classes)
                raise InputError(f"data.class_weights.{name}: there is no such class{near}; expected one of {classes}")
        weights_V = np.array([chosen.get(name, 1.0) for name in classes])
    scaled: NDArray[np.float32] = (weights_V * counts_V.sum() / (weights_V @ counts_V)).astype(np.float32)
    return scaled


def _files(source: Any) -> list[fs.FileInfo]:
    suffix = SUFFIXES[source.kind]
    found = files_below(source.path, (suffix,))
    if not found:
        raise InputError(f"data.source.path: {source.path}: no {suffix} file; expected one at least")
    return found


def _labelled_texts(source: Any) -> Iterator[Labelled]:
    """Every text of a source with its class, in the order of files and rows."""
    files, root = filesystem(source.path)
    for info in _files(source):
        if source.kind == "folder":
            yield _one_file(files, info.path, root, source)
        elif source.kind == "jsonl":
            with files.open_input_stream(info.path) as stream:
                yield from _lines(io.BufferedReader(stream), info.path, source)
        else:
            yield from _rows(files, info.path, source)


def _one_file(files: fs.FileSystem, path: str, root: str, source: Any) -> Labelled:
    name = path.removeprefix(root).strip("/").split("/")
    if len(name) < 2:
        raise InputError(f"{path}: lies beside the classes' folders; expected {source.path}/CLASS/{name[-1] or 'FILE'}")
    with files.open_input_stream(path) as stream:
        content: bytes = stream.read()
    try:
        return path, _as_text(path, content.decode()), name[0]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}; expected text in UTF-8") from None


def _lines(lines: Iterable[bytes], path: str, source: Any) -> Iterator[Labelled]:
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
        yield where, _as_text(where, record[source.text]), _as_class(where, record[source.label])


def _rows(files: fs.FileSystem, path: str, source: Any) -> Iterator[Labelled]:
    row = 0
    try:
        for batch in (_csv_batches if source.kind == "csv" else _parquet_batches)(files, path, source):
            texts, labels = (batch.column(name).to_pylist() for name in (source.text, source.label))
            for text, label in zip(texts, labels, strict=True):
                row += 1
                where = f"{path}, row {row}"
                yield where, _as_text(where, text), _as_class(where, label)
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


def _as_class(where: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is not None and not isinstance(value, str | int):
        raise InputError(f"{where}: the class is {type(value).__name__}; expected its name or number")
    if value is None or not str(value).strip():
        raise InputError(f"{where}: there is no class; expected its name or number")
    return str(value)
