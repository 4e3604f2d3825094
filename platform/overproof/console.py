"""What a person sees while a run goes on: one line a stage, a bar under the stage that runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.status import Status

from overproof.stage_context import Notice, Progress, ProgressEvent, TaskProgress

LINE_EVERY_S = 4.0  # without a terminal: a line this often, news or not, so that no five seconds pass in silence
LOG_WIDTH = 160  # where there is no terminal to ask

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)


errors = Console(highlight=False, soft_wrap=True, stderr=True)  # of commands whose output a shell reads


@contextmanager
def waiting(text: str, console: Console | None = None) -> Iterator[None]:
    """Show that something without a measure goes on."""
    console = console or out
    if console.is_terminal:
        with Status(text, console=console):
            yield
        return
    began_s = time.monotonic()
    console.print(text)
    with _repeating(lambda: console.print(f"{text} ({time.monotonic() - began_s:.0f} s)")):
        yield


def say(text: str, style: str | None = None) -> None:
    """Print a sentence: a terminal's lines end between words, and elsewhere it is one line."""
    out.print(text, style=style, markup=False, soft_wrap=not out.is_terminal)


def notice(text: str) -> None:
    """Print an event on a line that stays."""
    say(f"! {text}", "yellow")


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Draw the progress of named tasks until the block ends."""
    if not out.is_terminal:
        lines = ProgressLines()
        with _repeating(lines.print_stale):
            yield lines
        return
    columns = (
        TextColumn("  {task.description:<10}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=out, transient=True) as bars:
        ids: dict[str, int] = {}

        def show(event: ProgressEvent) -> None:
            if isinstance(event, Notice):
                notice(event.text)
                return
            if event.task not in ids:
                ids[event.task] = int(bars.add_task(event.task, total=event.total, note=event.note))
            bars.update(ids[event.task], completed=event.done, total=event.total, note=event.note)  # type: ignore[arg-type]

        yield show


class ProgressLines:
    """Progress where there is no terminal: a line for a task now and then, and one that says that nothing is new."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._printed_s: dict[str, float] = {}
        self._newest: TaskProgress | None = None
        self._heard_s = self._line_s = time.monotonic()

    def __call__(self, event: ProgressEvent) -> None:
        with self._lock:
            if isinstance(event, Notice):
                notice(event.text)
                return
            self._newest, self._heard_s = event, time.monotonic()
            if self._heard_s - self._printed_s.get(event.task, 0) > LINE_EVERY_S:
                self._print(event, "")

    def print_stale(self) -> None:
        """Repeat the newest line if there was none for a while."""
        with self._lock:
            now_s = time.monotonic()
            if self._newest and now_s - self._line_s >= LINE_EVERY_S:
                silent_s = now_s - self._heard_s
                self._print(self._newest, f" (no news for {silent_s:.0f} s)" if silent_s >= LINE_EVERY_S else "")

    def _print(self, event: TaskProgress, age: str) -> None:
        self._line_s = self._printed_s[event.task] = time.monotonic()
        out.print(f"  {event.task} {event.done}/{event.total} {event.note}".rstrip() + age)


@contextmanager
def _repeating(print_line: Callable[[], None]) -> Iterator[None]:
    """Call it every so often, from a thread, until the block ends."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(LINE_EVERY_S):
            print_line()

    thread = threading.Thread(target=repeat, name="console", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
