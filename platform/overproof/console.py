"""What a person sees while a run goes on: one line a stage, a bar under the stage that runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.status import Status

from overproof.stage_context import NOTICE, Progress

LINE_EVERY_S = 5.0  # without a terminal a bar becomes a line now and then

LOG_WIDTH = 160  # where there is no terminal to ask

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show that something without a measure goes on."""
    if out.is_terminal:
        with Status(text, console=out):
            yield
    else:
        out.print(text)
        yield


def notice(text: str) -> None:
    """Tell of an event, on a line that stays."""
    out.print(f"! {text}", style="yellow", markup=False)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Draw the progress of named tasks until the block ends."""
    columns = (
        TextColumn("  {task.description:<10}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=out, transient=True, disable=not out.is_terminal) as drawn:
        ids: dict[str, int] = {}
        spoken: dict[str, float] = {}

        def show(task: str, done: int, total: int, note: str = "") -> None:
            if task == NOTICE:
                notice(note)
                return
            if task not in ids:
                ids[task] = int(drawn.add_task(task, total=total, note=note))
            drawn.update(ids[task], completed=done, total=total, note=note)  # type: ignore[arg-type]
            if not out.is_terminal and time.monotonic() - spoken.get(task, 0) > LINE_EVERY_S:
                spoken[task] = time.monotonic()
                out.print(f"  {task} {done}/{total} {note}".rstrip())

        yield show
