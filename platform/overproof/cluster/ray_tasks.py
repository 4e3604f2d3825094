"""Calls of one function on a Ray cluster, some at a time or each on a machine of its own; again if a node is lost."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

MAX_LOST = 3  # nodes, each with the same call
HEARTBEAT_S = 1.0  # at most between two calls of ``on_wait``
MACHINE_TIMEOUT_S = 60  # for a node to say which machine it is on
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux's: one for all containers of a machine
CPUS = 1  # that a call reserves

ResultT = TypeVar("ResultT")


def run_tasks(
    function: Callable[..., ResultT],
    calls: Mapping[str, tuple[Any, ...]],
    on_wait: Callable[[int, str], None] | None = None,
    at_once: int = 1,
    gpus: float = 0.0,
    apart: bool = False,
) -> dict[str, ResultT]:
    """Call a function on the cluster with each of these arguments, ``at_once`` at a time; the results come by name, in
    the order of the calls.

    A call reserves one CPU. While some run, ``on_wait`` is told how many are done and which ended last. A call on a
    node that is lost is made again on another: Ray by itself notices it up to seven minutes later where the network
    fell silent, when gRPC's keepalive gives the call up.

    Calls that are held ``apart`` never run on one machine at the same time, for what they measure is its speed, and all
    on nodes of one kind: of those that have what a call asks for and nothing dearer, the kind of which most are up.

    Raises:
        RuntimeError: a call was on ``MAX_LOST`` nodes that were lost.
    """
    import ray
    from ray.exceptions import TaskUnschedulableError

    remote: Any = ray.remote(num_cpus=CPUS, num_gpus=gpus, num_returns="streaming")(_told_call)
    todo, running, lost = list(calls), dict[Any, _RunningCall](), Counter[str]()
    machines = _Machines(gpus) if apart else None
    results: dict[str, ResultT] = {}
    last = ""

    def make_again(call: _RunningCall, is_lost: bool) -> None:
        lost[call.name] += is_lost
        if lost[call.name] == MAX_LOST:
            raise RuntimeError(f"{call.name}: {MAX_LOST} nodes were lost while it ran there")
        todo.insert(0, call.name)

    while todo or running:
        while todo and len(running) < (len(calls) if apart else at_once):
            # Not all at once: a process that is used again has its imports paid.
            node = machines.free_node([call.node for call in running.values()]) if machines else None
            if machines and node is None and running:
                break
            name = todo.pop(0)
            items = remote.options(name=function.__name__, **_on(node)).remote(function, calls[name])
            running[items] = _RunningCall(name, _alive_nodes(), node)
        if on_wait is not None:
            on_wait(len(results), last)
        ready: Sequence[Any] = ray.wait(list(running), timeout=HEARTBEAT_S)[0]
        for items in ready:
            call = running[items]
            try:
                item: Any = ray.get(next(items))
            except TaskUnschedulableError:  # the node that it was for has left
                make_again(running.pop(items), is_lost=True)
                continue
            if not call.began:
                call.node, call.began = item, True
            else:
                last = running.pop(items).name
                results[last] = item
        alive = _alive_nodes()
        for items in [items for items, call in running.items() if call.is_lost(alive)]:
            ray.cancel(items)  # of those that may not be lost
            call = running.pop(items)
            make_again(call, call.began)  # others may still wait for a node, and nodes may just leave
    return {name: results[name] for name in calls}


@dataclass
class _RunningCall:
    name: str
    among: set[str]  # the nodes that were alive when it was made
    node: str | None = None  # where it runs, once it has said so, or is to run
    began: bool = False

    def is_lost(self, alive: set[str]) -> bool:
        """One that has not said where it runs may be on any node that is gone."""
        return not self.among <= alive if self.node is None else self.node not in alive


@dataclass
class _Machines:
    """Nodes of one kind for calls that are held apart, and the machine that each is on."""

    gpus: float
    of_node: dict[str, str | None] = field(default_factory=dict)  # None: it did not say
    used: set[str] = field(default_factory=set)  # nodes that have a call, or had one

    def free_node(self, taken: Sequence[str | None]) -> str | None:
        """A node with room, on a machine on which no call runs; None also while it is not known where one runs."""
        from overproof.cluster import ray_private

        running = [node for node in taken if node is not None]
        if len(running) < len(taken):
            return None
        self.used |= {*running}
        free = ray_private.free_resources()
        nodes = [node for node in self._nodes() if node not in running]
        nodes = [node for node in nodes if node in self.used or self._has_room(free.get(node, {}))]  # it is old news
        if running and nodes:
            self._ask({*nodes, *running})
            busy = {None, *(self.of_node[node] for node in running)}
            nodes = [node for node in nodes if self.of_node[node] not in busy]
        return nodes[0] if nodes else None

    def _nodes(self) -> list[str]:
        """Those of one kind that could have a call: the kind that has had one, once there is such a kind."""
        import ray

        from overproof.cluster import ray_private

        kinds, leaving = dict[tuple[Any, ...], list[str]](), ray_private.draining_nodes()
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            resources = node["Resources"]
            if node["Alive"] and node["NodeID"] not in leaving and self._has_room(resources):
                models = sorted(name for name in resources if name.startswith("accelerator_type:"))
                has_idle_gpus = not self.gpus and "GPU" in resources
                kind = has_idle_gpus, resources["CPU"], resources.get("GPU", 0.0), *models
                kinds.setdefault(kind, []).append(node["NodeID"])

        def rank(kind: tuple[Any, ...]) -> tuple[int, bool, int]:
            return len(self.used & {*kinds[kind]}), not kind[0], len(kinds[kind])

        return kinds[max(kinds, key=rank)] if kinds else []

    def _has_room(self, resources: Mapping[str, float]) -> bool:
        return resources.get("CPU", 0) >= CPUS and resources.get("GPU", 0) >= self.gpus

    def _ask(self, nodes: set[str]) -> None:
        if unknown := nodes - self.of_node.keys():
            self.of_node |= dict.fromkeys(unknown) | _machines_of(unknown)


def _machines_of(nodes: Iterable[str]) -> dict[str, str]:
    """By node; one that does not answer is left out."""
    import ray
    from ray.exceptions import RayError

    task: Any = ray.remote(num_cpus=0, max_retries=0)(_this_machine)
    asked = {task.options(**_on(node)).remote(): node for node in nodes}
    found = dict[str, str]()
    for answer in ray.wait(list(asked), num_returns=len(asked), timeout=MACHINE_TIMEOUT_S)[0]:
        try:
            found[asked[answer]] = ray.get(answer)
        except RayError:
            continue
    return found


def _this_machine() -> str:
    return BOOT_ID.read_text() if BOOT_ID.exists() else platform.node()


def _on(node: str | None) -> dict[str, Any]:
    """Options of a task that is to run there and nowhere else."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {} if node is None else {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _told_call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Any]:
    """The node that this runs on, then the result."""
    import ray

    yield ray.get_runtime_context().get_node_id()
    yield function(*arguments)


def _alive_nodes() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
