"""Reports that go on while a call blocks."""

from __future__ import annotations

import time

import pytest

from overproof.data import heartbeat
from overproof.data.heartbeat import Heartbeat
from overproof.stage_context import ProgressEvent, TaskProgress


def test_a_blocking_call_is_reported_with_its_phase_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.01)
    reports: list[ProgressEvent] = []

    def work() -> None:
        with Heartbeat(reports.append, "prepare", 2) as beat:
            beat.start_phase(0, "reading")
            time.sleep(0.2)
            beat.start_phase(1, "writing")
            beat.update_note("writing more")
            time.sleep(0.2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    count = len(reports)
    time.sleep(0.05)
    assert len(reports) == count
    told = [report for report in reports if isinstance(report, TaskProgress)]
    assert {(report.task, report.total) for report in told} == {("prepare", 2)}
    phases = [(report.done, report.note) for report in told]
    first = phases.index((1, "writing"))
    assert phases[0] == (0, "reading")
    assert set(phases[1:first]) == {(0, "reading, 0 s")}
    assert set(phases[first + 1 :]) == {(1, "writing more, 0 s")}
