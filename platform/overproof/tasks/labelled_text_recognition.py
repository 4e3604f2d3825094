"""Whether data are texts with a class each, or with several, and how their recipe names them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from overproof.config.data import DataSection
from overproof.data.parquet_columns import is_text
from overproof.data.source_files import OnError, naming_faults
from overproof.errors import InputError
from overproof.models.base import ArrayFamily, class_order
from overproof.models.encoder import MULTI_LABEL
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
from overproof.tasks.table_samples import TABLES, TableSample, is_list_of_names
from overproof.tasks.texts import Labelling, count_texts, encode_texts, tokenizer_file, truncating_tokenizer

TEXT_NAMES = ("text", "sentence", "review", "content", "body", "comment", "message")
CLASS_NAMES = ("label", "class", "target", "category", "topic", "sentiment", "intent")
SEVERAL_NAMES = (*CLASS_NAMES, "labels", "classes", "targets", "categories", "topics", "tags", "genres", "emotions")
SEPARATORS = (";", "|", ",")  # that may stand between classes
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
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the recipe's section, beside the source


LabellingOf = Callable[[Any], Labelling]  # of a recipe's section
TEXT_AND_LABEL = frozenset({"--text", "--label"})
NO_MODEL = Misfit("a classifier of texts starts from an encoder: give MODEL, a Hugging Face directory")


def recognise_labelled_texts(
    look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags, section: type[DataSection],
    labelling: LabellingOf,
) -> Recognised:  # fmt: skip
    """CSV, JSONL or Parquet with a column of text and one of classes, or a folder of text files for each class."""
    if model is None:
        return NO_MODEL
    found = _tables(look, flags, _class_column) if look.having(*TABLES) else _folders(look)
    return _fit(found, look.on_error, model, section, labelling) if isinstance(found, _Found) else found


def recognise_texts_of_several(
    look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags, section: type[DataSection],
    labelling: LabellingOf,
) -> Recognised:  # fmt: skip
    """CSV, JSONL or Parquet with a column of text and one of lists of classes, or of classes with something between."""
    if model is None:
        return NO_MODEL
    found = _tables(look, flags, _several_column)
    return _fit(found, look.on_error, model, section, labelling) if isinstance(found, _Found) else found


Column = tuple[str, str, Mapping[str, Any]]  # its name, why, and what the recipe says of it


def _tables(
    look: DataLook, flags: ColumnFlags, choose: Callable[[TableSample, ColumnFlags, str], Column | Question | Misfit]
) -> _Found | Misfit | Question:
    tables = look.having(*TABLES)
    if len(tables) != 1:
        return Misfit(f"expected CSV, JSONL or Parquet, and one of them alone: {look.described}")
    sample = look.sample(tables[0])
    if isinstance(sample, Misfit):
        return sample
    texts = [name for name in sample.columns(is_text) if name == flags.text or _is_prose(sample, name)]
    text = choose_column(sample, flags.text, "--text", TEXT_NAMES, [t for t in texts if t != flags.label], "the text")
    if not isinstance(text, tuple):
        return text
    label = choose(sample, flags, text[0])
    if not isinstance(label, tuple):
        return label
    source = {"kind": tables[0][1:], "path": look.path, "text": text[0], "label": label[0]}
    told = f"column {text[0]!r}: {text[1]}; classes in {label[0]!r}: {label[1]}"
    return _Found(source, told, sample.rows[text[0]].drop_null().to_pylist(), TEXT_AND_LABEL, label[2])


def _class_column(sample: TableSample, flags: ColumnFlags, text: str) -> Column | Question | Misfit:
    unfit = {name: not_classes(sample.rows[name].drop_null()) for name in _named(sample)}
    classes = [name for name, why in unfit.items() if (why is None or name == flags.label) and name != text]
    label = choose_column(sample, flags.label, "--label", CLASS_NAMES, classes, "the class")
    if not isinstance(label, tuple):
        return label
    return _misfit(sample, label[0], unfit[label[0]]) or (*label, {})


def _several_column(sample: TableSample, flags: ColumnFlags, text: str) -> Column | Question | Misfit:
    lists = {name: _not_lists_of_classes(sample.rows[name].drop_null()) for name in sample.columns(is_list_of_names)}
    between = {name: _separator(sample.rows[name].drop_null()) for name in sample.columns(is_text) if name != text}
    possible = [name for name, why in lists.items() if why is None or name == flags.label]
    possible += [name for name, separator in between.items() if separator is not None]
    label = choose_column(sample, flags.label, "--label", SEVERAL_NAMES, possible, "lists of classes")
    if not isinstance(label, tuple):
        return label
    name, why = label
    if name in lists:
        return _misfit(sample, name, lists[name]) or (name, why, {})
    return name, f"{why}, with {between[name]!r} between them", {"separator": between[name]}


def _misfit(sample: TableSample, name: str, why: str | None) -> Misfit | None:
    return Misfit(f"column {name!r}{f', {sample.part},' if sample.part else ''} {why}") if why else None


def _not_lists_of_classes(values: pa.ChunkedArray) -> str | None:
    """Why a column of lists has no classes."""
    if why := not_classes(pc.list_flatten(values)):
        return f"holds lists; what stands in them {why}"
    if any(len(set(names)) < len(names) for names in values.to_pylist()):
        return (
            "holds lists in which the same value stands twice, as numbers of a vector do; expected the names or "
            "numbers of the classes that each text has"
        )
    return None


def _separator(values: pa.ChunkedArray) -> str | None:
    """What stands between a text's classes: where there are fewer parts than there are values made of them."""
    distinct = [value for value in pc.unique(values).to_pylist() if value.strip()]
    for separator in SEPARATORS:
        parts = {part.strip() for value in distinct for part in value.split(separator)}
        if any(separator in value for value in distinct) and 1 < len(parts) < len(distinct):
            return separator
    return None


