"""Whether data are texts with a class each, and how their recipe names them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from overproof.config.data import DataSection
from overproof.errors import InputError
from overproof.files import filesystem
from overproof.models.base import ArrayFamily, class_order
from overproof.models.sizes import family_of
from overproof.tasks.image_recognition import SPLITS
from overproof.tasks.recognition import (
    ColumnFlags,
    DataLook,
    Fit,
    Misfit,
    Question,
    Recognised,
    choose_column,
)
from overproof.tasks.table_recognition import ALMOST_UNIQUE, not_classes
from overproof.tasks.table_samples import TableSample, is_text
from overproof.tasks.texts import Labelling, count_texts, encode_texts, read_tokenizer, tokenizer_file

TEXT_NAMES = ("text", "sentence", "review", "content", "body", "comment", "message")
CLASS_NAMES = ("label", "class", "target", "category", "topic", "sentiment", "intent")
FEWEST_TEXTS = 50  # that leave some for validation and test
FEWEST_OF_A_CLASS = 10  # of fewer, hardly one is a test text
ENCODED = 512  # texts, for their lengths
COVERED, STEP = 0.95, 16  # share of the texts that are not cut; rows are multiples of so many tokens
LONGEST = 512  # tokens of a row, where the model takes more
LISTED = 5  # classes, in a message


@dataclass(frozen=True)
class _Found:
    """Where the texts are, why, and some of them."""

    source: Mapping[str, Any]
    why: str
    texts: Sequence[str]
    flags: frozenset[str] = frozenset()


def recognise_labelled_texts(
    look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags, section: type[DataSection],
    labelling: Labelling,
) -> Recognised:  # fmt: skip
    """CSV, JSONL or Parquet with a column of text and one of classes, or a folder of text files for each class."""
    if model is None:
        return Misfit("a classifier of texts starts from an encoder: give MODEL, a Hugging Face directory")
    tables = look.having(".csv", ".jsonl", ".parquet")
    if len(tables) > 1:
        return Misfit(f"expected CSV, JSONL or Parquet, and one of them alone: {look.described}")
    found = _columns(look, tables[0], flags) if tables else _folders(look)
    return _fit(found, model, section, labelling) if isinstance(found, _Found) else found


def _columns(look: DataLook, suffix: str, flags: ColumnFlags) -> _Found | Misfit | Question:
    sample = look.sample(suffix)
    if isinstance(sample, Misfit):
        return sample
    unfit = {name: not_classes(sample.rows[name].drop_null()) for name in _named(sample)}
    classes = [name for name, why in unfit.items() if why is None or name == flags.label]
    texts = [name for name in sample.columns(is_text) if name == flags.text or _is_prose(sample, name)]
    text = choose_column(sample, flags.text, "--text", TEXT_NAMES, [t for t in texts if t != flags.label], "the text")
    if not isinstance(text, tuple):
        return text
    label = choose_column(
        sample, flags.label, "--label", CLASS_NAMES, [c for c in classes if c != text[0]], "the class"
    )
    if not isinstance(label, tuple):
        return label
    if why := unfit[label[0]]:
        return Misfit(f"column {label[0]!r}{f', {sample.part},' if sample.part else ''} {why}")
    source = {"kind": suffix[1:], "path": look.path, "text": text[0], "label": label[0]}
    told = f"column {text[0]!r}: {text[1]}; classes in {label[0]!r}: {label[1]}"
    return _Found(source, told, sample.rows[text[0]].drop_null().to_pylist(), frozenset({"--text", "--label"}))


def _named(sample: TableSample) -> list[str]:
    """Columns that may name classes."""
    return sample.columns(is_text, pa.types.is_integer, pa.types.is_boolean, pa.types.is_dictionary)


def _is_prose(sample: TableSample, name: str) -> bool:
    """Whether nearly every row has a text of its own."""
    values = sample.rows[name].drop_null()
    return len(values) > 0 and pc.count_distinct(values).as_py() > ALMOST_UNIQUE * len(values)


def _folders(look: DataLook) -> _Found | Misfit:
    names = [name for name in look.names if name.lower().endswith(".txt")]
    if not names:
        return Misfit(f"no CSV, JSONL or Parquet, nor .txt files: {look.described}")
    if look.single or any("/" not in name for name in names):
        return Misfit("text files lie beside no classes' folders; expected DATA/CLASS/NAME.txt")
    classes = sorted({name.split("/")[0] for name in names})
    if all(name.lower() in SPLITS for name in classes):
        return Misfit(f"the folders are called like splits ({', '.join(classes)}); expected one for each class")
    files, root = filesystem(look.path)
    texts = []
    for name in names[:: math.ceil(len(names) / ENCODED)]:
        with files.open_input_stream(f"{root}/{name}") as stream:
            texts.append(stream.read().decode(errors="replace"))
    return _Found({"kind": "folder", "path": look.path}, "a folder for each class", texts)


def _fit(found: _Found, model: Mapping[str, Any], section: type[DataSection], labelling: Labelling) -> Fit | Misfit:
    """With all classes there are, by a look at every row, and the length of rows."""
    path = model["_name_or_path"]
    data: Any = section.parse({"source": found.source}, "data")
    counts = count_texts(data, labelling)
    if counts.texts < FEWEST_TEXTS:
        return Misfit(f"{counts.texts} texts; expected {FEWEST_TEXTS} at least, for train, validation and test")
    _, family = family_of(model, path)
    assert isinstance(family, ArrayFamily)
    try:
        longest = min(LONGEST, family.width(SimpleNamespace(**model)))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}/config.json: {error}; expected a whole configuration") from None
    length, why = _length(found.texts, path, longest)
    classes = list(counts.by_class)
    reasons = {
        "texts": f"{counts.texts:,} in {len(classes)} classes ({_listed(classes)}); {found.why}",
        "length": why,
    }
    rare = [f"{name} ({count})" for name, count in counts.by_class.items() if count < FEWEST_OF_A_CLASS]
    if rare:
        reasons["rare classes"] = f"{_listed(rare)}: too few texts to tell how well they are recognised"
    refit = _other_head(model, family.architectures[0], classes)
    reasons["head"] = refit or "of the data's classes, by their names"
    fields = {"source": found.source, "tokenizer": {"kind": "file", "path": path}, "sequence_length": length}
    return Fit(fields, counts.texts, counts.texts, reasons, refit=refit, flags=found.flags)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def _length(texts: Sequence[str], path: str, longest: int) -> tuple[int, str]:
    """Tokens of a row by which few texts are cut, and why so many."""
    looked = texts[:: math.ceil(len(texts) / ENCODED)]
    tokenizer = read_tokenizer(tokenizer_file(path), path, longest)
    lengths = (encode_texts(tokenizer, looked).tokens_RT >= 0).sum(1)
    length = min(longest, STEP * math.ceil(float(np.quantile(lengths, COVERED)) / STEP))
    cut = float((lengths > length).mean()) if length < longest else float((lengths == longest).mean())
    return length, (
        f"{length} tokens a row, by {len(looked):,} of the texts, of which about {100 * cut:.2g} % are cut"
        f"{f': the model takes {longest} at most' if length == longest else ''}"
    )


def _other_head(model: Mapping[str, Any], architecture: str, classes: Sequence[str]) -> str | None:
    """Why a model's head is not of the data's classes; None where it is."""
    if model["architectures"][0] != architecture:
        return f"{model['architectures'][0]} has no classifier yet"
    named = model.get("id2label") or {}
    names = [str(named[key]) for key in sorted(named, key=int)]
    if class_order(names, classes) is not None:
        return None
    return (
        f"its own classes ({_listed(names) or 'unnamed'}) are not the data's, by name; if they are in truth, say so in "
        "id2label of its config.json"
    )
