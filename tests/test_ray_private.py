"""Every private part of Ray core that is used, held to what it is used for, on a real cluster of two nodes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import yaml
from ray.util.placement_group import placement_group, placement_group_table

from overproof.cluster import ray_cluster, ray_private
from overproof.serve.net import free_port

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have the tests
pytestmark = pytest.mark.usefixtures("ray_cluster")


WAIT_S = 5.0


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


HEAD = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_why_a_cluster_does_not_answer_is_told_at_once(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ray_private.why_no_answer(ray_cluster, WAIT_S) is None
    assert ray_private.why_no_answer(f"127.0.0.1:{free_port('127.0.0.1', 0)}", WAIT_S) == "nothing answers there"
    (tmp_path / "token").write_text("0123456789abcdef" * 2)
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    command = [sys.executable, "-c", HEAD]
    with subprocess.Popen(
        command, env=os.environ | settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as head:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        told = "it asks for a token, and RAY_AUTH_MODE is not token"
        assert ray_private.why_no_answer(address, WAIT_S) == told
        monkeypatch.setenv("RAY_ADDRESS", address)
        asked = [sys.executable, "-m", "overproof.cli.main", "deployments"]
        nobody, wrong = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": "f" * 32}
        for environment, why in (
            ({}, told),
            (nobody, "it asks for a token, and there is none"),
            (settings | wrong, "the token is not its own"),
            (settings, "nothing is served on this cluster"),
        ):
            done = subprocess.run(asked, env=os.environ | environment, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert why in done.stderr
        head.communicate()


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


def test_no_node_is_drained() -> None:
    assert not ray_private.draining_nodes() & node_ids()


def test_what_an_autoscaler_may_add_is_in_the_file_that_its_process_was_given(tmp_path: Path) -> None:
    assert ray_private.autoscaler_config() is None
    assert ray_cluster.capacity().most_nodes is None
    file = tmp_path / "bootstrap.yaml"
    types = {"head": {}, "small": {"resources": {"CPU": 4}, "max_workers": 5},
             "large": {"resources": {"CPU": 16, "GPU": 1}, "max_workers": 8}}  # fmt: skip
    tree = {"max_workers": 6, "head_node_type": "head", "available_node_types": types}
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    named = [f"--gcs-address={ray.get_runtime_context().gcs_address}", f"--autoscaling-config={file}"]
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *named])
    try:
        found = ray_cluster.capacity()
    finally:
        process.kill()
        process.wait()
    assert [(node.name, node.cpus, node.gpus, node.count, node.always) for node in found.nodes] == [
        ("nodes up now", 4, 0, 2, 2), ("small", 4, 0, 3, 0), ("large", 16, 1, 6, 0),
    ]  # fmt: skip
    assert found.most_nodes == 5
    assert (
        found.where == "this cluster has 2 nodes of 4 CPUs and may add 3 nodes of 4 CPUs and 6 nodes of 16 CPUs, 1 GPU"
    )


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
