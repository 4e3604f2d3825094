"""The sections of export formats, and of a teacher served with a draft."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from overproof.config.base import Count, Section


class FormatSection(Section):
    """What every export format has; ``kind`` names it."""

    kind: str
    by_quality: ClassVar[tuple[str, ...]] = ()  # variants that are worth trying, from the best to the smallest
    formats: tuple[str, ...] = Field((), description="Quantised variants written of each student that is kept.")
    teacher: bool = Field(
        False, description="Whether the teacher itself is written in these variants, too, for the gate to choose from."
    )

    @property
    def most_mb(self) -> float | None:
        """What a file may take at most, where a variant is made to a size."""
        return None

    @property
    def trained_roundings(self) -> tuple[str, ...]:
        """The variants in whose numbers a student may learn: see ``Student.rounding``."""
        return ()

    @property
    def calibration_rows(self) -> int:
        """Rows that a model reads, forward, until it is written in all variants."""
        return 0


class Calibration(Section):
    """The train rows that variants with a measured range or importance are calibrated on."""

    rows: Count = Field(128, description="Rows, the first in training order.")


class Speculate(Section):
    """The teacher served with the shipped student as its draft: the teacher's own text, sooner."""

    teacher_format: Literal["f16", "q8_0", "q4_0"] = Field(
        "q8_0",
        description="Of the file that answers. In q8_0 and q4_0 a text is the same whatever shares a step; "
        "in f16 a near tie may fall otherwise, and is refused.",
    )
    draft_tokens: Count = Field(3, description="Tokens that the student guesses at a time.")
    prompts: Count = Field(32, description="Beginnings of test documents whose continuations must be identical.")
    new_tokens: Count = Field(48, description="Most tokens of each continuation, after 32 of prompt.")
    repeats: int = Field(5, ge=5, description="Timed runs over the prompts, with and without the draft in turn.")
    at_least: float = Field(1.0, gt=0, description="Times the tokens a second of the teacher alone, in the median run.")
    at_most: float = Field(
        0.01,
        ge=0,
        description="Bits per byte of a quantised teacher: relative increase over the unquantised one, at the far "
        "end of the interval.",
    )

    @property
    def teacher(self) -> str:
        """The export that answers."""
        return "teacher" if self.teacher_format == "f16" else f"teacher-{self.teacher_format}"
