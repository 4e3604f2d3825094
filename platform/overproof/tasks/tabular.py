"""Tables: classification of rows by accuracy, and regression by the root mean squared error.

A regression model gives a distribution over bins of the target, each as likely among the train rows, and predicts its
mean: the histogram loss (Imani and White, arXiv 1806.04613; Farebrother et al., arXiv 2403.03950). So what holds for
classes holds here: cross-entropy, distillation from the teacher's distribution, its cache, and parity in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from overproof.config.base import Section
from overproof.config.data import DataSection
from overproof.data.parquet_reader import Columns
from overproof.errors import InputError, suggest_name
from overproof.models.base import DataShape, Prediction
from overproof.tasks.array_task import RowsTask
from overproof.tasks.base import CardWords, FurtherMetric, Loss, QualityMetric
from overproof.tasks.class_metrics import CLASS_METRICS
from overproof.tasks.http import MOST_ROWS, ClassReply, ModelRequest, RowReply, UnicodeText
from overproof.tasks.image_classification import classified, same_classes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overproof.config import Evaluate
    from overproof.data.manifest import Manifest
    from overproof.data.source_files import FileListing
    from overproof.stage_context import StageContext
    from overproof.tasks.array_evaluation import Judge
    from overproof.tasks.recognition import ColumnFlags, DataLook, Recognised

    Batch = dict[str, Tensor]

LARGEST = float(np.finfo(np.float32).max)
LISTED = 20  # categories, in a message
INTERVAL = (0.05, 0.95)  # of a predicted distribution


def _cell(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("expected a number, text, true or false, or null")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        raise ValueError(f"expected a number between {-LARGEST:.3g} and {LARGEST:.3g}")
    return value


Cell = float | int | bool | str | None
AnyCell = Annotated[Any, BeforeValidator(_cell)]


class SklearnTableSource(Section):
    """A table that scikit-learn brings along."""

    kind: Literal["sklearn"] = "sklearn"
    name: Literal["breast_cancer", "wine", "diabetes"] = Field(description="Which; the target's column is `target`.")


class CsvTableSource(Section):
    """CSV with a header line."""

    kind: Literal["csv"] = "csv"
    path: str = Field(description="A .csv file or a folder of them, or a URI.")


class ParquetTableSource(Section):
    """Parquet; one row is one row."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="A .parquet file or a folder of them, or a URI.")


TableSource = SklearnTableSource | CsvTableSource | ParquetTableSource


