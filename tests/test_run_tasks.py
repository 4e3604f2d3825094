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

from overproof import ray_tasks
from overproof.cluster import apart_nodes
from overproof.cluster.apart_nodes import ApartNodes
from overproof.errors import InputError
from overproof.ray_tasks import run_tasks

FOREVER_S = 600
GIVE_UP_S = 120
NODES = 2  # of the cluster, on this machine
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


def run_alone(folder: str, name: str) -> str:
    """Its name; refuses to run beside another."""
    mark = Path(folder, "running")
    mark.touch(exist_ok=False)
    time.sleep(0.5)
    mark.unlink()
    return name


def meet(folder: str, name: str) -> str:
    """The node it runs on, once as many as there are nodes run at the same time."""
    Path(folder, name).touch()
    began_s = time.monotonic()
    while len(list(Path(folder).iterdir())) < NODES:
        assert time.monotonic() - began_s < GIVE_UP_S
        time.sleep(0.05)
    return ray.get_runtime_context().get_node_id()


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


@pytest.mark.parametrize("lost", [1, ray_tasks.MAX_LOST])
def test_a_call_on_a_node_that_is_lost_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """The node is as gone as a silent network makes it: not a word comes from what runs there."""
    monkeypatch.setattr(ray_tasks, "_told_call", on_numbered_nodes)
    monkeypatch.setattr(ray_tasks, "_alive_nodes", lambda: {f"node {lost}"})
    if lost < ray_tasks.MAX_LOST:
        assert run_tasks(hang_at_first, {"a": (str(tmp_path), lost)}) == {"a": lost}
    else:
        with pytest.raises(RuntimeError, match="a: 3 nodes were lost while it ran there"):
            run_tasks(hang_at_first, {"a": (str(tmp_path), lost)})
    for mark in sorted(tmp_path.iterdir())[:lost]:
        os.kill(int(mark.read_text()), signal.SIGKILL)


def test_a_call_that_never_said_where_it_runs_is_lost_with_any_node() -> None:
    silent, speaking = ray_tasks._RunningCall("a"), ray_tasks._RunningCall("b", "x")
    for alive, lost in (({"x", "y", "z"}, (False, False)), ({"x"}, (True, False)), ({"y"}, (True, True))):
        gone = {"x", "y"} - alive
        assert (silent.is_lost(alive, gone), speaking.is_lost(alive, gone)) == lost


def test_calls_held_apart_never_share_a_machine(tmp_path: Path) -> None:
    """Whatever the number of its nodes. The results are in the order of the calls."""
    names = ["c", "a", "b"]
    calls = {name: (str(tmp_path), name) for name in names}
    assert list(run_tasks(run_alone, calls, at_once=3, chooser=ApartNodes(0))) == names


def test_calls_held_apart_run_side_by_side_on_machines_of_one_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart_nodes, "_machines_of", lambda nodes: {node: f"machine of {node}" for node in nodes})
    found = run_tasks(meet, {name: (str(tmp_path), name) for name in ("b", "a")}, at_once=2, chooser=ApartNodes(0))
    assert list(found) == ["b", "a"]
    assert set(found.values()) == ray_tasks._alive_nodes()
    other = found["a"]
    assert ApartNodes(gpus=0, used={other})._nodes() != []
    assert ApartNodes(gpus=1)._nodes() == []  # Ray waits for one, or says that there is none
    monkeypatch.setattr("overproof.cluster.ray_private.draining_nodes", lambda: {other})
    assert ApartNodes(gpus=0)._nodes() == [found["b"]]


def test_a_call_whose_node_has_left_before_it_began_is_made_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    gone, asked = "ab" * 28, list[str | None]()

    class GoneFirst:
        def free_node(self, taken: Any) -> str | None:
            asked.append(None if asked else gone)
            return asked[-1]

    monkeypatch.setattr(ray_tasks._RunningCall, "is_lost", lambda *_: False)
    assert run_tasks(double, {"a": (4,)}, chooser=GoneFirst()) == {"a": 8}
    assert asked == [gone, None]
