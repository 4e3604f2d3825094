"""Images of any source as shards: read, scaled where the recipe asks for it, split class by class, and written.

Shapes: R images, C channels, H rows, W columns of pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import fs

from overproof.data.columns import row_bytes
from overproof.data.manifest import Column, Manifest, shard_schema
from overproof.data.parquet_columns import PARQUET, iter_columns, open_parquet
from overproof.data.source_files import (
    FileListing,
    SourceFile,
    SourceReading,
    UnreadableFile,
    describe_skipped,
    having_suffix,
    list_source,
    naming_faults,
    open_content,
)
from overproof.data.sources import sha256_of
from overproof.data.stratified import require_train_rows, stratified, train_without_copies, write_splits
from overproof.errors import InputError
from overproof.files import filesystem
from overproof.stage_context import Notice, StageContext, TaskProgress

if TYPE_CHECKING:
    from overproof.tasks.image_classification import ImageClassificationData

BRIGHTEST_DIGIT = 16.0
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SAY_EVERY = 500  # images
HELD_OUT_COPIES = "copies of held-out images"  # reason to leave train images out
LARGEST_EXAMPLE = 4096  # numbers of a test image that goes with the model as an example
Encoded = tuple[str, bytes, str]  # where it is from, an image file's content, its class


def image_digest(data: ImageClassificationData) -> str:
    """Sha256, in hex, over the names, sizes and times of a source's files.

    Raises:
        InputError: there are none.
    """
    if data.source.kind == "digits":
        return sha256_of(["scikit-learn", version("scikit-learn")])
    return sha256_of(image_files(data).identity)


def describe_images(data: ImageClassificationData) -> dict[str, Any]:
    """What models must fit: channels, height, width and the names of the classes, in the order of their numbers.

    Raises:
        InputError: an image cannot be read.
    """
    if data.source.kind == "digits":
        found = {"channels": 1, "height": 8, "width": 8}
        classes = [str(digit) for digit in range(10)]
    else:
        reading = SourceReading(image_files(data), data.on_error)
        decoded = next(_decoded_images(data, reading, None, most=1), None)
        if decoded is None:
            raise InputError(f"data.source.path: {data.source.path}: no image; expected one at least")
        found = dict(zip(("channels", "height", "width"), decoded[0].shape, strict=True))
        classes = _classes(data)
    found |= {"channels": data.channels or found["channels"], "height": data.height or found["height"]}
    return found | {"width": data.width or found["width"], "classes": classes}


def prepare_images(context: StageContext) -> Manifest:
    """Read, scale, split by class, permute and write.

    Raises:
        InputError: an image is not one or differs in size, a split is left empty, or there are more shards than row
            groups.
    """
    data: Any = context.recipe.data
    details = describe_images(data)
    reading = SourceReading(image_files(data), data.on_error)
    shape = (details["channels"], details["height"], details["width"])
    columns = (Column(name="pixels", dtype="<f4", shape=shape), Column(name="label", dtype="<i4"))
    if data.source.kind == "digits":
        pixels_RCHW, labels_R = _digits(data, shape)
    else:
        numbers = {name: number for number, name in enumerate(details["classes"])}
        pixels, labels = [], []
        for image, label in _decoded_images(data, reading, shape):
            pixels.append(image)
            labels.append(numbers[label])
            if len(pixels) % SAY_EVERY == 0:
                size = len(pixels) * row_bytes(shard_schema(columns)) / 1e6
                context.progress(TaskProgress("prepare", 0, 2, f"{len(pixels):,} images read, {size:,.0f} MB"))
        pixels_RCHW, labels_R = np.stack(pixels), np.array(labels, np.int32)
        for line in describe_skipped(reading.skipped):
            context.progress(Notice(line))
    context.progress(TaskProgress("prepare", 1, 2, f"writing {len(labels_R):,} images"))
    rows = {"pixels": pixels_RCHW, "label": labels_R}
    splits = stratified(labels_R, data.validation_fraction, data.test_fraction, context.recipe.seed)
    trained = len(splits["train"])
    splits["train"] = train_without_copies(pixels_RCHW, splits)
    require_train_rows(labels_R, splits["train"], details["classes"], data, "images")
    written = write_splits(rows, splits, columns, data, context.draft.uri, "images")
    pixels_N = written.example["pixels"].ravel()
    example = {"example": pixels_N.tolist()} if len(pixels_N) <= LARGEST_EXAMPLE else {}
    return Manifest(
        task=data.kind,
        columns=columns,
        splits=written.splits,
        rows_per_group=data.rows_per_group,
        positions=1,
        outputs=len(details["classes"]),
        dropped={HELD_OUT_COPIES: trained - len(splits["train"])},
        skipped=reading.counts,
        details=details | example,
    )


def _digits(data: ImageClassificationData, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images_RHW = (bundled.images / BRIGHTEST_DIGIT).astype(np.float32)
    labels_R = bundled.target.astype(np.int32)
    if shape == (1, 8, 8):
        return images_RHW[:, None], labels_R
    from PIL import Image

    scaled = [
        _pixels(Image.fromarray((255 * image_HW).astype(np.uint8)), data, shape[0], shape[1:])
        for image_HW in images_RHW
    ]
    return np.stack(scaled), labels_R


def image_files(data: ImageClassificationData) -> FileListing:
    """The files of a recipe's section; none of what scikit-learn has.

    Raises:
        InputError: there are none.
    """
    source: Any = data.source
    if source.kind == "digits":
        return FileListing("", ())
    suffixes = (".parquet",) if source.kind == "parquet" else SUFFIXES
    return list_source(source.path, having_suffix(*suffixes), " ".join(suffixes), data.on_error)


def _encoded(data: Any, file: SourceFile, path: str) -> Iterator[Encoded]:
    """Every image of a file."""
    files, _ = filesystem(data.source.path)
    if data.source.kind == "parquet":
        yield from _parquet_images(files, path, data.source)
        return
    label, slash, _ = file.name.partition("/")
    if not slash:
        raise InputError(f"{path}: lies beside the classes' folders; expected {data.source.path}/CLASS/{label}")
    with naming_faults(path, "an image"), open_content(files, path) as stream:
        yield path, stream.read(), label


def _decoded_images(
    data: Any, reading: SourceReading, shape: tuple[int, ...] | None, most: int | None = None
) -> Iterator[tuple[NDArray[np.float32], str]]:
    """Every image of a source with its class, in the order of files and rows; of each file ``most``."""

    def read(file: SourceFile) -> Iterator[tuple[NDArray[np.float32], str]]:
        for encoded in islice(_encoded(data, file, reading.listing.path(file)), most):
            yield _decoded(encoded, data, shape), encoded[2]

    return reading.each_file(read)


def _parquet_images(files: fs.FileSystem, path: str, source: Any) -> Iterator[Encoded]:
    with naming_faults(path, PARQUET), files.open_input_file(path) as handle:
        names = open_parquet(handle).schema_arrow.names
        for name in (source.image, source.label):
            if name not in names:
                raise InputError(f"{path}: columns are {', '.join(names)}; expected {name!r}")
        row = 0
        for batch in iter_columns(handle, path, [source.image, source.label]):
            for image, label in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                content = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(content, bytes) or label is None:
                    raise InputError(f"{path}, row {row}: no image bytes or no class; expected both")
                yield f"{path}, row {row}", content, str(label)
                row += 1


def _classes(data: Any) -> list[str]:
    """Names of the classes: numbers in their order, else by name."""
    reading = SourceReading(image_files(data), data.on_error)
    if data.source.kind == "folder":
        names = {file.name.split("/")[0] for file in reading.listing.files}
    else:
        names = set(reading.each_file(lambda file: (e[2] for e in _encoded(data, file, reading.listing.path(file)))))
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def _decoded(encoded: Encoded, data: Any, shape: tuple[int, ...] | None) -> NDArray[np.float32]:
    """An image (C, H, W) with values from 0 to 1; ``shape`` is what it must come to."""
    from PIL import Image, UnidentifiedImageError

    where, content, _ = encoded
    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            channels = data.channels or (shape[0] if shape else 1 if opened.mode in ("1", "L", "I;16") else 3)
            found = _pixels(opened, data, channels, None)
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableFile(
            f"{where}: not an image: {error}; expected one of {' '.join(SUFFIXES)}", "damaged, or not an image"
        ) from None
    if shape is not None and found.shape != shape:
        raise InputError(
            f"{where}: {found.shape[1]} x {found.shape[2]} pixels, the first has {shape[1]} x {shape[2]}; expected "
            "images of one size: set data.height and data.width to have them scaled"
        )
    return found


def _pixels(image: Any, data: Any, channels: int, size: tuple[int, ...] | None) -> NDArray[np.float32]:
    converted = image.convert("L" if channels == 1 else "RGB")
    height, width = size or (data.height, data.width)
    if height is not None:
        converted = converted.resize((width, height))
    values_HWC = np.asarray(converted, np.float32).reshape(converted.height, converted.width, channels) / 255
    return np.ascontiguousarray(values_HWC.transpose(2, 0, 1))
