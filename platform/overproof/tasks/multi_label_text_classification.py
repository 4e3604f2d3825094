"""Classification of texts with several classes each, or none: as many yes-or-no predictions as there are classes.

Each is a prediction of two outputs, absent and there. So what holds for classes holds here: cross-entropy is the binary
one, the divergence that of Bernoulli distributions, and the teacher's cache holds both outputs of each class.

Shapes: B rows, R texts, U test units, V classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from overproof.data.parquet_reader import Columns
from overproof.errors import InputError
from overproof.models.base import Prediction
from overproof.models.encoder import MULTI_LABEL
from overproof.tasks.base import CardWords
from overproof.tasks.http import RowReply
from overproof.tasks.label_metrics import LABEL_METRICS, MICRO_F1, label_columns
from overproof.tasks.text_classification import (
    ClassWeights,
    CsvTexts,
    JsonlTexts,
    LabelledTexts,
    LabelledTextsData,
    ParquetTexts,
    by_class,
    listed,
    shown,
    what_is_read,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overproof.config import Evaluate
    from overproof.data.manifest import Manifest
    from overproof.tasks.array_evaluation import Judge, Judged
    from overproof.tasks.recognition import ColumnFlags, DataLook, Recognised
    from overproof.tasks.texts import Labelling

    Batch = dict[str, Tensor]


class MultiLabelTextClassificationData(LabelledTextsData):
    """Texts with any number of classes each, split by their rarest class and by content, and cut to one length."""

    kind: Literal["multi_label_text_classification"] = "multi_label_text_classification"
    source: JsonlTexts | CsvTexts | ParquetTexts = Field(discriminator="kind")
    separator: str | None = Field(
        None, min_length=1, description="What stands between a text's classes, such as ';'; null: they are a list."
    )
    threshold: float = Field(
        0.5, gt=0, lt=1, description="A class is given to a text from this probability on; metrics go by it, too."
    )

    class_weights: ClassWeights = Field(
        None,
        description="How much it counts in the losses that a class is there: balanced, in all as much as that it is "
        "absent; or a number for each class, 1 where there is none, by that of its absence. Each class's weights are "
        "scaled to a mean of 1.",
    )

    @model_validator(mode="after")
    def _separator_of_csv(self) -> Self:
        if self.source.kind == "csv" and self.separator is None:
            raise ValueError("separator is null, and CSV holds no lists; expected what stands between classes, as ';'")
        return self


@dataclass(frozen=True)
class SeveralClasses:
    """A text has any number of classes; see ``Labelling``."""

    separator: str | None
    threshold: float
    class_weights: ClassWeights = None
    differing: str = "texts whose classes differ"

    @property
    def details(self) -> Mapping[str, Any]:
        return {"problem_type": MULTI_LABEL, "threshold": self.threshold}

    def read(self, where: str, value: Any) -> tuple[str, ...]:
        from overproof.tasks.labelled_text_files import as_class

        if isinstance(value, str) and self.separator is not None:
            value = [part.strip() for part in value.split(self.separator)] if value.strip() else []
        if not isinstance(value, list):
            found = "missing" if value is None else f"{value!r:.60}, {type(value).__name__}"
            raise InputError(
                f"{where}: the classes are {found}; expected a list of them, [] for none; text with something between "
                "them needs data.separator; of one class each, data.kind is 'text_classification'"
            )
        return tuple(as_class(f"{where}, class {number} of {len(value)}", name) for number, name in enumerate(value, 1))

    def encode(self, there_RV: NDArray[np.bool_]) -> NDArray[np.int32]:
        return there_RV.astype(np.int32)

    def strata(self, there_RV: NDArray[np.bool_]) -> NDArray[np.int32]:
        """By each text's rarest class: a common one finds its way into every split by itself."""
        rarest_R = np.where(there_RV, there_RV.sum(0), len(there_RV) + 1).argmin(1)
        strata_R: NDArray[np.int32] = np.where(there_RV.any(1), rarest_R, there_RV.shape[1]).astype(np.int32)
        return strata_R

    def shape(self, classes: int) -> tuple[int, int]:
        return classes, 2

    def weights(
        self, classes: list[str], there_RV: NDArray[np.bool_], train_K: NDArray[np.int64]
    ) -> NDArray[np.float32] | None:
        if self.class_weights is None:
            return None
        counts_V = there_RV[train_K].sum(0)
        absent_V = len(train_K) - counts_V
        if self.class_weights == "balanced":
            weights_V = absent_V.clip(1) / counts_V
        else:
            weights_V = by_class(self.class_weights, classes)
        scale_V = len(train_K) / (weights_V * counts_V + absent_V)
        weights_RV: NDArray[np.float32] = np.where(there_RV, weights_V * scale_V, scale_V).astype(np.float32)
        return weights_RV


