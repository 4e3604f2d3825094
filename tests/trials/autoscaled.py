"""A cluster that grows and shrinks by itself on one host: the groups of cluster.yaml, smaller, under Ray's autoscaler
as `ray up` starts it, with nodes of `fleet.Fleet`.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import yaml
from fleet import HEAD

from hosts import GCS_PORT, REPOSITORY, Hosts, hosts_up

GROUPS = {"cpu": {"CPU": 3}, "gpu": {"CPU": 2, "GPU": 1}, "serve": {"CPU": 2, "serve": 1}}
MOST = 2  # nodes of a group
IDLE_S = 20
LOOK_EVERY_S = 0.5
WAIT_S = 300.0


@dataclass(frozen=True)
class Change:
    """A node that came, or left."""

    at: float
    group: str
    came: bool
    count: int  # of its group, after that


def cluster_config(address: str) -> dict[str, Any]:
    """The repository's cluster.yaml with nodes that this machine can hold."""
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    provider = {
        "type": "external", "module": "fleet.Fleet", "gcs_address": address,
        "head_node_type": config["head_node_type"], "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }  # fmt: skip
    lists = ["initialization_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"]
    commands = [f"{part}_commands" for part in ("setup", "head_setup", "worker_setup", "head_start_ray",
                                                "worker_start_ray")]  # fmt: skip
    config |= {"provider": provider, "file_mounts": {}, "docker": {}, "file_mounts_sync_continuously": False}
    config |= {"idle_timeout_minutes": IDLE_S / 60, **{name: [] for name in (*lists, *commands)}}
    for name, group in config["available_node_types"].items():
        group["node_config"] = {}
        if name in GROUPS:
            group["resources"] = GROUPS[name]
            group["max_workers"] = MOST
    return config


class Cluster:
    """What is up, and the nodes that came and left; ``autoscaled_cluster`` makes it."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.changes: list[Change] = []
        self.nodes: dict[str, str] = {}  # that are up, with their groups; the head is none of them
        self._more, self._ended = threading.Condition(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        bearer = {"Authorization": f"Bearer {self.hosts.token}"}
        with httpx.Client(base_url=self.hosts.dashboard, headers=bearer, trust_env=False, timeout=30) as client:
            while not self._ended.wait(LOOK_EVERY_S):
                try:
                    rows = client.get("/api/v0/nodes").json()["data"]["result"]["result"]
                except (httpx.TransportError, KeyError, TypeError):
                    continue
                alive = [row for row in rows if row["state"] == "ALIVE" and not row["is_head_node"]]
                self._take_in({row["node_id"]: _group(row["resources_total"]) for row in alive})

    def _take_in(self, groups: dict[str, str]) -> None:
        with self._more:
            for node in groups.keys() ^ self.nodes.keys():
                group = groups.get(node) or self.nodes[node]
                count = list(groups.values()).count(group)
                self.changes.append(Change(time.monotonic(), group, node in groups, count))
            self.nodes = groups
            self._more.notify_all()

    def wait_until(self, true: Callable[[], bool], what: str) -> float:
        """When it became true of the nodes that are up."""
        with self._more:
            assert self._more.wait_for(true, WAIT_S), f"no {what}; up are {self.nodes}"
        return time.monotonic()

    def count(self, group: str) -> int:
        """Nodes of a group that are up."""
        return list(self.nodes.values()).count(group)

    def describe(self) -> str:
        """As ``2 of cpu, 1 of gpu``."""
        counts = {group: self.count(group) for group in GROUPS}
        return ", ".join(f"{count} of {group}" for group, count in counts.items() if count) or "none"

    def most(self, group: str, since: float, until: float) -> int:
        """The most nodes of a group that were up at a time, between two moments."""
        with self._more:
            counts = [(change.at, change.count) for change in self.changes if change.group == group]
        before = [count for at, count in counts if at < since][-1:]
        return max([*before, *(count for at, count in counts if since <= at <= until)], default=0)

    def node_running(self, title: str) -> psutil.Process:
        """The first process of a node on which one with such a title runs, once there is one."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            for process in psutil.Process(self.hosts.head.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if title in " ".join(process.cmdline()):
                        return next(each for each in process.parents() if each.name() == "unshare")
            time.sleep(0.2)
        raise AssertionError(f"no process {title} on any node")

    def end(self) -> None:
        self._ended.set()


def _group(resources: dict[str, float]) -> str:
    return next((group for mark, group in (("GPU", "gpu"), ("serve", "serve")) if mark in resources), "cpu")


@contextmanager
def autoscaled_cluster() -> Iterator[Cluster]:
    """A head alone, to begin with; all that is started ends with the block."""
    with hosts_up() as hosts:
        file = hosts.folder / f"{secrets.token_hex(4)}.yaml"
        file.write_text(yaml.safe_dump(cluster_config(f"{hosts.subnet}.1:{GCS_PORT}")))
        hosts.start_head(
            f"--autoscaling-config={file}", PYTHONPATH=str(REPOSITORY / "tests/trials"),
            RAY_enable_autoscaler_v2="1", RAY_CLOUD_INSTANCE_ID=HEAD, RAY_NODE_TYPE_NAME="head",
            AUTOSCALER_UPDATE_INTERVAL_S="1",
        )  # fmt: skip
        cluster = Cluster(hosts)
        try:
            yield cluster
        finally:
            cluster.end()
