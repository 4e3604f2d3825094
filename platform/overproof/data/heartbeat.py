"""Progress that goes on while a call blocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from overproof.stage_context import Progress, TaskProgress

HEARTBEAT_S = 1.0  # well below the five seconds that a run may be silent


class Heartbeat:
    """Reports the current phase of a task again and again, with the seconds it has taken, until the block ends."""

    def __init__(self, progress: Progress, task: str, phases: int) -> None:
        self._progress, self._task, self._phases = progress, task, phases
        self._lock = threading.Lock()
        self._done, self._started_s = 0, time.monotonic()
        self._note: Callable[[], str] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()

    def start_phase(self, done: int, note: str | Callable[[], str]) -> None:
        """Report that ``done`` phases are over and what is done now; a function is asked for each report."""
        with self._lock:
            self._done, self._started_s = done, time.monotonic()
            self._note = note if callable(note) else lambda: note
            self._progress(TaskProgress(self._task, done, self._phases, self._note()))

    def update_note(self, note: str) -> None:
        """Change what the next report says of the current phase."""
        with self._lock:
            self._note = lambda: note

    def _run(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            with self._lock:  # so that no report of a phase comes after the first one of the next
                if self._note is not None:
                    note = f"{self._note()}, {time.monotonic() - self._started_s:.0f} s"
                    self._progress(TaskProgress(self._task, self._done, self._phases, note))
