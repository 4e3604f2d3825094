"""Texts of any source as shards: read, split class by class, tokenised and cut, and written.

Shapes: R texts, K of them in a split, T tokens in a row, V classes.

A text has one class or several: ``Labelling`` is what a task says of that.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pyarrow import fs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from overproof.data.cleaning import NUL_LINES
from overproof.data.heartbeat import Heartbeat
from overproof.data.manifest import CLUSTER, SPLITS, TOKENIZER, Column, Manifest
from overproof.data.near_duplicates import Decision, find_near_duplicates
from overproof.data.source_files import SourceReading, describe_skipped
from overproof.data.sources import sha256_of
from overproof.data.stratified import stratified, write_splits
from overproof.data.text_tokenizer import load_tokenizer, without_training_settings
from overproof.errors import InputError
from overproof.files import filesystem, read_bytes
from overproof.models.encoder import PADDING
from overproof.stage_context import Notice, StageContext
from overproof.tasks.labelled_text_files import labelled_texts, text_files

PHASES = 4  # of the progress: reading, near-copies, tokenising, writing
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
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)  # files left out, by reason

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

    def weights(
        self, classes: list[str], there_RV: NDArray[np.bool_], train_K: NDArray[np.int64]
    ) -> NDArray[np.float32] | None:
        """How much each prediction of each text counts, one number or several a row: by the classes of the train texts,
        over which the mean is 1. None where all count alike.

        Raises:
            InputError: a weight is of no class.
        """


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
    identity: list[object] = list(text_files(data).identity)
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
    tokenizer = truncating_tokenizer(tokenizer_file(data.tokenizer.path), data.tokenizer.path, data.sequence_length)
    return _details(data, labelling, classes, *_vocabulary(tokenizer))


def prepare_texts(context: StageContext, labelling: Labelling) -> Manifest:
    """Read, split by class and content, tokenise, cut and write.

    Raises:
        InputError: the source is not what the recipe says, a class has no train text, a split is left empty, or there
            are more shards than row groups.
    """
    with Heartbeat(context.progress, "prepare", PHASES) as heartbeat:
        return _prepare_texts(context, labelling, heartbeat)


def _prepare_texts(context: StageContext, labelling: Labelling, heartbeat: Heartbeat) -> Manifest:
    data: Any = context.recipe.data
    heartbeat.start_phase(0, "reading the texts")
    found = read_texts(data, labelling)
    for line in describe_skipped(found.skipped):
        context.progress(Notice(line))
    classes = found.classes
    there_RV = _class_matrix(found, classes)
    splits = stratified(labelling.strata(there_RV), data.validation_fraction, data.test_fraction, context.recipe.seed)
    heartbeat.start_phase(1, f"near-copies, among {len(found.texts):,} texts")
    decision = data.near_duplicates and _near_duplicates(found.texts, splits, data, heartbeat)
    dropped = found.dropped
    if decision:
        splits["train"] = splits["train"][~decision.left_out_N[splits["train"]]]
        dropped = dropped | decision.dropped
    splits["train"] = splits["train"][: len(splits["train"]) // data.rows_per_group * data.rows_per_group]
    _require_train_texts(classes, there_RV, splits["train"])
    content = _tokenizer_content(data, (found.texts[row] for row in splits["train"]))
    tokenizer = truncating_tokenizer(content, "data.tokenizer", data.sequence_length)
    heartbeat.start_phase(2, f"tokenising {len(found.texts):,} texts")
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
    heartbeat.start_phase(3, f"writing {len(kept_K):,} texts")
    labels = labelling.encode(there_RV)
    columns: tuple[Column, ...] = (
        Column(name="tokens", dtype="<i4", shape=(data.sequence_length,)),
        Column(name="label", dtype="<i4", shape=labels.shape[1:]),
    )
    rows: dict[str, NDArray[Any]] = {"tokens": encoded.tokens_RT, "label": labels}
    if decision:
        columns += (Column(name=CLUSTER, dtype="<i8", batch=False),)
        rows[CLUSTER] = decision.clusters_N
    weights = labelling.weights(classes, there_RV, splits["train"])
    if weights is not None:
        columns += (Column(name="weight", dtype="<f4", shape=weights.shape[1:]),)
        rows["weight"] = weights
    positions, outputs = labelling.shape(len(classes))
    written = write_splits(rows, splits, columns, data, context.draft.uri, "texts", np.full(len(labels), positions))
    context.draft.write(TOKENIZER, content)
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
        dropped=dropped,
        skipped={reason: len(names) for reason, names in found.skipped.items()},
        near_duplicates=decision and decision.found,
        details=details | {"truncated": truncated, "example": example},
    )


def _near_duplicates(
    texts: Sequence[str], splits: Mapping[str, NDArray[np.int64]], data: Any, heartbeat: Heartbeat
) -> Decision:
    splits_R = np.full(len(texts), "train", f"<U{max(map(len, SPLITS))}")
    for name, own in splits.items():
        splits_R[own] = name
    return find_near_duplicates(texts, splits_R, data.near_duplicates, heartbeat.update_note)


def read_texts(data: Any, labelling: Labelling) -> Texts:
    """Every text once, ordered by the hash of its content, so that it does not matter where it was read.

    A text that stands there with other classes each time is left out: whatever a model said of it would be wrong
    somewhere.

    Raises:
        InputError: a file cannot be read, a text or its class is missing, or there is one class alone.
    """
    rows, labels_of = 0, dict[str, set[frozenset[str]]]()
    reading = SourceReading(text_files(data), data.on_error)
    for _, text, labels in labelled_texts(data.source, reading, labelling.read):
        rows += 1
        labels_of.setdefault(text, set()).add(frozenset(labels))
    kept = {text: tuple(sorted(next(iter(found)))) for text, found in labels_of.items() if len(found) == 1}
    texts = sorted(kept, key=lambda text: hashlib.sha256(text.encode()).digest())
    dropped = {"duplicates": rows - len(labels_of), labelling.differing: len(labels_of) - len(kept)}
    if reading.nul_lines:
        dropped[NUL_LINES] = reading.nul_lines
    found = Texts(texts, [kept[text] for text in texts], dropped, reading.skipped)
    _require_classes(data.source, found.classes, len(texts))
    return found


_counted: dict[tuple[Any, ...], TextCounts] = {}  # of the source that was asked for last


def count_texts(data: Any, labelling: Labelling) -> TextCounts:
    """How many texts of each class ``read_texts`` would give, held by their digests alone.

    Raises:
        InputError: as ``read_texts``.
    """
    listing = text_files(data)
    key = (data.model_dump_json(), listing.files)
    if key not in _counted:
        _counted.clear()
        _counted[key] = _count_texts(data.source, SourceReading(listing, data.on_error), labelling)
    return _counted[key]


def _count_texts(source: Any, reading: SourceReading, labelling: Labelling) -> TextCounts:
    labels_of = dict[bytes, frozenset[str] | None]()  # None where a text stands there with others, too
    for _, text, labels in labelled_texts(source, reading, labelling.read):
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


def truncating_tokenizer(content: bytes, where: object, length: int) -> Tokenizer:
    """A tokenizer that cuts texts to ``length`` tokens, the special ones that its post-processor adds included.

    Raises:
        InputError: it is none.
    """
    tokenizer = load_tokenizer(without_training_settings(content.decode(errors="replace"), where), where)
    tokenizer.enable_truncation(length)
    tokenizer.encode_special_tokens = True  # a text that spells a special token is text
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> EncodedTexts:
    """Texts as rows, by a tokenizer of ``truncating_tokenizer``."""
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
    text = tokenizer_file(data.tokenizer.path).decode(errors="replace")
    return without_training_settings(text, "data.tokenizer").encode()


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
    return read_bytes(files, found)


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
