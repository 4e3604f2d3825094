"""Whether data are images with a class each, and how their recipe names them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from overproof.data.parquet_columns import is_text, iter_columns
from overproof.data.source_files import SourceFile, SourceReading, data_suffix, naming_faults
from overproof.files import filesystem, join_uri
from overproof.tasks.images import SUFFIXES
from overproof.tasks.recognition import (
    ColumnFlags,
    DataLook,
    Fit,
    Misfit,
    Question,
    Recognised,
    choose_column,
)
from overproof.tasks.table_samples import is_bytes
from overproof.units import format_count

LOOKED_AT = 32  # images, for their sizes
MOST_PATCHES, FEWEST_PATCHES, SMALLEST_PATCH = 64, 4, 2
CLASS_NAMES = ("label", "class", "target", "category")
SPLITS = frozenset({"train", "training", "valid", "val", "validation", "dev", "eval", "test", "testing"})


def recognise_images(look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
    """A folder for each class, or Parquet with a column of encoded images."""
    named = sum(look.files.get(suffix, 0) for suffix in SUFFIXES)
    if ".parquet" in look.files and not named:
        found = _parquet(look, flags)
    elif named:
        found = _folders(look)
    else:
        found = Misfit(f"no images: {look.described}")
    return _sized(found, look, model, flags) if isinstance(found, Fit) else found


def _folders(look: DataLook) -> Recognised:
    images = look.named(*SUFFIXES)
    if any("/" not in name for name in images):
        return Misfit(f"images lie beside the classes' folders; expected {join_uri(look.path, 'CLASS')}/{images[0]}")
    classes = sorted({name.split("/")[0] for name in images})
    if all(name.lower() in SPLITS for name in classes):
        found = ", ".join(classes)
        return Misfit(f"the folders are called like splits ({found}); expected one for each class: give one of those")
    if len(classes) < 2:
        return Misfit(f"one class alone: {classes[0]}; expected a folder for each of two or more")
    why = f"{len(images):,} in {format_count(len(classes), 'class')}, one for each folder"
    return Fit(
        {"source": {"kind": "folder", "path": look.path}},
        rows=len(images),
        units=len(images),
        reasons={"images": why},
        values={"classes": classes},
        flags=frozenset({"--image-size"}),
    )


def _parquet(look: DataLook, flags: ColumnFlags) -> Recognised:
    sample = look.sample(".parquet")
    if isinstance(sample, Misfit):
        return sample
    encoded = sample.columns(lambda kind: is_bytes(kind) or _holds_bytes(kind))
    image = choose_column(sample, flags.image, "--image", ("image", "img", "picture"), encoded, "the image")
    if not isinstance(image, tuple):
        return image
    named = sample.columns(is_text, pa.types.is_integer, pa.types.is_dictionary)
    labels = [name for name in named if name != image[0]]
    label = choose_column(sample, flags.label, "--label", CLASS_NAMES, labels, "the class")
    if not isinstance(label, tuple):
        return label
    classes = _classes(look, label[0])
    if len(classes) < 2:
        return Misfit(f"column {label[0]!r} has {len(classes)} value; expected two classes or more")
    source = {"kind": "parquet", "path": look.path, "image": image[0], "label": label[0]}
    found = f"{format_count(len(classes), 'class')} in {label[0]!r}: {label[1]}"
    why = f"{sample.total_rows:,}; column {image[0]!r}: {image[1]}; {found}"
    return Fit(
        {"source": source},
        rows=sample.total_rows,
        units=sample.total_rows,
        reasons={"images": why},
        values={"classes": classes},
        flags=frozenset({"--image", "--label", "--image-size"}),
    )


def _classes(look: DataLook, label: str) -> list[str]:
    """Of every row: a column of labels is quickly read."""
    files, _ = filesystem(look.path)
    tables = [file for file in look.listing.files if data_suffix(file.name) == ".parquet"]
    reading = SourceReading(replace(look.listing, files=tuple(tables)), look.on_error)

    def read(file: SourceFile) -> Iterator[str]:
        path = look.listing.path(file)
        with naming_faults(path, "parquet"), files.open_input_file(path) as handle:
            for batch in iter_columns(handle, path, [label]):
                yield from (str(value) for value in batch.column(0).unique().to_pylist() if value is not None)

    return sorted(set(reading.each_file(read)))


def _holds_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(part.name == "bytes" and is_bytes(part.type) for part in kind)


def _sized(found: Fit, look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
    """With the pixels that images are scaled to, and the patches of a model that is trained here."""
    sizes = sorted(set(_sizes(found.data["source"], look)))
    if not sizes:
        return Misfit("the first images cannot be read as images")
    data, reasons, refit = dict(found.data), dict(found.reasons), None
    if model is not None:
        edges = model.get("image_size")
        height, width = (edges, edges) if isinstance(edges, int) else edges or sizes[0]
        if flags.image_size is not None and (height, width) != (flags.image_size, flags.image_size):
            return Question("--image-size", f"MODEL takes {height} x {width} pixels; leave the flag out")
        data |= {"height": height, "width": width, "channels": model.get("num_channels")}
        reasons["size"] = f"{height} x {width} pixels, as the model takes them"
        refit = _other_classes(model, found.values["classes"])
    elif flags.image_size is not None:
        height = width = flags.image_size
        data |= {"height": height, "width": width}
        reasons["size"] = f"scaled to {height} x {width} pixels, as asked"
    elif len(sizes) > 1:
        shown = ", ".join(f"{h} x {w}" for h, w in sizes[:4])
        return Question("--image-size", f"images differ in size ({shown}); give the pixels that both edges become")
    else:
        height, width = sizes[0]
        reasons["size"] = f"{height} x {width} pixels, as they are"
    patch = _patch(height, width) if model is None else None
    if model is None and patch is None:
        return Question(
            "--image-size",
            f"images of {height} x {width} pixels do not fall into {FEWEST_PATCHES} to {MOST_PATCHES} equal squares; "
            "give the pixels that both edges become, such as 32 or 64",
        )
    return Fit(data, found.rows, found.units, reasons, {"patch_size": patch}, refit, found.flags)


def _patch(height: int, width: int) -> int | None:
    """The finest patches of which there are not too many."""
    common = math.gcd(height, width)
    fitting = (edge for edge in range(SMALLEST_PATCH, common + 1) if common % edge == 0)
    return next((e for e in fitting if FEWEST_PATCHES <= height * width // e**2 <= MOST_PATCHES), None)


def _other_classes(model: Mapping[str, Any], classes: list[str]) -> str | None:
    """Why a model's classes are not the data's, by name and number."""
    names = model.get("id2label") or {}
    told = [str(names[key]) for key in sorted(names, key=int)]
    numbered = sorted(classes, key=int) if all(name.isdecimal() for name in classes) else sorted(classes)
    if told == numbered:
        return None
    return f"its classes ({', '.join(told[:3]) or 'unnamed'}, ...) are not named and numbered as the data's"


def _sizes(source: Mapping[str, Any], look: DataLook) -> Iterator[tuple[int, int]]:
    from PIL import Image, UnidentifiedImageError

    for content in _contents(source, look):
        try:
            with Image.open(io.BytesIO(content)) as opened:
                yield opened.height, opened.width
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
            continue  # `prepare` names it


def _contents(source: Mapping[str, Any], look: DataLook) -> Iterator[bytes]:
    """Some images as they are stored: of folders evenly spread, of Parquet the first ones."""
    if source["kind"] == "folder":
        images = look.named(*SUFFIXES)
        for name in images[:: max(1, len(images) // LOOKED_AT)]:
            with naming_faults(name, "an image"), look.content(name) as stream:
                yield stream.read()
        return
    path = f"{look.listing.root}/{look.named('.parquet')[0]}"
    files, _ = filesystem(look.path)
    with naming_faults(path, "parquet"), files.open_input_file(path) as handle:
        for image in next(iter_columns(handle, path, [source["image"]], batch_size=LOOKED_AT)).column(0).to_pylist():
            content = image.get("bytes") if isinstance(image, dict) else image
            if isinstance(content, bytes):
                yield content
