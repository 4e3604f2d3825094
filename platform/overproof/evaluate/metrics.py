"""What was measured, and how sure one may be of it. Pure numpy.

Shapes: U test units (documents, images or rows), K clusters of them, E exports, S resamples, C columns.

What is resampled are clusters: units that are near-copies of each other are drawn together, or not at all (the cluster
bootstrap: Davison and Hinkley, 1997, chapter 3.8). Where none are copies each unit is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from overproof.config.base import KvCache
from overproof.data.manifest import NearDuplicatesFound
from overproof.files import FrozenModel
from overproof.tasks.base import FurtherMetric, Metric, QualityMetric, UnitColumns

REPORT = "report.json"  # where a report lies in an artifact or a package
EXPECTED_ACCURACY = "expected_accuracy"  # the share of answers that are what records expect
CHUNK_COUNTS = 1 << 22  # resample counts held at once


class MeasuredFile(FrozenModel):
    """One exported file, known by its hash: what was measured is what may be served.

    ``student`` is the model it was made from, whose unquantised file bears its name: a student, or the teacher of a
    candidate; None for the teacher's and the control's own.
    """

    name: str
    student: str | None
    format: str
    size_bytes: int
    sha256: str
    candidate: bool
    metrics: dict[str, Metric]


class MeasuredTeacher(FrozenModel):
    """A teacher that has no file here: its size and speed in the engine are not known."""

    model: str  # its name where it is served; its family where torch runs it
    runs: Literal["elsewhere", "in torch"]
    weights: str  # what its endpoint says of them; their sha256
    metrics: dict[str, Metric]


class Comparison(FrozenModel):
    """How much worse ``name`` is than ``against`` on the same units; negative is better. And which share of the quality
    of ``against`` it keeps.

    See ``QualityMetric.worse`` and ``QualityMetric.kept``. There is no interval of a single cluster, nor one of a share
    where some resample has nothing to be kept.
    """

    name: str
    against: str
    value: float
    low: float | None
    high: float | None
    kept: float | None = None
    kept_low: float | None = None
    kept_high: float | None = None


class Report(FrozenModel):
    """Everything the gate may look at; the best student comes first of the students."""

    task: str
    quality: str  # the metric that the gate judges
    engine: str  # that was measured, and that serves
    computes_with: str  # what the engine takes from a file
    kv_cache: KvCache = "f16"  # while it was measured, and where it is served
    confidence: float
    scored: str = ""  # on how much of the test split, for how long and why no more; for people
    answered: str = ""  # how many questions whose answers are expected, likewise; empty where there are none
    near_duplicates: NearDuplicatesFound | None = None  # None: not looked for
    tokenizer_sha256: str | None = None  # of the tokenizer.json that split the texts, where rows are of tokens
    measured: tuple[MeasuredFile, ...]
    unwritten_teacher: MeasuredTeacher | None = None  # where the teacher is none of the files
    comparisons: tuple[Comparison, ...]

    def find(self, name: str) -> MeasuredFile | None:
        """The export with this name."""
        return next((m for m in self.measured if m.name == name), None)

    @property
    def winner(self) -> str:
        """The student with the lowest validation loss."""
        return next(m.name for m in self.measured if m.name == m.student)

    def compare(self, name: str, against: str) -> Comparison | None:
        """The comparison of two exports."""
        return next((c for c in self.comparisons if (c.name, c.against) == (name, against)), None)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made."""

    samples: int
    confidence: float
    seed: int


@dataclass(frozen=True)
class PerExampleSums:
    """One export's sums over each test unit, shape (U,); all exports share units and their order.

    ``total`` is what the metric adds up (nats, right answers), ``size`` what it is divided by (bytes, answers);
    ``agreed`` of ``predictions`` predictions have the teacher's first choice.
    """

    total: NDArray[np.float64]
    size: NDArray[np.float64]
    agreed: NDArray[np.float64]
    predictions: NDArray[np.float64]


