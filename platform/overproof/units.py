"""Figures as people read them: one way for each kind."""

from __future__ import annotations

import math

SMALLEST = 1e-4  # that is written without an exponent, as C's ``%g`` has it


def format_bytes(bytes_: float) -> str:
    """``3.20 GB``, in powers of 1000."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= factor:
            value = bytes_ / factor
            return (
                f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
            )
    return f"{bytes_:.0f} B"


def format_number(value: float, digits: int = 3) -> str:
    """Such as ``0.0506``, ``142`` or ``1,760``: so many significant digits, and all before the point. Below
    ``SMALLEST``, where nobody counts zeros, ``4.77e-07``.
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    scientific = f"{value:.{digits - 1}e}"
    rounded = float(scientific)
    if abs(rounded) < SMALLEST:
        return scientific
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def format_fixed(value: float, decimals: int) -> str:
    """Such as ``1,760.0051``; ``4.8e-07`` of a number that would read as zero, and is not."""
    fixed = f"{value:,.{decimals}f}"
    return format_number(value, 2) if value and float(fixed.replace(",", "")) == 0 else fixed


def format_count(count: int | str, noun: str) -> str:
    """``1 class``, ``1,204 classes``; of a text such as ``1 to 3``, ``1 to 3 classes``."""
    number = count if isinstance(count, str) else f"{count:,}"
    return f"{number} {noun}" if number == "1" else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def format_percent(share: float, decimals: int = 1) -> str:
    """``46.4 %`` of 0.464."""
    return f"{100 * share:.{decimals}f} %"


def format_latency(seconds: float) -> str:
    """``0.219 ms``, ``142 ms`` or ``1.76 s``."""
    return f"{format_number(1e3 * seconds)} ms" if seconds < 1 else f"{format_number(seconds)} s"


def format_seconds(seconds: float) -> str:
    """``35 s``, ``12 min``, ``3.4 hours`` or ``2.1 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
