"""Every private part of Ray core that is used, held to what it is used for, on a real cluster of two nodes."""

from __future__ import annotations

import os
import sys
import time

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from overproof.cluster import ray_private

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have the tests
pytestmark = pytest.mark.usefixtures("ray_cluster")


class OneOfThese:
    """An actor that says where it is and may reserve a CPU."""

    def pid(self) -> int:
        return os.getpid()

    def reserve(self) -> str:
        group = placement_group([{"CPU": 1}])
        assert group.wait(30)
        return str(group.id.hex())


def node_ids() -> set[str]:
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"] for node in nodes if node["Alive"]}


def test_what_is_free_is_told_for_each_node() -> None:
    free = ray_private.free_resources()
    assert node_ids() <= set(free)
    assert all(0 <= free[node].get("CPU", 0) <= 4 for node in node_ids())


def test_small_values_are_kept_by_their_keys_until_they_are_forgotten() -> None:
    ray_private.store_value("kept/one", b"first")
    ray.get(ray.remote(num_cpus=0)(ray_private.store_value).remote("kept/one", b"second"))
    ray_private.store_value("kept/two", b"")
    ray_private.store_value("keptnot", b"another's")
    assert ray_private.stored_values("kept/") == {"kept/one": b"second", "kept/two": b""}
    ray_private.delete_values("kept/")
    assert ray_private.stored_values("kept/") == {}
    assert ray_private.stored_values("keptnot") == {"keptnot": b"another's"}
    ray_private.delete_values("keptnot")


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


def test_what_an_actor_reserved_outlives_it_until_it_is_given_back() -> None:
    first, second = (ray.remote(num_cpus=0)(OneOfThese).remote() for _ in range(2))
    own, others = ray.get([first.reserve.remote(), second.reserve.remote()])
    ray.kill(first)
    assert placement_group_table()[own]["state"] == "CREATED"
    ray_private.remove_placement_groups(first._actor_id.hex())
    deadline = time.monotonic() + 30
    while placement_group_table()[own]["state"] != "REMOVED" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert placement_group_table()[own]["state"] == "REMOVED"
    assert placement_group_table()[others]["state"] == "CREATED"
    ray_private.remove_placement_groups(second._actor_id.hex())
    ray.kill(second)
