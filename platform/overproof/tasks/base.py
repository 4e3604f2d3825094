"""What a task is: everything that differs between kinds of data, from the rows of a shard to the words of the card.

Shapes: B rows, P predictions in a row, V outputs, U test units, N predictions of all units in order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from overproof.config.data import DataSection
from overproof.engines.order_statistics import upper_bound
from overproof.errors import InputError
from overproof.files import FrozenModel
from overproof.models.base import DataShape, Prediction

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overproof.config import Evaluate
    from overproof.data.manifest import Manifest
    from overproof.data.source_files import FileListing
    from overproof.engines.base import LogitsReader, TextScorer
    from overproof.engines.probe import Say
    from overproof.engines.probe_messages import ArrayAnswer, TextAnswer
    from overproof.export.base import Format
    from overproof.stage_context import StageContext

    Batch = dict[str, Tensor]

Tell = Callable[[int], None]
STREAMS_RATE = "streams_tokens_per_s"  # a metric: of n requests at once
DIVERGENCE = "divergence_nats"  # a metric: from the teacher
FEWEST_UNITS = 2  # that are scored of every file, whatever time that takes
UNITS_TOGETHER = 32  # that a scorer may put into one batch: a score depends on no others, not even by rounding

# What a student may learn from beside the labels.
Loss = Literal["outputs", "attention", "hidden_states", "generated_text"]


class Metric(FrozenModel):
    """One figure; ``low`` and ``high`` bound it where resampling, or for a latency's ``high`` its order, can say so. It
    was measured on ``n``, of as many as ``of`` where it could have been more.
    """

    value: float
    low: float | None = None
    high: float | None = None
    unit: str
    n: int
    of: int | None = None

    @property
    def measured_on(self) -> str:
        """``60``, or ``20 of 60``."""
        return f"{self.n:,}" if self.of in (None, self.n) else f"{self.n:,} of {self.of:,}"


@dataclass(frozen=True)
class QualityMetric:
    """The metric that the gate judges: of sums over test units, ``scale * (total / size) ** power``."""

    name: str  # in reports, such as "bits_per_byte"
    title: str  # for people
    unit: str
    higher_is_better: bool
    relative: bool  # a difference is a relative increase, in %; else a difference, in points
    scale: float = 1.0
    power: float = 1.0

    def value(self, total: Any, size: Any) -> Any:
        """The metric of sums; arrays give arrays."""
        return self.scale * (total / size) ** self.power

    def worse(self, found: Any, reference: Any) -> Any:
        """How much worse ``found`` is than ``reference``: above 0 is worse whatever the metric's direction."""
        if self.relative:
            return (reference / found if self.higher_is_better else found / reference) - 1
        return reference - found if self.higher_is_better else found - reference

    def kept(self, found: Any, reference: Any) -> Any:
        """Which share of ``reference`` is kept: below 1 is worse whatever the metric's direction."""
        return found / reference if self.higher_is_better else reference / found

    @property
    def difference_unit(self) -> str:
        return "%" if self.relative else "points"

    @property
    def comparatives(self) -> tuple[str, str]:
        """What something worse and something better is called."""
        return ("lower", "higher") if self.higher_is_better and not self.relative else ("worse", "better")

    def amount(self, value: float) -> str:
        """A difference as people read it: ``3 %`` or ``2 points``."""
        return f"{100 * value:g} {self.difference_unit}"

    def sort_key(self, value: float) -> float:
        """The smaller, the better."""
        return -value if self.higher_is_better else value


UnitColumns = Mapping[str, NDArray[Any]]  # numbers of each test unit, by name: (U, ...) each


