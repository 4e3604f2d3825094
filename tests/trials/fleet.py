"""A cloud on one host, for Ray's autoscaler: a node has processes and disks of its own, and its host's network.

Ray's own provider of fake nodes will not do: they share a folder, from which the first one that leaves deletes the
code of the jobs that run.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from ray._private.ray_constants import LABELS_ENVIRONMENT_VARIABLE, RESOURCES_ENVIRONMENT_VARIABLE
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

HEAD = "head"  # its name as an instance
MACHINE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
DISKS = "mount --make-rprivate / && mount -t tmpfs tmpfs /tmp && mount -t tmpfs -o size=1g tmpfs /dev/shm && "
RAY = "exec ray start --address {address} --node-ip-address {host} --block --disable-usage-stats " + (
    "--min-worker-port 0 --max-worker-port 0 --dashboard-agent-listen-port 0 --object-store-memory 150000000"
)


@dataclass
class Node:
    tags: dict[str, str]
    process: subprocess.Popen[bytes] | None = None  # None: the head's, which is not the fleet's

    @property
    def runs(self) -> bool:
        return self.process is None or self.process.poll() is None


class Fleet(NodeProvider):
    """What is killed is not listed any more, as with a cloud."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        tags = {TAG_RAY_NODE_KIND: NODE_KIND_HEAD, TAG_RAY_USER_NODE_TYPE: provider_config["head_node_type"]}
        self.nodes, self.numbers = {HEAD: Node(tags)}, count(1)

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        nodes = list(self.nodes.items())
        return [name for name, node in nodes if node.runs and tag_filters.items() <= node.tags.items()]

    def is_running(self, node_id: str) -> bool:
        return self.nodes[node_id].runs

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self.nodes[node_id].tags

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: dict[str, float], labels: dict[str, str]
    ) -> None:
        del node_config
        group, address = tags[TAG_RAY_USER_NODE_TYPE], self.provider_config["gcs_address"]
        start = RAY.format(address=address, host=address.rpartition(":")[0])
        told = {RESOURCES_ENVIRONMENT_VARIABLE: json.dumps(resources), LABELS_ENVIRONMENT_VARIABLE: json.dumps(labels)}
        for _ in range(count):
            name = f"{group}-{next(self.numbers)}"
            told |= {"RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": group}
            process = subprocess.Popen([*MACHINE, DISKS + start], env=os.environ | told)  # as Ray's updater has it
            self.nodes[name] = Node(tags, process)

    def terminate_node(self, node_id: str) -> None:
        process = self.nodes[node_id].process
        assert process is not None
        process.kill()  # and with it the first process of the machine, and so all
