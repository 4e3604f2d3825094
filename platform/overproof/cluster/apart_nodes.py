"""Nodes for calls that are held apart: each on a machine of its own, for what they measure is its speed."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overproof.ray_tasks import CPUS, on_node

MACHINE_TIMEOUT_S = 60  # for a node to say which machine it is on
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux's: one for all containers of a machine


@dataclass
class ApartNodes:
    """Nodes of one kind, and the machine that each is on: of the nodes that have what a call asks for and nothing
    dearer, the kind of which most are up. Calls never run on one machine at the same time.
    """

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
    asked = {task.options(**on_node(node)).remote(): node for node in nodes}
    found = dict[str, str]()
    for answer in ray.wait(list(asked), num_returns=len(asked), timeout=MACHINE_TIMEOUT_S)[0]:
        try:
            found[asked[answer]] = ray.get(answer)
        except RayError:
            continue
    return found


def _this_machine() -> str:
    return BOOT_ID.read_text() if BOOT_ID.exists() else platform.node()
