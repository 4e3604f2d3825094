"""What a thread reads ahead: the same items in the same order, its errors in their place, and no more once closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from overproof.errors import InputError
from overproof.train.read_ahead import ITEMS_AHEAD, for_device, read_ahead


def counted(made: list[int], fails_at: int | None = None) -> Iterator[int]:
    for number in range(50):
        assert threading.current_thread() is not threading.main_thread()
        if number == fails_at:
            raise InputError(f"row {number}")
        made.append(number)
        yield number


def test_items_come_in_their_order_and_only_so_far_ahead() -> None:
    made: list[int] = []
    for number in read_ahead(counted(made)):
        assert made[number] == number
        assert len(made) <= number + 1 + ITEMS_AHEAD
    assert made == list(range(50))


def test_an_error_comes_where_its_item_would() -> None:
    items = read_ahead(counted([], fails_at=7))
    assert [next(items) for _ in range(7)] == list(range(7))
    with pytest.raises(InputError, match="row 7"):
        next(items)


def test_closing_ends_the_reading_and_its_thread() -> None:
    made: list[int] = []
    items = read_ahead(counted(made))
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert len(made) <= 1 + ITEMS_AHEAD
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_beside_a_cpu_nothing_is_read_ahead() -> None:
    items = iter([1, 2])
    assert for_device(items, torch.device("cpu")) is items
