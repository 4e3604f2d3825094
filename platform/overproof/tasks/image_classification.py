"""Image classification: images of one size, any number of channels and classes, judged by accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from overproof.config.base import Count, Section
from overproof.config.data import DataSection
from overproof.errors import InputError
from overproof.models.base import DataShape, Prediction
from overproof.tasks.array_task import RowsTask
from overproof.tasks.base import CardWords, Loss, QualityMetric
from overproof.tasks.class_metrics import CLASS_METRICS
from overproof.tasks.http import MOST_ROWS, ClassReply, ModelRequest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overproof.config import Evaluate
    from overproof.data.manifest import Manifest
    from overproof.data.source_files import FileListing
    from overproof.stage_context import StageContext
    from overproof.tasks.recognition import ColumnFlags, DataLook, Recognised

    Batch = dict[str, Tensor]


class DigitsSource(Section):
    """scikit-learn's bundled handwritten digits: 1,797 grey images of 8x8 pixels, ten classes."""

    kind: Literal["digits"] = "digits"


class ImageFolderSource(Section):
    """A folder of images for each class, named as the class is: ROOT/cat/1.png."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="Folder, or a URI such as s3://bucket/folder.")


class ImageParquetSource(Section):
    """Parquet with an encoded image (bytes, or a struct that has them as `bytes`) and a class in each row."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="A .parquet file or a folder of them.")
    image: str = Field("image", description="Column of the images.")
    label: str = Field("label", description="Column of the classes: whole numbers or names.")


ImageSource = DigitsSource | ImageFolderSource | ImageParquetSource


class ImageClassificationData(DataSection):
    """Images with a class each, split class by class; a pixel is a number from 0 to 1."""

    kind: Literal["image_classification"] = "image_classification"
    source: ImageSource = Field(DigitsSource(), discriminator="kind")
    height: Count | None = Field(None, description="Pixels that images are scaled to; null: all have one height.")
    width: Count | None = Field(None, description="Pixels that images are scaled to; null: all have one width.")
    channels: Literal[1, 3] | None = Field(None, description="1 is grey, 3 RGB; null takes what the first image has.")

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width belong together; expected both or none")
        return self


EXPECTED_PIXELS = "expected numbers from 0 to 1: one list, rows of one length, or channels of such rows"


def _pixels(value: Any, depth: int = 0) -> tuple[list[float], tuple[int, ...]]:
    """An image as numbers in one list, and how it was nested."""
    if not isinstance(value, list) or not value or depth > 2:
        raise ValueError(EXPECTED_PIXELS)
    if not isinstance(value[0], list):
        if not all(type(p) in (int, float) and math.isfinite(p) and 0 <= p <= 1 for p in value):
            raise ValueError(EXPECTED_PIXELS)
        return [float(p) for p in value], (len(value),)
    parts = [_pixels(part, depth + 1) for part in value]
    if len({shape for _, shape in parts}) > 1:
        raise ValueError(f"rows differ in length; {EXPECTED_PIXELS}")
    return [p for numbers, _ in parts for p in numbers], (len(value), *parts[0][1])


def _image(value: Any) -> list[float]:
    return _pixels(value)[0]


class ClassifyImagesRequest(ModelRequest):
    """Body of POST /v1/classify for images."""

    images: list[Annotated[list[float], BeforeValidator(_image)]] = Field(
        min_length=1,
        max_length=MOST_ROWS,
        description="Pixels from 0 to 1: flat, as rows, or as channels of rows.",
    )


class ImageClassification(RowsTask):
    """See ``Task`` and ``ArrayTask``."""

    section = ImageClassificationData
    unit, test_unit = "image", "image"
    quality = QualityMetric("accuracy", "accuracy", "share", higher_is_better=True, relative=False)
    further = CLASS_METRICS
    losses: frozenset[Loss] = frozenset({"outputs", "attention", "hidden_states"})
    speed, speed_unit = "images_per_s", "images/s"
    column = "pixels"
    label_column = "label"
    pipeline_tag = "image-classification"
    route = "/v1/classify"
    request, row_reply = ClassifyImagesRequest, ClassReply
    template = "image_classification.yaml"

    def recognise(self, look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
        from overproof.tasks.image_recognition import recognise_images

        return recognise_images(look, model, flags)

    def source_files(self, data: ImageClassificationData) -> FileListing:
        from overproof.tasks.images import image_files

        return image_files(data)

    def source_digest(self, data: ImageClassificationData) -> str:
        from overproof.tasks.images import image_digest

        return image_digest(data)

    def shape(self, data: ImageClassificationData) -> DataShape:
        from overproof.tasks.images import describe_images

        found = describe_images(data)
        return DataShape(data.kind, len(found["classes"]), 1, found)

    def prepare(self, context: StageContext) -> Manifest:
        from overproof.tasks.images import prepare_images

        return prepare_images(context)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """An image classifier on the columns ``pixels`` (B, C, H, W) and ``label`` (B)."""
        import torch

        targets_BP = batch["label"][:, None]
        logits_BPV = model(pixel_values=batch["pixels"]).logits[:, None, :]
        return Prediction(logits_BPV, targets_BP, torch.ones_like(targets_BP, dtype=torch.bool))

    def inputs(self, request: ClassifyImagesRequest, details: Mapping[str, Any], package: Path) -> NDArray[np.float32]:
        del package
        channels, height, width = (int(details[name]) for name in ("channels", "height", "width"))
        pixels = channels * height * width
        for number, image in enumerate(request.images):
            if len(image) != pixels:
                raise InputError(
                    f"images.{number}: found {len(image)} numbers; expected {pixels}: {channels} channels of {height} "
                    f"rows of {width}"
                )
        return np.array(request.images, np.float32)

    def answers(self, logprobs_BV: NDArray[np.float32], details: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        return classified(logprobs_BV, details["classes"])

    def agree(self, one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
        return same_classes(one, other)

    def example(self, details: Mapping[str, Any]) -> dict[str, Any]:
        grey = [0.5] * math.prod(int(details[name]) for name in ("channels", "height", "width"))
        return {"images": [details.get("example", grey)]}

    def describe_reply(self, body: Mapping[str, Any], reply: Mapping[str, Any]) -> str:
        del body
        first = reply["data"][0]
        return f"a test image is read as {first['name']} (probability {first['probabilities'][first['label']]:.3f})"

    def card(self, manifest: Manifest, settings: Evaluate) -> CardWords:
        del settings
        found = manifest.details
        kind = {1: "grey", 3: "RGB"}[found["channels"]]
        return CardWords(
            summary=f"A classifier of {kind} images of {found['height']}x{found['width']} pixels",
            intended_use=(
                f"It gives one of {len(found['classes'])} classes ({', '.join(found['classes'][:20])}"
                f"{', ...' if len(found['classes']) > 20 else ''}) to an image with values from 0 to 1. It names one "
                "of them for images of anything else, too, and was measured on its own data set alone."
            ),
            latency="one image",
        )


def classified(logprobs_BV: NDArray[np.float32], classes: Sequence[str]) -> list[dict[str, Any]]:
    """What is replied for rows that have a class each."""
    probabilities_BV = np.exp(logprobs_BV)
    return [
        {"index": i, "label": int(row.argmax()), "name": classes[int(row.argmax())], "probabilities": row.tolist()}
        for i, row in enumerate(probabilities_BV)
    ]


def same_classes(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every row has the same class in both: versions may number their classes differently."""
    return [answer["name"] for answer in one] == [answer["name"] for answer in other]


TASK = ImageClassification()
