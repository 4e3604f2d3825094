"""Curves in parts, each up to a validation. Light to import."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Row = dict[str, float]  # of a curve, as the loop gives it


@dataclass(frozen=True)
class Chunk:
    """What came of some steps."""

    steps: int  # finished since the start
    validation_loss: float  # of the labels alone, nats: comparable between temperatures and weights
    curve: tuple[Row, ...]


def chunk(curve: Sequence[Row]) -> Chunk:
    """Rows of which the last has a validation loss."""
    return Chunk(int(curve[-1]["step"]), curve[-1]["validation_loss"], tuple(curve))


def chunks(curve: Iterable[Row]) -> Iterator[Chunk]:
    """A curve, cut after each validation; what comes after the last is left out."""
    part: list[Row] = []
    for row in curve:
        part.append(row)
        if "validation_loss" in row:
            yield chunk(part)
            part = []
