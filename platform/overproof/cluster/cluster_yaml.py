"""The cluster that a `ray up` file may grow to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overproof.cluster.placement import Capacity, NodeShape, describe
from overproof.config.recipe import read_yaml_mapping
from overproof.errors import InputError

DEFAULT_MAX_WORKERS = 2  # as in Ray's defaults of every cloud


def read_cluster_yaml(path: Path) -> Capacity:
    """Node types with their limits, the head included.

    Raises:
        InputError: the file cannot be read, or does not say what a node has.
    """
    tree = read_yaml_mapping(path, "a file for `ray up`, such as cluster.yaml", "a file for `ray up`")
    return capacity_of(tree, str(path))


def capacity_of(tree: Mapping[str, Any], path: str) -> Capacity:
    """Of what a file holds.

    Raises:
        InputError: it does not say what a node has.
    """
    types, head = tree.get("available_node_types"), tree.get("head_node_type")
    if not isinstance(types, dict) or head not in types:
        raise InputError(f"{path}: expected available_node_types, and head_node_type to be one of them")
    limit = _count(path, "max_workers", tree.get("max_workers", DEFAULT_MAX_WORKERS))
    nodes = []
    for name, kind in types.items():
        where = f"available_node_types.{name}"
        if not isinstance(kind, dict):
            raise InputError(f"{path}: {where}: found {kind!r}; expected a mapping")
        most = _count(path, f"{where}.max_workers", kind.get("max_workers", 0 if name == head else limit))
        resources = kind.get("resources") or {}
        if "CPU" not in resources and (most or name == head):
            raise InputError(
                f"{path}: {where}.resources: no CPU; Ray would ask the cloud about the machine, `plan` does not: "
                "write what a node has, such as resources: {CPU: 16, GPU: 1}"
            )
        is_head = int(name == head)
        cpus, gpus = (float(_number(path, where, resources.get(unit, 0))) for unit in ("CPU", "GPU"))
        nodes.append(NodeShape(str(name), cpus, gpus, min(most, limit) + is_head, always=is_head))
    most = min(limit, sum(node.count - node.always for node in nodes))
    where = f"{path} may grow to {describe(nodes)}, {most} beside the head at the same time"
    return Capacity(tuple(nodes), where, limit)


def autoscaled_capacity(tree: Mapping[str, Any]) -> Capacity:
    """Of what a running autoscaler goes by: it starts no node of a type for CPUs that it is not said to have."""
    types = {
        name: {**kind, "resources": {"CPU": 0} | (kind.get("resources") or {})}
        for name, kind in tree["available_node_types"].items()
    }
    return capacity_of({**tree, "available_node_types": types}, "its autoscaler's file")


def _count(path: str, where: str, value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise InputError(f"{path}: {where}: found {value!r}; expected a whole number, 0 or more")
    return value


def _number(path: str, where: str, value: Any) -> float:
    if not isinstance(value, int | float) or value < 0:
        raise InputError(f"{path}: {where}.resources: found {value!r}; expected a number, 0 or more")
    return value
