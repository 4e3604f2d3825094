"""What a training reads next, made ready by a thread while a GPU computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

ItemT = TypeVar("ItemT")
ITEMS_AHEAD = 2  # that are ready, or being made


def for_device(items: Iterator[ItemT], device: torch.device) -> Iterator[ItemT]:
    """The same items; for a GPU they are read ahead. Beside a CPU's own work a thread would take what computes."""
    return read_ahead(items) if device.type == "cuda" else items


def read_ahead(items: Iterator[ItemT]) -> Iterator[ItemT]:
    """The same items in their order, each asked for, by one thread, before it is taken. What that raises is raised in
    its place; closing the generator ends the reading.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        ahead = deque(thread.submit(lambda: list(islice(items, 1))) for _ in range(ITEMS_AHEAD))
        while item := ahead.popleft().result():
            ahead.append(thread.submit(lambda: list(islice(items, 1))))
            yield item[0]
    finally:
        thread.shutdown(cancel_futures=True)