@dataclass(frozen=True)
class Clusters:
    """Which units are drawn together."""

    of_unit_U: NDArray[np.int64]  # the cluster of each, from 0 on
    count: int  # K

    @classmethod
    def of(cls, labels_U: NDArray[np.int64]) -> Self:
        """Units of one label are one cluster."""
        distinct, of_unit_U = np.unique(labels_U, return_inverse=True)
        return cls(of_unit_U, len(distinct))

    @classmethod
    def single(cls, units: int) -> Self:
        """Each unit by itself."""
        return cls(np.arange(units), units)

    def first(self, units: int) -> Self:
        """The clusters of the first units alone."""
        return type(self).of(self.of_unit_U[:units])

    def sums(self, columns_UC: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of each cluster, (K, C)."""
        sums_KC = np.zeros((self.count, columns_UC.shape[1]))
        np.add.at(sums_KC, self.of_unit_U, columns_UC)
        return sums_KC


def resampled_sums(columns_KC: NDArray[np.float64], bootstrap: Bootstrap) -> NDArray[np.float64]:
    """Column sums of clusters drawn with replacement, shape (S, C).

    Every column sees the same draws, so figures of two exports are paired. Memory does not grow with S * K.
    """
    return np.concatenate([counts_SK @ columns_KC for counts_SK in _resampled_counts(len(columns_KC), bootstrap)])


def _resampled_counts(clusters: int, bootstrap: Bootstrap) -> Iterator[NDArray[np.float64]]:
    """How often each cluster is drawn, (S, K), some resamples at a time; the same for each call."""
    generator = np.random.default_rng(bootstrap.seed)
    chunk = max(1, CHUNK_COUNTS // clusters)
    for start in range(0, bootstrap.samples, chunk):
        yield _draw(generator, min(chunk, bootstrap.samples - start), clusters)


def _draw(generator: np.random.Generator, rows: int, clusters: int) -> NDArray[np.float64]:
    drawn = generator.integers(0, clusters, (rows, clusters)) + clusters * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(np.float64)


def percentiles(values_S: NDArray[np.float64], clusters: int, confidence: float) -> tuple[float | None, float | None]:
    """Bounds of the expanded percentile interval (Hesterberg, arXiv 1411.5279).

    Plain percentiles are too narrow for few clusters. The tail is widened as Student's t widens the normal, and
    by sqrt(n / (n - 1)); t is its expansion in 1 / degrees of freedom (Abramowitz and Stegun, 26.7.5).
    """
    if clusters < 2:
        return None, None
    normal, df = NormalDist(), clusters - 1
    z = normal.inv_cdf((1 + confidence) / 2)
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    tail = normal.cdf(-sqrt(clusters / df) * t)
    low, high = np.quantile(values_S, [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(right: float, asked: float, confidence: float) -> tuple[float, float]:
    """Bounds of a share (Wilson, 1927, doi 10.1080/01621459.1927.10502953): of few answers that are all right, too, it
    says how little that shows, which resampling does not.
    """
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), right / asked
    middle = (share + z**2 / (2 * asked)) / (1 + z**2 / asked)
    width = z / (1 + z**2 / asked) * sqrt(share * (1 - share) / asked + z**2 / (4 * asked**2))
    return max(0.0, middle - width), min(1.0, middle + width)


def quality_metrics(
    quality: QualityMetric,
    exports: Mapping[str, PerExampleSums],
    bootstrap: Bootstrap,
    clusters: Clusters | None = None,
) -> tuple[dict[str, dict[str, Metric]], tuple[Comparison, ...]]:
    """Each export's quality and agreement, and its comparison with every other, from one set of resamples.

    ``clusters`` are those of the units; None: each is one by itself.
    """
    names = list(exports)
    columns_UC = np.stack([c for name in names for c in _columns(exports[name])], axis=1)
    units = len(columns_UC)
    clusters = clusters or Clusters.single(units)
    point_E4 = columns_UC.sum(axis=0).reshape(len(names), 4)
    drawn_SE4 = resampled_sums(clusters.sums(columns_UC), bootstrap).reshape(bootstrap.samples, len(names), 4)
    quality_E, quality_SE = (quality.value(a[..., 0], a[..., 1]) for a in (point_E4, drawn_SE4))
    agreement_E, agreement_SE = (a[..., 2] / a[..., 3] for a in (point_E4, drawn_SE4))

    def metric(value: float, values_S: NDArray[np.float64], unit: str) -> Metric:
        low, high = percentiles(values_S, clusters.count, bootstrap.confidence)
        return Metric(value=float(value), low=low, high=high, unit=unit, n=units)

    metrics = {
        name: {
            quality.name: metric(quality_E[i], quality_SE[:, i], quality.unit),
            "agreement": metric(agreement_E[i], agreement_SE[:, i], "share"),
        }
        for i, name in enumerate(names)
    }
    return metrics, tuple(_comparisons(quality, names, quality_E, quality_SE, clusters.count, bootstrap.confidence))


def further_metrics(
    further: Sequence[FurtherMetric],
    columns: UnitColumns,
    units: int,
    bootstrap: Bootstrap,
    clusters: Clusters | None = None,
) -> dict[str, Metric]:
    """An export's further metrics, from the columns of its units and the resamples that its quality has."""
    if not further:
        return {}
    clusters = clusters or Clusters.single(units)
    drawn = [
        [each.value(columns, counts_SK[:, clusters.of_unit_U]) for each in further]
        for counts_SK in _resampled_counts(clusters.count, bootstrap)
    ]
    found = {}
    for number, each in enumerate(further):
        (value,) = each.value(columns, np.ones((1, units)))
        low, high = percentiles(np.concatenate([part[number] for part in drawn]), clusters.count, bootstrap.confidence)
        found[each.name] = Metric(value=float(value), low=low, high=high, unit=each.unit, n=units)
    return found


def _columns(units: PerExampleSums) -> tuple[NDArray[np.float64], ...]:
    return units.total, units.size, units.agreed, units.predictions


def _comparisons(
    quality: QualityMetric,
    names: Sequence[str],
    quality_E: NDArray[np.float64],
    quality_SE: NDArray[np.float64],
    clusters: int,
    confidence: float,
) -> list[Comparison]:
    found = []
    for a, name in enumerate(names):
        for b, against in enumerate(names):
            if a == b:
                continue
            low, high = percentiles(quality.worse(quality_SE[:, a], quality_SE[:, b]), clusters, confidence)
            value = float(quality.worse(quality_E[a], quality_E[b]))
            with np.errstate(divide="ignore", invalid="ignore"):
                kept, kept_S = (
                    quality.kept(quality_E[a], quality_E[b]),
                    quality.kept(quality_SE[:, a], quality_SE[:, b]),
                )
            ends = percentiles(kept_S, clusters, confidence) if np.isfinite(kept_S).all() else (None, None)
            found.append(
                Comparison(
                    name=name, against=against, value=value, low=low, high=high,
                    kept=float(kept) if np.isfinite(kept) else None, kept_low=ends[0], kept_high=ends[1],
                )
            )  # fmt: skip
    return found
