"""SIGTERM ends a command as Ctrl-C does: what runs is stopped in order, one line is said, and the code is its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGINT_CODE, SIGTERM_CODE = 130, 143


@contextmanager
def sigterm_as_interrupt() -> Iterator[Callable[[], int]]:
    """While the block runs; gives a function that says which exit code a KeyboardInterrupt stands for."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: SIGINT_CODE
        return
    terminated = False

    def receive(_: int, frame: Any) -> None:
        nonlocal terminated
        terminated = True
        interrupt = signal.getsignal(signal.SIGINT)  # of Ray Train while it trains, say
        if callable(interrupt):
            interrupt(signal.SIGINT, frame)
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield lambda: SIGTERM_CODE if terminated else SIGINT_CODE
    finally:
        signal.signal(signal.SIGTERM, before)


def wait_for_signal() -> None:
    """Until Ctrl-C or SIGTERM, also where a shell has this process ignore Ctrl-C: in the background."""
    ended = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: ended.set())
    ended.wait()