class TableData(DataSection):
    """A table with a target column; text and true or false are categories, other columns numbers."""

    source: TableSource = Field(discriminator="kind")
    target: str = Field("target", description="Column to predict; rows that lack it are left out.")
    categorical: tuple[str, ...] = Field((), description="Columns of numbers that are categories.")
    drop: tuple[str, ...] = Field((), description="Columns that are not looked at.")

    @model_validator(mode="after")
    def _columns_have_one_use(self) -> Self:
        uses = [self.target, *self.categorical, *self.drop]
        twice = sorted({name for name in uses if uses.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: expected in one of target, categorical and drop alone")
        return self


class TabularClassificationData(TableData):
    """Rows of a table with a class each."""

    kind: Literal["tabular_classification"] = "tabular_classification"


class TabularRegressionData(TableData):
    """Rows of a table with a number each."""

    kind: Literal["tabular_regression"] = "tabular_regression"
    bins: int = Field(16, ge=2, le=1024, description="Bins of the target, each with as many train rows.")


class RowsRequest(ModelRequest):
    """Body of POST /v1/classify and /v1/predict for rows of a table."""

    rows: list[dict[UnicodeText, AnyCell]] = Field(
        min_length=1, max_length=MOST_ROWS, description="Values by column; null where one is missing."
    )


class NumberReply(RowReply):
    """A row whose number is predicted."""

    value: float = Field(description="The mean of the predicted distribution.")
    low: float = Field(description="Nine in ten of it lie from here on,")
    high: float = Field(description="up to here.")


class _Tabular(RowsTask):
    """What both kinds of tables have in common; see ``Task`` and ``ArrayTask``."""

    unit, test_unit = "row", "row"
    losses: frozenset[Loss] = frozenset({"outputs", "hidden_states"})
    speed, speed_unit = "rows_per_s", "rows/s"
    column = "features"
    label_column = "label"
    request = RowsRequest
    template = "tabular.yaml"

    def source_files(self, data: TableData) -> FileListing:
        from overproof.tasks.tables import table_files

        return table_files(data)

    def source_digest(self, data: TableData) -> str:
        from overproof.tasks.tables import table_digest

        return table_digest(data)

    def shape(self, data: TableData) -> DataShape:
        from overproof.tasks.tables import describe_table

        details = describe_table(data)
        return DataShape(data.kind, len(details["classes"]), 1, details)

    def prepare(self, context: StageContext) -> Manifest:
        from overproof.tasks.tables import prepare_table

        return prepare_table(context)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """A model of rows on the columns ``features`` (B, C) and ``label`` (B)."""
        import torch

        targets_BP = batch["label"][:, None]
        logits_BPV = model(features=batch["features"]).logits[:, None, :]
        return Prediction(logits_BPV, targets_BP, torch.ones_like(targets_BP, dtype=torch.bool))

    def inputs(self, request: RowsRequest, details: Mapping[str, Any], package: Path) -> NDArray[np.float32]:
        del package
        columns = {column["name"]: column for column in details["columns"]}
        return np.array([_encoded(row, f"rows.{i}", columns) for i, row in enumerate(request.rows)], np.float32)

    def example(self, details: Mapping[str, Any]) -> dict[str, Any]:
        return {"rows": [details["example"]]}


class TabularClassification(_Tabular):
    """Rows with a class each."""

    section = TabularClassificationData
    further = CLASS_METRICS
    quality = QualityMetric("accuracy", "accuracy", "share", higher_is_better=True, relative=False)
    pipeline_tag = "tabular-classification"
    row_reply = ClassReply
    route = "/v1/classify"

    def recognise(self, look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
        from overproof.tasks.table_recognition import recognise_table

        return recognise_table(look, model, flags, regression=False)

    def answers(self, logprobs_BV: NDArray[np.float32], details: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        return classified(logprobs_BV, details["classes"])

    def agree(self, one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
        return same_classes(one, other)

    def describe_reply(self, body: Mapping[str, Any], reply: Mapping[str, Any]) -> str:
        del body
        first = reply["data"][0]
        return f"a test row is classed as {first['name']} (probability {first['probabilities'][first['label']]:.3f})"

    def card(self, manifest: Manifest, settings: Evaluate) -> CardWords:
        del settings
        return CardWords(
            summary=f"A classifier of rows of {len(manifest.details['columns'])} columns",
            intended_use=_limits(manifest, f"It gives one of {len(manifest.details['classes'])} classes to a row."),
            latency="one row",
        )


class TabularRegression(_Tabular):
    """Rows with a number each."""

    section = TabularRegressionData
    further: tuple[FurtherMetric, ...] = ()
    quality = QualityMetric(
        "rmse", "root mean squared error", "the target's", higher_is_better=False, relative=True, power=0.5
    )
    pipeline_tag = "tabular-regression"
    judged_columns = ("value",)
    row_reply = NumberReply
    route = "/v1/predict"

    def recognise(self, look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
        from overproof.tasks.table_recognition import recognise_table

        return recognise_table(look, model, flags, regression=True)

    def judge(self, root: Path) -> Judge:
        """By squared errors of the predicted means; the first choice is the likeliest bin."""
        from overproof.data.manifest import Manifest
        from overproof.tasks.array_evaluation import Judged

        centres_V = np.array(Manifest.read(root).details["centres"])

        def judge(logprobs_UV: NDArray[np.float32], rows: Columns) -> Judged:
            errors_U = np.exp(logprobs_UV) @ centres_V - rows["value"]
            return Judged(np.square(errors_U, dtype=np.float64), logprobs_UV.argmax(1, keepdims=True).astype(np.int32))

        return judge

    def answers(self, logprobs_BV: NDArray[np.float32], details: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        """The mean, and the bins between which nine in ten of the predicted distribution lie."""
        centres_V, probabilities_BV = np.array(details["centres"]), np.exp(logprobs_BV.astype(np.float64))
        reached_BV = probabilities_BV.cumsum(1) / probabilities_BV.sum(1, keepdims=True)
        ends = [np.minimum((reached_BV < share).sum(1), len(centres_V) - 1) for share in INTERVAL]
        return [
            {"index": i, "value": float(mean), "low": float(centres_V[low]), "high": float(centres_V[high])}
            for i, (mean, low, high) in enumerate(zip(probabilities_BV @ centres_V, *ends, strict=True))
        ]

    def agree(self, one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
        """Each value lies between the other's ends; every version has bins of its own."""
        return all(
            a["low"] <= b["value"] <= a["high"] and b["low"] <= a["value"] <= b["high"]
            for a, b in zip(one, other, strict=True)
        )

    def describe_reply(self, body: Mapping[str, Any], reply: Mapping[str, Any]) -> str:
        del body
        first = reply["data"][0]
        return f"of a test row {first['value']:.4g} is predicted ({first['low']:.4g} to {first['high']:.4g})"

    def card(self, manifest: Manifest, settings: Evaluate) -> CardWords:
        del settings
        return CardWords(
            summary=f"A regression of rows of {len(manifest.details['columns'])} columns",
            intended_use=_limits(manifest, "It gives a number to a row, the mean of a distribution over bins."),
            latency="one row",
        )


def _limits(manifest: Manifest, what: str) -> str:
    names = [column["name"] for column in manifest.details["columns"]]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"{what} Its columns are {shown}. It was measured on its own data set alone, and knows no others."


def _encoded(row: Mapping[str, Cell], where: str, columns: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """A row of a request as the model takes it."""
    for name in row:
        if name not in columns:
            raise InputError(
                f"{where}.{name}: there is no such column{suggest_name(name, columns)}; expected {', '.join(columns)}"
            )
    absent = next((name for name in columns if name not in row), None)
    if absent is not None:
        raise InputError(f"{where}: found no {absent!r}; expected every column, null where a value is missing")
    return [encode_cell(row[name], column, f"{where}.{name}") for name, column in columns.items()]


def encode_cell(value: Cell, column: Mapping[str, Any], where: str) -> float:
    """A value as the model takes it: a number, the number of a category, or not a number where it is missing.

    Raises:
        InputError: it is of another kind, or a category that the train rows do not have.
    """
    if value is None or value != value:
        return float("nan")
    if column["categories"]:
        known = column["categories"]
        for category in _as_text(value):
            if category in known:
                return float(known.index(category))
        listed = ", ".join(known[:LISTED]) + (", ..." if len(known) > LISTED else "")
        near = suggest_name(str(value), known)
        raise InputError(f"{where}: category {str(value)!r} is unknown{near}; expected one of {listed}")
    if isinstance(value, bool | str):
        raise InputError(f"{where}: found {value!r}; expected a number, or null")
    if not -LARGEST <= value <= LARGEST:
        raise InputError(f"{where}: found {value:.3g}; expected a number between {-LARGEST:.3g} and {LARGEST:.3g}")
    return float(value)


def _as_text(value: float | int | bool | str) -> list[str]:
    """How Arrow may have written a category: a whole number stands in a column of either kind of numbers."""
    if isinstance(value, bool | str):
        return [str(value).lower() if isinstance(value, bool) else value]
    whole = [str(int(value))] if value == value // 1 else []
    return [*whole, str(pc.cast(pa.scalar(float(value)), pa.string()).as_py())]


CLASSIFICATION = TabularClassification()
REGRESSION = TabularRegression()
