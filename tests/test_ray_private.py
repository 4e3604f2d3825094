"""Every private part of Ray core that is used, held to what it is used for, on a real cluster of two nodes."""

from __future__ import annotations

import os
import sys

import pytest
import ray

from overproof.cluster import ray_private

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have the tests
pytestmark = pytest.mark.usefixtures("ray_cluster")


class OneOfThese:
    """An actor that says where it is."""

    def pid(self) -> int:
        return os.getpid()


def node_ids() -> set[str]:
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"] for node in nodes if node["Alive"]}


def test_what_is_free_is_told_for_each_node() -> None:
    free = ray_private.free_resources()
    assert node_ids() <= set(free)
    assert all(0 <= free[node].get("CPU", 0) <= 4 for node in node_ids())


def test_no_node_is_drained_and_no_autoscaler_is_there() -> None:
    assert not ray_private.draining_nodes() & node_ids()
    assert ray_private.autoscaler_groups() == []


def test_an_actor_is_found_by_its_class_while_it_lives() -> None:
    actor = ray.remote(num_cpus=0)(OneOfThese).remote()
    pid = ray.get(actor.pid.remote())
    (found,) = ray_private.living_actors("OneOfThese")
    assert found.pid == pid
    assert found.node_id in node_ids()
    assert ray_private.living_actors("NoneOfThese") == []
    ray.kill(actor)
