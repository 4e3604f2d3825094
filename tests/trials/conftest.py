"""Trials are long by nature: each says what it shows, and the run ends with a table of them."""

from __future__ import annotations

import pytest

OUTCOMES = {"passed": "held", "failed": "FAILED", "skipped": "skipped"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        (report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " "), report.duration, word)
        for outcome, word in OUTCOMES.items()
        for report in terminalreporter.getreports(outcome)
        if "tests/trials/" in report.nodeid and (report.when == "call" or outcome != "passed")
    ]
    if not rows:
        return
    width = max(len(what) for what, *_ in rows)
    terminalreporter.section("trials")
    terminalreporter.line(f"{'what':<{width}}  seconds  outcome")
    for what, seconds, word in rows:
        terminalreporter.line(f"{what:<{width}}  {seconds:7.1f}  {word}")
