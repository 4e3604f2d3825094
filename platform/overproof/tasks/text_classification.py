"""Text classification: a text with a class each, judged by accuracy.

Shapes: B rows, T tokens in a row, R texts, K train texts, V classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from overproof.config.base import Section
from overproof.config.data import BpeTokenizer, DataSection, HeldOutNearDuplicates, NearDuplicates
from overproof.data.manifest import TOKENIZER
from overproof.errors import InputError, suggest_name
from overproof.models.base import DataShape, Prediction
from overproof.tasks.array_task import RowsTask
from overproof.tasks.base import CardWords, FurtherMetric, Loss, QualityMetric
from overproof.tasks.class_metrics import CLASS_METRICS
from overproof.tasks.http import MOST_ROWS, ClassReply, ModelRequest, RowReply, UnicodeText
from overproof.tasks.image_classification import classified, same_classes

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from overproof.config import Evaluate
    from overproof.data.manifest import Manifest
    from overproof.data.source_files import FileListing
    from overproof.stage_context import StageContext
    from overproof.tasks.recognition import ColumnFlags, DataLook, Recognised
    from overproof.tasks.texts import Labelling

    Batch = dict[str, Tensor]

LISTED = 20  # classes, in a card
MOST_CHARACTERS = 100_000  # of a text in a request
SHOWN = 60  # characters of a text, on a line


class _Columns(Section):
    path: str
    text: str = Field("text", description="Key or column of the text.")
    label: str = Field("label", description="Key or column of the class or classes: names, or whole numbers.")


class JsonlTexts(_Columns):
    """JSON Lines; a line is an object with a text and its class."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(description="A .jsonl file or a folder of them, or a URI.")


class CsvTexts(_Columns):
    """CSV with a header line; quoted texts may hold line breaks."""

    kind: Literal["csv"] = "csv"
    path: str = Field(description="A .csv file or a folder of them, or a URI.")


class ParquetTexts(_Columns):
    """Parquet; a row is a text and its class."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="A .parquet file or a folder of them, or a URI.")


class TextFolder(Section):
    """A folder of texts for each class, named as the class is: ROOT/sport/1.txt."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="Folder, or a URI such as s3://bucket/folder.")


TextsSource = JsonlTexts | CsvTexts | ParquetTexts | TextFolder


class ModelTokenizer(Section):
    """A starting model's own tokenizer: any that the `tokenizers` library reads, with the special tokens it adds."""

    kind: Literal["file"] = "file"
    path: str = Field(description="A tokenizer.json, or the Hugging Face directory that has it.")


ClassWeights = Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None


class LabelledTextsData(DataSection):
    """Texts with classes, split class by class and by content, and cut to one number of tokens."""

    tokenizer: BpeTokenizer | ModelTokenizer = Field(BpeTokenizer(vocab_size=8192), discriminator="kind")
    sequence_length: int = Field(
        128, ge=4, le=8192, description="Tokens in a row, special ones included; what is longer is cut, and counted."
    )
    near_duplicates: HeldOutNearDuplicates = NearDuplicates()


class TextClassificationData(LabelledTextsData):
    """Texts with a class each, split class by class and by content, and cut to one number of tokens."""

    kind: Literal["text_classification"] = "text_classification"
    source: TextsSource = Field(discriminator="kind")
    class_weights: ClassWeights = Field(
        None,
        description="How much a text counts in the losses: balanced, by how rare its class is; or a number for each "
        "class, 1 where there is none. They are scaled to a mean of 1.",
    )


@dataclass(frozen=True)
class OneClass:
    """A text has one class; see ``Labelling``."""

    class_weights: ClassWeights = None
    differing: str = "texts of several classes"
    details: Mapping[str, Any] = field(default_factory=dict)

    def read(self, where: str, value: Any) -> tuple[str, ...]:
        from overproof.tasks.labelled_text_files import as_class

        if isinstance(value, list):
            raise InputError(
                f"{where}: the class is a list of {len(value)}; expected one class: texts with several of them are "
                "data.kind 'multi_label_text_classification'"
            )
        return (as_class(where, value),)

    def encode(self, there_RV: NDArray[np.bool_]) -> NDArray[np.int32]:
        labels_R: NDArray[np.int32] = there_RV.argmax(1).astype(np.int32)
        return labels_R

    def strata(self, there_RV: NDArray[np.bool_]) -> NDArray[np.int32]:
        return self.encode(there_RV)

    def shape(self, classes: int) -> tuple[int, int]:
        return 1, classes

    def weights(
        self, classes: list[str], there_RV: NDArray[np.bool_], train_K: NDArray[np.int64]
    ) -> NDArray[np.float32] | None:
        if self.class_weights is None:
            return None
        counts_V = there_RV[train_K].sum(0)
        weights_V = 1 / counts_V if self.class_weights == "balanced" else by_class(self.class_weights, classes)
        scaled_V = (weights_V * counts_V.sum() / (weights_V @ counts_V)).astype(np.float32)
        weights_R: NDArray[np.float32] = scaled_V[self.encode(there_RV)]
        return weights_R


def by_class(weights: Mapping[str, float], classes: list[str]) -> NDArray[np.float64]:
    """The weight of each class, 1 where none is given.

    Raises:
        InputError: a weight is of no class.
    """
    for name in weights:
        if name not in classes:
            near = suggest_name(name, classes)
            raise InputError(f"data.class_weights.{name}: there is no such class{near}; expected one of {classes}")
    return np.array([weights.get(name, 1.0) for name in classes])


