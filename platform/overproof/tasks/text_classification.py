"""Text classification: a text with a class each, judged by accuracy.

Shapes: B rows, T tokens in a row, V classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from overproof.config.base import Section
from overproof.config.data import BpeTokenizer, DataSection
from overproof.data.manifest import TOKENIZER
from overproof.errors import InputError
from overproof.models.base import DataShape, Prediction
from overproof.tasks.base import CardWords, FileScores, Loss, Metric, Quality, Tell
from overproof.tasks.class_metrics import CLASS_METRICS
from overproof.tasks.http import MOST_ROWS, ModelRequest, UnicodeText
from overproof.tasks.image_classification import classified, same_classes

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from overproof.config import Evaluate
    from overproof.data.manifest import Manifest
    from overproof.engines.probe import Say
    from overproof.export.base import Format
    from overproof.stage_context import StageContext
    from overproof.tasks.recognition import ColumnFlags, DataLook, Recognised

    Batch = dict[str, Tensor]

LISTED = 20  # classes, in a card
MOST_CHARACTERS = 100_000  # of a text in a request
SHOWN = 60  # characters of a text, on a line


class _Columns(Section):
    path: str
    text: str = Field("text", description="Key or column of the text.")
    label: str = Field("label", description="Key or column of the class: its name, or a whole number.")


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


class TextClassificationData(DataSection):
    """Texts with a class each, split class by class and by content, and cut to one number of tokens."""

    kind: Literal["text_classification"] = "text_classification"
    source: TextsSource = Field(discriminator="kind")
    tokenizer: BpeTokenizer | ModelTokenizer = Field(BpeTokenizer(vocab_size=8192), discriminator="kind")
    sequence_length: int = Field(
        128, ge=4, le=8192, description="Tokens in a row, special ones included; what is longer is cut, and counted."
    )
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="How much a text counts in the losses: balanced, by how rare its class is; or a number for each "
        "class, 1 where there is none. They are scaled to a mean of 1.",
    )


def _written(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a text; found none")
    return text


class ClassifyTextsRequest(ModelRequest):
    """Body of POST /v1/classify for texts."""

    texts: list[Annotated[UnicodeText, Field(max_length=MOST_CHARACTERS), AfterValidator(_written)]] = Field(
        min_length=1, max_length=MOST_ROWS, description="Texts; of a long one the model reads the beginning."
    )


class TextClassification:
    """See ``Task`` and ``ArrayTask``."""

    section = TextClassificationData
    unit, test_unit = "text", "text"
    quality = Quality("accuracy", "accuracy", "share", higher_is_better=True, relative=False)
    further = CLASS_METRICS
    losses: frozenset[Loss] = frozenset({"outputs", "attention", "hidden_states"})
    speed, speed_unit = "texts_per_s", "texts/s"
    label_column = "label"
    pipeline_tag = "text-classification"
    route = "/v1/classify"
    request = ClassifyTextsRequest
    template = "text_classification.yaml"

    def recognise(self, look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
        from overproof.tasks.labelled_text_recognition import recognise_labelled_texts

        return recognise_labelled_texts(look, model, flags, self.section)

    def source_digest(self, data: TextClassificationData) -> str:
        from overproof.tasks.texts import texts_digest

        return texts_digest(data)

    def shape(self, data: TextClassificationData) -> DataShape:
        from overproof.tasks.texts import describe_texts

        details = describe_texts(data)
        return DataShape(data.kind, len(details["classes"]), 1, details)

    def prepare(self, context: StageContext) -> Manifest:
        from overproof.tasks.texts import prepare_texts

        return prepare_texts(context)

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

    def feature_mask(self, batch: Batch, states_BPD: Tensor) -> Tensor:
        from overproof.models.encoder import PADDING

        del states_BPD
        return batch["tokens"] != PADDING

    def units(self, root: Path, most: int | None) -> NDArray[np.int64]:
        from overproof.tasks.array_evaluation import array_units

        return array_units(root, most)

    def score(
        self, file: Path, root: Path, units: NDArray[np.int64], settings: Evaluate, engine: str, format: Format,
        tell: Tell,
    ) -> FileScores:  # fmt: skip
        from overproof.tasks.array_evaluation import first_choices, score_arrays

        del format
        return score_arrays(file, root, units, engine, "tokens", first_choices, tell, score_s=settings.score_s)

    def probe(
        self, file: Path, root: Path, settings: Evaluate, engine: str, format: Format, say: Say
    ) -> dict[str, Metric]:
        from overproof.tasks.array_evaluation import measure_arrays

        reference = format.read_back(file)
        return measure_arrays(file, root, settings, engine, "tokens", reference, self.speed, "texts", say)

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
        first, text = reply["data"][0], body["texts"][0]
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        return f"{shown!r} is classed as {first['name']} (probability {first['probabilities'][first['label']]:.3f})"

    def card(self, manifest: Manifest, settings: Evaluate) -> CardWords:
        del settings
        found = manifest.details
        classes, length = found["classes"], found["sequence_length"]
        cut, rows = found["truncated"], sum(split.rows for split in manifest.splits.values())
        return CardWords(
            summary=f"A classifier of texts of up to {length} tokens",
            intended_use=(
                f"It gives one of {len(classes)} classes ({', '.join(classes[:LISTED])}"
                f"{', ...' if len(classes) > LISTED else ''}) to a text, of which it reads the first {length} tokens; "
                f"{cut:,} of the {rows:,} texts it was made with were longer. It names one of them for texts of "
                "anything else, too, and was measured on its own data set alone. It was not tested for fairness."
            ),
            latency=f"one text, as a row of {length} tokens",
        )


@lru_cache(maxsize=16)
def _tokenizer(file: Path, length: int) -> Tokenizer:
    """A package's tokenizer; packages never change."""
    from overproof.tasks.texts import read_tokenizer

    return read_tokenizer(file.read_bytes(), file, length)


TASK = TextClassification()