def _named(sample: TableSample) -> list[str]:
    """Columns that may name classes."""
    return sample.columns(is_text, pa.types.is_integer, pa.types.is_boolean, pa.types.is_dictionary)


def _is_prose(sample: TableSample, name: str) -> bool:
    """Whether nearly every row has a text of its own."""
    values = sample.rows[name].drop_null()
    return len(values) > 0 and pc.count_distinct(values).as_py() > ALMOST_UNIQUE * len(values)


def _folders(look: DataLook) -> _Found | Misfit:
    names = look.named(".txt")
    if not names:
        return Misfit(f"no CSV, JSONL or Parquet, nor .txt files: {look.described}")
    if look.single or any("/" not in name for name in names):
        return Misfit("text files lie beside no classes' folders; expected DATA/CLASS/NAME.txt")
    classes = sorted({name.split("/")[0] for name in names})
    if all(name.lower() in SPLITS for name in classes):
        return Misfit(f"the folders are called like splits ({', '.join(classes)}); expected one for each class")
    texts = []
    for name in names[:: math.ceil(len(names) / ENCODED)]:
        with naming_faults(name, "text"), look.content(name) as stream:
            texts.append(stream.read().decode("utf-8-sig", errors="replace"))
    return _Found({"kind": "folder", "path": look.path}, "a folder for each class", texts)


def _fit(
    found: _Found, on_error: OnError, model: Mapping[str, Any], section: type[DataSection], labelling_of: LabellingOf
) -> Fit | Misfit:
    """With all classes there are, by a look at every row, and the length of rows."""
    path = model["_name_or_path"]
    data: Any = section.parse({"source": found.source, "on_error": on_error, **found.fields}, "data")
    labelling = labelling_of(data)
    try:
        counts = count_texts(data, labelling)
    except InputError as error:  # the data may still be for another task
        return Misfit(str(error))
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
    refit = _other_head(model, family.architectures[0], classes, labelling.details.get("problem_type"))
    reasons["head"] = refit or "of the data's classes, by their names"
    fields = {"source": found.source, "tokenizer": {"kind": "file", "path": path}, "sequence_length": length}
    return Fit({**fields, **found.fields}, counts.texts, counts.texts, reasons, refit=refit, flags=found.flags)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def _length(texts: Sequence[str], path: str, longest: int) -> tuple[int, str]:
    """Tokens of a row by which few texts are cut, and why so many."""
    looked = texts[:: math.ceil(len(texts) / ENCODED)]
    tokenizer = truncating_tokenizer(tokenizer_file(path), path, longest)
    lengths = (encode_texts(tokenizer, looked).tokens_RT >= 0).sum(1)
    length = min(longest, STEP * math.ceil(float(np.quantile(lengths, COVERED)) / STEP))
    cut = float((lengths > length).mean()) if length < longest else float((lengths == longest).mean())
    return length, (
        f"{length} tokens a row, by {len(looked):,} of the texts, of which about {100 * cut:.2g} % are cut"
        f"{f': the model takes {longest} at most' if length == longest else ''}"
    )


def _other_head(
    model: Mapping[str, Any], architecture: str, classes: Sequence[str], problem_type: str | None
) -> str | None:
    """Why a model's head is not of the data's classes; None where it is."""
    if model["architectures"][0] != architecture:
        return f"{model['architectures'][0]} has no classifier yet"
    if (model.get("problem_type") == MULTI_LABEL) != (problem_type == MULTI_LABEL):
        several = "one class a text, the data several" if problem_type == MULTI_LABEL else "several, the data one"
        return f"its classifier is of {several}"
    named = model.get("id2label") or {}
    names = [str(named[key]) for key in sorted(named, key=int)]
    if class_order(names, classes) is not None:
        return None
    return (
        f"its own classes ({_listed(names) or 'unnamed'}) are not the data's, by name; if they are in truth, say so in "
        "id2label of its config.json"
    )