def _written(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a text; found none")
    return text


class ClassifyTextsRequest(ModelRequest):
    """Body of POST /v1/classify for texts."""

    texts: list[Annotated[UnicodeText, Field(max_length=MOST_CHARACTERS), AfterValidator(_written)]] = Field(
        min_length=1, max_length=MOST_ROWS, description="Texts; of a long one the model reads the beginning."
    )


class LabelledTexts(RowsTask):
    """See ``Task`` and ``ArrayTask``: what tasks have in common whose texts have one class or several."""

    section: type[LabelledTextsData] = TextClassificationData
    unit, test_unit = "text", "text"
    quality = QualityMetric("accuracy", "accuracy", "share", higher_is_better=True, relative=False)
    further: tuple[FurtherMetric, ...] = CLASS_METRICS
    losses: frozenset[Loss] = frozenset({"outputs", "attention", "hidden_states"})
    speed, speed_unit = "texts_per_s", "texts/s"
    column = "tokens"
    label_column = "label"
    pipeline_tag = "text-classification"
    route = "/v1/classify"
    request = ClassifyTextsRequest
    template = "text_classification.yaml"
    row_reply: type[RowReply] = ClassReply

    def labelling(self, data: Any) -> Labelling:
        return OneClass(data.class_weights)

    def source_files(self, data: Any) -> FileListing:
        from overproof.tasks.labelled_text_files import text_files

        return text_files(data)

    def source_digest(self, data: Any) -> str:
        from overproof.tasks.texts import texts_digest

        return texts_digest(data)

    def shape(self, data: Any) -> DataShape:
        from overproof.tasks.texts import describe_texts

        labelling = self.labelling(data)
        details = describe_texts(data, labelling)
        positions, outputs = labelling.shape(len(details["classes"]))
        return DataShape(data.kind, outputs, positions, details)

    def prepare(self, context: StageContext) -> Manifest:
        from overproof.tasks.texts import prepare_texts

        return prepare_texts(context, self.labelling(context.recipe.data))

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """A classifier of texts on the columns ``tokens`` (B, T), ``label`` (B) and, where classes have one, ``weight``
        (B).
        """
        import torch

        from overproof.models.encoder import encoder_inputs

        targets_BP = batch["label"][:, None]
        logits_BPV = model(**encoder_inputs(batch["tokens"])).logits[:, None, :]
        mask_BP = batch["weight"][:, None] if "weight" in batch else torch.ones_like(targets_BP, dtype=torch.bool)
        return Prediction(logits_BPV, targets_BP, mask_BP)

    def segments(self, batch: Batch, states_BPD: Tensor) -> Tensor:
        from overproof.models.encoder import PADDING

        del states_BPD
        return batch["tokens"] != PADDING

    def inputs(self, request: ClassifyTextsRequest, details: Mapping[str, Any], package: Path) -> NDArray[np.float32]:
        from overproof.tasks.texts import encode_texts

        encoded = encode_texts(_tokenizer(package / TOKENIZER, details["sequence_length"]), request.texts)
        if encoded.empty:
            raise InputError(f"texts.{encoded.empty[0]}: the model's tokenizer finds no token in it; expected a text")
        return encoded.tokens_RT.astype(np.float32)

    def answers(self, logprobs_BV: NDArray[np.float32], details: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        return classified(logprobs_BV, details["classes"])

    def agree(self, one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
        return same_classes(one, other)

    def example(self, details: Mapping[str, Any]) -> dict[str, Any]:
        return {"texts": [details["example"]]}

    def describe_reply(self, body: Mapping[str, Any], reply: Mapping[str, Any]) -> str:
        first, text = reply["data"][0], shown(body["texts"][0])
        return f"{text!r} is classed as {first['name']} (probability {first['probabilities'][first['label']]:.3f})"

    def card(self, manifest: Manifest, settings: Evaluate) -> CardWords:
        del settings
        length, classes = manifest.details["sequence_length"], listed(manifest.details["classes"])
        return CardWords(
            summary=f"A classifier of texts of up to {length} tokens",
            intended_use=(
                f"It gives one of {classes} to a text, {what_is_read(manifest)}. It names one of them for texts of "
                "anything else, too, and was measured on its own data set alone. It was not tested for fairness."
            ),
            latency=f"one text, of {length} tokens at most",
        )


def shown(text: str) -> str:
    """A text, or how it begins."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def listed(classes: Sequence[str]) -> str:
    """How many classes there are, and which, for a card."""
    return f"{len(classes)} classes ({', '.join(classes[:LISTED])}{', ...' if len(classes) > LISTED else ''})"


def what_is_read(manifest: Manifest) -> str:
    """How much of a text a model reads, and how many of its texts were longer, for a card."""
    cut, rows = manifest.details["truncated"], sum(split.rows for split in manifest.splits.values())
    return (
        f"of which it reads the first {manifest.details['sequence_length']} tokens; {cut:,} of the {rows:,} texts it "
        "was made with were longer"
    )


@lru_cache(maxsize=16)
def _tokenizer(file: Path, length: int) -> Tokenizer:
    """A package's tokenizer; packages never change."""
    from overproof.tasks.texts import truncating_tokenizer

    return truncating_tokenizer(file.read_bytes(), file, length)


class TextClassification(LabelledTexts):
    """See ``Task`` and ``Shrinkable``."""

    def recognise(self, look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
        from overproof.tasks.labelled_text_recognition import recognise_labelled_texts

        return recognise_labelled_texts(look, model, flags, self.section, self.labelling)


TASK = TextClassification()