@dataclass(frozen=True)
class FurtherMetric:
    """A metric that is reported beside the quality and not judged.

    ``value`` gives it for each resample of the units, from their columns and how often each was drawn: (S, U) to (S,).
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    value: Callable[[UnitColumns, NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class FileScores:
    """One exported file on units of the test split, the units in ascending order of their ids.

    ``choices_N`` holds the first choice of each prediction, unit after unit; unit u has ``predictions[u]`` of them.
    """

    sha256: str  # of the file that was scored
    units: NDArray[np.int64]
    total: NDArray[np.float64]  # of each unit: what ``QualityMetric`` adds up
    size: NDArray[np.int64]  # and what it divides by
    predictions: NDArray[np.int64]
    choices_N: NDArray[np.int32]
    columns: UnitColumns = field(default_factory=dict)  # what the task's further metrics are made from

    def joined(self, other: FileScores) -> FileScores:
        """With further units of the same file, whose ids are larger.

        Raises:
            InputError: it is another file.
        """
        if other.sha256 != self.sha256:
            raise InputError(
                f"an exported file had sha256 {self.sha256[:12]}… for its first test units, {other.sha256[:12]}… for "
                "further ones; expected one file: it was changed while it was scored, export and evaluate again"
            )
        return FileScores(
            self.sha256,
            np.concatenate([self.units, other.units]),
            np.concatenate([self.total, other.total]),
            np.concatenate([self.size, other.size]),
            np.concatenate([self.predictions, other.predictions]),
            np.concatenate([self.choices_N, other.choices_N]),
            {name: np.concatenate([values, other.columns[name]]) for name, values in self.columns.items()},
        )

    def first(self, count: int) -> FileScores:
        """The first units alone."""
        return FileScores(
            self.sha256,
            self.units[:count],
            self.total[:count],
            self.size[:count],
            self.predictions[:count],
            self.choices_N[: self.predictions[:count].sum()],
            {name: values[:count] for name, values in self.columns.items()},
        )


class ScoringTime:
    """The seconds that a file may be scored, from now on: looked at after each test unit. ``FEWEST_UNITS`` are scored
    however long they take: there is no interval of fewer.
    """

    def __init__(self, limit_s: float | None) -> None:
        self._ends_s = math.inf if limit_s is None else time.monotonic() + limit_s

    def is_over(self, done: int) -> bool:
        """Whether no further unit is begun after so many."""
        return done >= FEWEST_UNITS and time.monotonic() >= self._ends_s


def agreements(scores: FileScores, teacher: FileScores) -> NDArray[np.int64]:
    """Of each unit's predictions, how many have the teacher's first choice."""
    starts = np.cumsum(scores.predictions) - scores.predictions
    return np.add.reduceat((scores.choices_N == teacher.choices_N).astype(np.int64), starts)


def spread_units(units: NDArray[np.int64], most: int | None) -> NDArray[np.int64]:
    """All units, or ``most`` of them evenly spread."""
    if most is None or most >= len(units):
        return units
    return units[np.linspace(0, len(units) - 1, most).round().astype(np.int64)]


def cost_metrics(answer: TextAnswer | ArrayAnswer, asked: int, confidence: float) -> dict[str, Metric]:
    """Memory, and the latency that half of the requests, and 95 in 100, stay within: what a client of an idle engine
    waits; and the cores that it lacked meanwhile. ``asked`` requests would have been timed at most. Where those that
    were made bound the latency from above at this one-sided confidence, ``high`` does.
    """
    return {
        "resident_mb": Metric(value=answer.resident_mb, unit="MB", n=1),
        "resident_before_load_mb": Metric(value=answer.before_mb, unit="MB", n=1),
        "contended_cores": Metric(value=answer.contended_cores, unit="cores", n=1),
        **{
            f"latency_p{share}_s": Metric(
                value=float(np.percentile(answer.latency_s, share, method="inverted_cdf")),
                high=upper_bound(answer.latency_s, share / 100, confidence),
                unit="s",
                n=len(answer.latency_s),
                of=asked,
            )
            for share in (50, 95)
        },
    }


@dataclass(frozen=True)
class CardWords:
    """What a model card says of a task."""

    summary: str  # "A language model"
    intended_use: str  # and its limits
    latency: str  # what one timed request is


class Task(Protocol):
    """One kind of data and of answers. Methods import what is heavy themselves: a recipe is read without torch."""

    section: type[DataSection]
    unit: str  # what one prediction is of, such as "token"
    test_unit: str  # what is resampled, such as "document"
    quality: QualityMetric
    further: tuple[FurtherMetric, ...]
    losses: frozenset[Loss]
    speed: str  # the metric of an engine's speed, such as "decode_tokens_per_s"
    speed_unit: str
    expects_answers: bool  # whether test records may say what an answer must be (see ``expected_answers``)
    counted: str | None  # column that says which predictions of a row count; None: all
    label_column: str  # of a shard: what the cache repeats, to be held against the data
    pipeline_tag: str  # as the Hugging Face Hub names the task
    route: str  # of the HTTP API

    # --- data -------------------------------------------------------------------------------------

    def source_files(self, data: Any) -> FileListing:
        """The files that the data come from, and those beside them that are left out; none of what a library has.

        Raises:
            InputError: there are none.
        """

    def source_digest(self, data: Any) -> str:
        """Sha256, in hex, over what the data is made from.

        Raises:
            InputError: a source is missing or empty.
        """

    def shape(self, data: Any) -> DataShape:
        """What a model must fit, as far as it is known before the data is prepared (the vocabulary is its limit)."""

    def check_export(self, data: Any, format: Format) -> Sequence[str]:
        """What a format's engines leave out of what turns texts into rows, in words: asked before anything is read.

        Raises:
            InputError: files of the format cannot hold it.
        """

    def prepare(self, context: StageContext) -> Manifest:
        """Read the source, split it and write the shards below the context's artifact.

        Raises:
            InputError: the source is not what the recipe says, or leaves a split or shard empty.
        """

    # --- training ---------------------------------------------------------------------------------

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Call a model on the columns of a shard."""

    def segments(self, batch: Batch, states_BPD: Tensor) -> Tensor:
        """Which places of a layer's states belong together: (B, P). Those that see each other have one number, or
        True; those that hold nothing that counts have 0.
        """

    # --- evaluation -------------------------------------------------------------------------------

    def units(self, root: Path, most: int | None) -> NDArray[np.int64]:
        """Ids of the test units of the data at ``root``, ascending: an order that the content alone decides. All of
        them, or ``most`` evenly spread.

        Raises:
            InputError: there are none.
        """

    def clusters(self, root: Path, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of these test units belong together, as near-copies of each other: those of one number. Intervals are
        of resampled clusters, since copies tell nothing new.
        """

    def score(
        self, file: Path, root: Path, units: NDArray[np.int64], settings: Evaluate, engine: str, format: Format,
        tell: Tell,
    ) -> FileScores:  # fmt: skip
        """An exported file on these test units, or on the first of them where the file's time, ``settings.score_s``, is
        over (see ``ScoringTime``); ``tell`` hears now and then how many of them are done. Scores are the same to the
        last bit where units, by ``UNITS_TOGETHER`` from the first on, are scored in several calls.
        """

    def probe(
        self, file: Path, root: Path, settings: Evaluate, engine: str, format: Format, say: Say
    ) -> dict[str, Metric]:
        """Speed, memory and parity of an exported file in the engine that will serve it; ``say`` hears of progress."""

    def divergence(
        self, file: Path, teacher: Path, root: Path, settings: Evaluate, engine: str, format: Format, say: Say
    ) -> dict[str, Metric]:
        """How far an exported file's probabilities are from those of the teacher's file, on some of the test units:
        both in the engine that will serve them, or in torch where it does not tell them.
        """

    # --- serving ----------------------------------------------------------------------------------

    def example(self, details: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a request that shows what the model does; the model's name is put in beside."""

    def describe_reply(self, body: Mapping[str, Any], reply: Mapping[str, Any]) -> str:
        """What a reply says, on a line."""

    def card(self, manifest: Manifest, settings: Evaluate) -> CardWords:
        """The words of the model card."""


@runtime_checkable
class TokenTask(Task, Protocol):
    """A task whose rows are tokens, each predicted from those before it: whoever reads tokens can be asked of them."""

    counted: str | None  # column that says which predictions count; None: all

    def score_by(
        self, scorer: TextScorer, sha256: str, root: Path, units: NDArray[np.int64], settings: Evaluate, tell: Tell
    ) -> FileScores:
        """As ``score``, by what a scorer of a model that goes by this hash says, which is closed then."""

    def divergence_by(
        self, teacher: LogitsReader, file: Path, root: Path, settings: Evaluate, engine: str, format: Format, say: Say
    ) -> dict[str, Metric]:
        """As ``divergence``, by all that a teacher says, which is closed then."""


@runtime_checkable
class ArrayTask(Task, Protocol):
    """A task whose rows are one array of numbers each, and whose answers come from the log-probabilities of outputs."""

    column: str  # of a row, the array that an engine is asked
    request: type[BaseModel]  # the body of POST ``route``
    row_reply: type[BaseModel]  # what ``answers`` gives for a row

    def inputs(self, request: Any, details: Mapping[str, Any], package: Path) -> NDArray[np.float32]:
        """The rows of a request, flat: (B, D); ``package`` is the folder with what lies beside the model.

        Raises:
            InputError: a row is not what the package's model takes.
        """

    def answers(self, logprobs_BV: NDArray[np.float32], details: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        """What is replied for each row."""

    def agree(self, one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
        """Whether two versions of a model answer the rows of a request alike."""
