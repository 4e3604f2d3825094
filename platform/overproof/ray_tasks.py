"""Calls of one function on a Ray cluster, some at a time; again if a node is lost. The one way to run tasks."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from overproof.errors import InputError

MAX_LOST = 3  # nodes, each with the same call
HEARTBEAT_S = 1.0  # at most between two calls of ``on_wait``, and at least between two looks at the nodes
GATHER_S = 0.05
CPUS = 1  # that a call reserves

ResultT = TypeVar("ResultT")


class NodeChooser(Protocol):
    """Says which node the next call is for."""

    def free_node(self, taken: Sequence[str | None]) -> str | None:
        """By the nodes that calls run on, None where one has not said; None where there is no node now."""


def run_tasks(
    function: Callable[..., ResultT],
    calls: Mapping[str, tuple[Any, ...]],
    on_wait: Callable[[int, str], None] | None = None,
    at_once: int = 1,
    gpus: float = 0.0,
    chooser: NodeChooser | None = None,
) -> dict[str, ResultT]:
    """Call a function on the cluster with each of these arguments, ``at_once`` at a time; the results come by name, in
    the order of the calls. What all calls share is best held by the function, as a method of it: that travels once.

    A call reserves one CPU. While some run, ``on_wait`` is told how many are done and which ended last. A call on a
    node that is lost is made again on another: Ray by itself notices it up to seven minutes later where the network
    fell silent, when gRPC's keepalive gives the call up. With a ``chooser`` each call waits for the node that it names.

    Raises:
        InputError: a call raised one; the others are cancelled.
        RuntimeError: a call was on ``MAX_LOST`` nodes that were lost.
    """
    import ray
    from ray.exceptions import RayTaskError, TaskUnschedulableError

    remote: Any = ray.remote(num_cpus=CPUS, num_gpus=gpus, num_returns="streaming")(_told_call)
    anywhere, given = remote.options(name=function.__name__), ray.put(function)
    todo, running, lost = deque(calls), dict[Any, _RunningCall](), Counter[str]()
    results: dict[str, ResultT] = {}
    alive, looked_s = _alive_nodes(), time.monotonic()
    last = ""

    def make_again(call: _RunningCall, is_lost: bool) -> None:
        lost[call.name] += is_lost
        if lost[call.name] == MAX_LOST:
            raise RuntimeError(f"{call.name}: {MAX_LOST} nodes were lost while it ran there")
        todo.appendleft(call.name)

    try:
        while todo or running:
            while todo and len(running) < at_once:
                # Not all at once: a process that is used again has its imports paid.
                node = chooser.free_node([call.node for call in running.values()]) if chooser else None
                if chooser and node is None and running:
                    break
                name = todo.popleft()
                placed = remote.options(name=function.__name__, **on_node(node)) if node else anywhere
                running[placed.remote(given, calls[name])] = _RunningCall(name, node)
            if on_wait is not None:
                on_wait(len(results), last)
            ray.wait(list(running), timeout=HEARTBEAT_S)
            # To look at each costs as much as to take one back: those of a moment are taken together.
            ready: Sequence[Any] = ray.wait(list(running), num_returns=len(running), timeout=GATHER_S)[0]
            for items in ready:
                call = running[items]
                try:
                    item: Any = ray.get(next(items))
                except TaskUnschedulableError:  # the node that it was for has left
                    make_again(running.pop(items), is_lost=True)
                    continue
                except RayTaskError as error:
                    if isinstance(error.cause, InputError):
                        raise error.cause from None
                    raise
                if not call.began:
                    call.node, call.began = item, True
                else:
                    last = running.pop(items).name
                    results[last] = item
            if time.monotonic() - looked_s < HEARTBEAT_S:
                continue
            before, alive, looked_s = alive, _alive_nodes(), time.monotonic()
            for items in [items for items, call in running.items() if call.is_lost(alive, before - alive)]:
                ray.cancel(items)  # of those that may not be lost
                call = running.pop(items)
                make_again(call, call.began)  # others may still wait for a node, and nodes may just leave
    finally:
        for items in running:
            ray.cancel(items)
    return {name: results[name] for name in calls}


@dataclass
class _RunningCall:
    name: str
    node: str | None = None  # where it runs, once it has said so, or is to run
    began: bool = False

    def is_lost(self, alive: Collection[str], gone: Collection[str]) -> bool:
        """One that has not said where it runs may be on any of the nodes that have just ``gone``."""
        return bool(gone) if self.node is None else self.node not in alive


def on_node(node: str) -> dict[str, Any]:
    """Options of a task that is to run there and nowhere else."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _told_call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Any]:
    """The node that this runs on, then the result."""
    import ray

    yield ray.get_runtime_context().get_node_id()
    yield function(*arguments)


def _alive_nodes() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
