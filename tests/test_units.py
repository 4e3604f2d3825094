"""Figures as people read them: three digits, a blank before the unit, an exponent where zeros would be counted."""

from __future__ import annotations

import pytest

from overproof.units import format_bytes, format_fixed, format_latency, format_number, format_percent, format_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05064, "0.0506"), (1, "1.00"), (9.999, "10.0"), (99.96, "100"), (142.4, "142"), (1764.4, "1,760"),
     (-3.14159, "-3.14"), (1e-5, "1.00e-05"), (2.5e7, "25,000,000"), (float("inf"), "inf")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.012"), (0.001, "0.0010"), (1.23e-4, "0.00012"), (9.96e-5, "0.00010"), (9.94e-5, "9.9e-05"),
     (4.8e-7, "4.8e-07"), (-4.77e-7, "-4.8e-07"), (1e-12, "1.0e-12")],
)  # fmt: skip
def test_no_zeros_are_to_be_counted(value: float, text: str) -> None:
    assert format_number(value, 2) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.0000"), (1760.00514, "1,760.0051"), (0.0123, "0.0123"), (5.1e-5, "0.0001"), (4.9e-5, "4.9e-05"),
     (4.77e-7, "4.8e-07"), (-4.77e-7, "-4.8e-07"), (float("inf"), "inf")],
)  # fmt: skip
def test_what_is_not_zero_does_not_read_as_zero(value: float, text: str) -> None:
    assert format_fixed(value, 4) == text


def test_units() -> None:
    assert [format_latency(s) for s in (2.19e-4, 0.142, 1.76, 13.94)] == ["0.219 ms", "142 ms", "1.76 s", "13.9 s"]
    assert [format_percent(share) for share in (0.464, 1, 0)] == ["46.4 %", "100.0 %", "0.0 %"]
    assert [format_bytes(b) for b in (999, 1400, 1.4e9, 135e6)] == ["999 B", "1.40 kB", "1.40 GB", "135 MB"]
    assert [format_seconds(s) for s in (35, 720, 12240, 181440)] == ["35 s", "12 min", "3.4 hours", "2.1 days"]
