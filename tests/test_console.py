"""What a log shows where there is no terminal: events as lines, and no long silence."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from overproof import console
from overproof.stage_context import Notice, ProgressEvent, StepTrained, TaskProgress, TrainingResumed


class Lines:
    """A stream that wakes who waits for a number of lines with some text."""

    def __init__(self) -> None:
        self.text = ""
        self.changed = threading.Condition()

    def write(self, text: str) -> int:
        with self.changed:
            self.text += text
            self.changed.notify_all()
        return len(text)

    def flush(self) -> None: ...

    def wait_for(self, text: str, times: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.text.count(text) >= times, timeout=60)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    found = Lines()
    monkeypatch.setattr(
        console, "out", Console(file=found, force_terminal=False, highlight=False, width=console.LOG_WIDTH)
    )  # type: ignore[arg-type]
    return found


def test_the_newest_line_is_repeated_while_nothing_is_told(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.02)
    with console.progress_bars() as show:
        show(TaskProgress("train", 3, 30, "starting 2 workers"))
        lines.wait_for("  train 3/30 starting 2 workers (no news for 0 s)\n", 3)


def test_what_has_no_measure_is_repeated_too(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.02)
    with console.waiting("connecting to Ray"):
        lines.wait_for("connecting to Ray (0 s)\n", 3)


def test_no_silence_is_longer_than_five_seconds() -> None:
    assert console.LINE_EVERY_S < 5


def test_many_events_make_few_lines_and_notices_all(lines: Lines) -> None:
    with console.progress_bars() as show:
        for step in range(1, 100):
            show(StepTrained("train", step, 99, f"loss {step}", float(step), 2))
            show(Notice(f"event {step}"))
    assert lines.text.count("train 1/99 loss 1") == 1
    assert lines.text.count("! event ") == 99
    assert lines.text.count("  train ") < 99


def test_bars_are_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Lines()
    monkeypatch.setattr(
        console, "out", Console(file=found, force_terminal=True, highlight=False, width=console.LOG_WIDTH)
    )  # type: ignore[arg-type]
    with console.progress_bars() as show:
        show(TaskProgress("sweep", 1, 4, "best 1.5"))
        show(TrainingResumed.after("a node was taken away", 10))
    assert "sweep" in found.text
    assert "a node was taken away; going on from step 10" in found.text


@pytest.mark.parametrize(
    "event",
    [
        TaskProgress("train", 1, 2, "note"),
        StepTrained("train", 1, 2, "step left out", None, 3),
        Notice("text"),
        TrainingResumed.after("a worker died", 7),
    ],
)
def test_events_travel_as_values(event: ProgressEvent) -> None:
    assert pickle.loads(pickle.dumps(event)) == event