class LabelsReply(RowReply):
    """A text that has any number of classes."""

    labels: list[int] = Field(description="Numbers of the classes whose probability is `details.threshold` or more.")
    names: list[str] = Field(description="Their names.")
    probabilities: list[float] = Field(
        description="Of each class being there, in the order of the model's `details.classes`; they need not sum to 1."
    )


class MultiLabelTextClassification(LabelledTexts):
    """See ``Task``, ``ArrayTask`` and ``Shrinkable``."""

    section = MultiLabelTextClassificationData
    unit = "label"
    quality = MICRO_F1
    further = LABEL_METRICS
    row_reply = LabelsReply

    def recognise(self, look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
        from overproof.tasks.labelled_text_recognition import recognise_texts_of_several

        return recognise_texts_of_several(look, model, flags, self.section, self.labelling)

    def labelling(self, data: Any) -> Labelling:
        return SeveralClasses(data.separator, data.threshold, data.class_weights)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """A classifier of texts on the columns ``tokens`` (B, T), ``label`` (B, V), 1 where a class is there, and,
        where classes have one, ``weight`` (B, V).
        """
        import torch

        from overproof.models.encoder import encoder_inputs, label_logits

        logits_BV2 = label_logits(model(**encoder_inputs(batch["tokens"])).logits)
        everywhere_BV = torch.ones_like(batch["label"], dtype=torch.bool)
        return Prediction(logits_BV2, batch["label"], batch.get("weight", everywhere_BV))

    def judge(self, root: Path) -> Judge:
        from overproof.data.manifest import Manifest

        return partial(_judge, threshold=Manifest.read(root).details["threshold"])

    def divergences(self, teacher_BV: NDArray[np.float32], found_BV: NDArray[np.float32]) -> NDArray[np.float32]:
        from overproof.tasks.divergence import of_labels

        return of_labels(teacher_BV, found_BV)

    def answers(self, logprobs_BV: NDArray[np.float32], details: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        """Every class's probability of being there, and the classes from the threshold on."""
        given_BV = _given(logprobs_BV, details["threshold"])
        return [
            {
                "index": row,
                "labels": np.flatnonzero(given_V).tolist(),
                "names": [details["classes"][label] for label in np.flatnonzero(given_V)],
                "probabilities": np.exp(logprobs_V).tolist(),
            }
            for row, (given_V, logprobs_V) in enumerate(zip(given_BV, logprobs_BV, strict=True))
        ]

    def agree(self, one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every row has the same classes in both: versions may number their classes differently."""
        return [set(answer["names"]) for answer in one] == [set(answer["names"]) for answer in other]

    def describe_reply(self, body: Mapping[str, Any], reply: Mapping[str, Any]) -> str:
        first = reply["data"][0]
        given = [
            f"{name} ({first['probabilities'][i]:.3f})" for i, name in zip(first["labels"], first["names"], strict=True)
        ]
        return f"{shown(body['texts'][0])!r} is given {', '.join(given) or 'no class'}"

    def card(self, manifest: Manifest, settings: Evaluate) -> CardWords:
        words = super().card(manifest, settings)
        classes, threshold = listed(manifest.details["classes"]), manifest.details["threshold"]
        return CardWords(
            summary=words.summary,
            intended_use=(
                f"It gives any number of {classes} to a text, {what_is_read(manifest)}: those whose probability is "
                f"{threshold:g} or more. It was measured on its own data set alone. It was not tested for fairness."
            ),
            latency=words.latency,
        )


def _given(logprobs_BV: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    given_BV: NDArray[np.bool_] = logprobs_BV >= math.log(threshold)
    return given_BV


def _judge(logprobs_UV: NDArray[np.float32], columns: Columns, threshold: float) -> Judged:
    """A ``Judge``, by the column ``label``: of micro F1."""
    from overproof.tasks.array_evaluation import Judged

    there_UV, given_UV = columns["label"] > 0, _given(logprobs_UV, threshold)
    return Judged(
        2.0 * (there_UV & given_UV).sum(1),
        given_UV.astype(np.int32),
        label_columns(there_UV, given_UV, logprobs_UV),
        there_UV.sum(1) + given_UV.sum(1),
    )


TASK = MultiLabelTextClassification()
