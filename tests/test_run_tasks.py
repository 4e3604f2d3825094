"""Calls on a cluster: in order, with their errors, and again where a node is lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from overproof.cluster import ray_cluster as cluster
from overproof.cluster.ray_cluster import run_tasks
from overproof.errors import InputError

FOREVER_S = 600
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the cluster's processes do not have the tests


def double(number: int) -> int:
    return 2 * number


def refuse(number: int) -> int:
    raise InputError(f"{number} is refused")


def hang_at_first(folder: str, times: int) -> int:
    """How often it was called before; the first ``times`` never come to an end."""
    begun = len(list(Path(folder).iterdir())) - 1
    if begun < times:
        time.sleep(FOREVER_S)
    return begun


def on_numbered_nodes(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Any]:
    """As if each call were on another node."""
    begun = len(list(Path(arguments[0]).iterdir()))
    Path(arguments[0], str(begun)).write_text(str(os.getpid()))
    yield f"node {begun}"
    yield function(*arguments)


@pytest.fixture(autouse=True)
def attached(ray_cluster: str) -> None:
    del ray_cluster


def test_results_come_by_name_and_progress_is_told() -> None:
    told: list[tuple[int, str]] = []
    found = run_tasks(double, {str(n): (n,) for n in range(5)}, lambda *done: told.append(done), at_once=2)
    assert found == {str(n): 2 * n for n in range(5)}
    assert told[0] == (0, "")
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_an_error_is_that_of_the_function() -> None:
    with pytest.raises(InputError, match="7 is refused"):
        run_tasks(refuse, {"a": (7,)})


@pytest.mark.parametrize("lost", [1, cluster.MAX_LOST])
def test_a_call_on_a_node_that_is_lost_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """The node is as gone as a silent network makes it: not a word comes from what runs there."""
    monkeypatch.setattr(cluster, "_told_call", on_numbered_nodes)
    monkeypatch.setattr(cluster, "_alive_nodes", lambda: {f"node {lost}"})
    if lost < cluster.MAX_LOST:
        assert run_tasks(hang_at_first, {"a": (str(tmp_path), lost)}) == {"a": lost}
    else:
        with pytest.raises(RuntimeError, match="a: 3 nodes were lost while it ran there"):
            run_tasks(hang_at_first, {"a": (str(tmp_path), lost)})
    for mark in sorted(tmp_path.iterdir())[:lost]:
        os.kill(int(mark.read_text()), signal.SIGKILL)


def test_a_call_that_never_said_where_it_runs_is_lost_with_any_node() -> None:
    silent, speaking = cluster._RunningCall("a", {"x", "y"}), cluster._RunningCall("b", {"x", "y"}, "x")
    for alive, lost in (({"x", "y", "z"}, (False, False)), ({"x"}, (True, False)), ({"y"}, (True, True))):
        assert (silent.is_lost(alive), speaking.is_lost(alive)) == lost
