"""Figures as people read them: no exponents, three digits, a blank before the unit."""

from __future__ import annotations

import pytest

from overproof.units import format_bytes, format_latency, format_number, format_percent, format_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05064, "0.0506"), (1, "1.00"), (9.999, "10.0"), (99.96, "100"), (142.4, "142"), (1764.4, "1,760"),
     (-3.14159, "-3.14"), (1e-5, "0.0000100"), (2.5e7, "25,000,000"), (float("inf"), "inf")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert format_number(value) == text


def test_units() -> None:
    assert [format_latency(s) for s in (2.19e-4, 0.142, 1.76, 13.94)] == ["0.219 ms", "142 ms", "1.76 s", "13.9 s"]
    assert [format_percent(share) for share in (0.464, 1, 0)] == ["46.4 %", "100.0 %", "0.0 %"]
    assert [format_bytes(b) for b in (999, 1400, 1.4e9, 135e6)] == ["999 B", "1.40 kB", "1.40 GB", "135 MB"]
    assert [format_seconds(s) for s in (35, 720, 12240, 181440)] == ["35 s", "12 min", "3.4 hours", "2.1 days"]
