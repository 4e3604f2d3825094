"""The parts of Ray core's private API that are used, in one place, as any release of Ray may move them.

Its public API does not say why a cluster does not answer, what an autoscaler may add, which nodes are drained, what is
free on each node, where an actor's process is, or whose a placement group is; it keeps no small values, starts one node
on a machine, and leaves standard error to its core. tests/test_ray_private.py and test_local_cluster.py hold every
function to what it is used for.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import ray
import yaml
from ray._private import grpc_utils, ray_constants, services, worker
from ray._private.authentication import authentication_utils
from ray._private.state import actors, available_resources_per_node, state
from ray.cluster_utils import Cluster
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError
from ray.experimental import internal_kv
from ray.util.placement_group import PlacementGroup, remove_placement_group

from overproof.cluster.placement import Resources

LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
STDERR = 2
HEAD_RESOURCE = "node:__internal_head__"
HEAD_TIMEOUT_S = 60
AUTOSCALER_OPTION = "--autoscaling-config"


@dataclass(frozen=True)
class ActorProcess:
    """The process of a living actor."""

    pid: int
    node_id: str


def why_no_answer(address: str, timeout_s: float) -> str | None:
    """Why the head of a cluster does not answer this process, in words; None where it does. ``address`` is as in
    RAY_ADDRESS.

    Private, for ``ray.init`` asks for twenty seconds with a token that is wrong, for forty where nothing listens, and
    then tells to stop Ray.
    """
    if "://" in address or address == "local":
        return None  # of Ray's client, which asks by itself; or one that is to be started
    try:
        found = services.canonicalize_bootstrap_address(address)
    except ConnectionError:
        found = None
    except ValueError as error:
        return str(error)
    if found is None:
        return "no cluster runs on this machine"
    try:
        with grpc_utils.init_grpc_channel(found, ray_constants.GLOBAL_GRPC_OPTIONS) as channel:  # past any proxy
            head: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
            asked = gcs_service_pb2.GetClusterIdRequest()  # type: ignore[attr-defined]
            head.GetClusterId(asked, timeout=timeout_s)
    except AuthenticationError:
        return "it asks for a token, and there is none"
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            return "nothing answers there"
        if error.code() != grpc.StatusCode.UNAUTHENTICATED:
            return None  # it is there, and may be slow
        given = authentication_utils.is_token_auth_enabled()
        return "the token is not its own" if given else "it asks for a token, and RAY_AUTH_MODE is not token"
    return None


def autoscaler_config() -> dict[str, Any] | None:
    """What the cluster's autoscaler goes by, in the form of a file for `ray up`; None where there is no autoscaler.

    Private, for Ray tells nobody: `GetClusterConfig` of its head is filled in by no autoscaler of its own. There is but
    the file that ``ray start --autoscaling-config`` was given, on the head, in the words of the process that reads it.
    """
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    (head,) = (node for node in nodes if node["Alive"] and HEAD_RESOURCE in node["Resources"])
    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    if head["NodeManagerAddress"] == ray.util.get_node_ip_address():  # type: ignore[no-untyped-call]
        return _read_autoscaler_config(port)
    label = {"ray.io/node-id": head["NodeID"]}
    read: Any = ray.remote(num_cpus=0)(_read_autoscaler_config).options(label_selector=label)
    config: dict[str, Any] | None = ray.get(read.remote(port), timeout=HEAD_TIMEOUT_S)
    return config


def _read_autoscaler_config(gcs_port: str) -> dict[str, Any] | None:
    """On the head."""
    for process in psutil.process_iter(["cmdline"]):
        options = dict(
            word.split("=", 1) for word in process.info["cmdline"] or () if word.startswith("--") and "=" in word
        )
        if AUTOSCALER_OPTION in options and options.get("--gcs-address", "").rpartition(":")[2] == gcs_port:
            config: dict[str, Any] = yaml.safe_load(Path(options[AUTOSCALER_OPTION]).read_text(encoding="utf-8"))
            return config
    return None


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away."""
    return set(state.get_draining_nodes())


def free_resources() -> dict[str, Resources]:
    """What nobody uses on each node, by its id; as of some seconds ago."""
    free: dict[str, Resources] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return free


def living_actors(class_name: str) -> list[ActorProcess]:
    """The processes of the actors of one class."""
    found = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
    return [
        ActorProcess(int(actor["Pid"]), str(actor["Address"]["NodeID"]))
        for actor in found
        if actor["ActorClassName"] == class_name
    ]


def remove_placement_groups(creator_actor_id: str) -> None:
    """Give back what an actor has reserved: a placement group outlives its actor, until the whole driver ends."""
    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(row)  # type: ignore[attr-defined]
        if group.creator_actor_id.hex() == creator_actor_id and group.state != group.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def store_value(key: str, value: bytes) -> None:
    """Keep a small value in the memory of the cluster's head, over what the key had before."""
    internal_kv._internal_kv_put(key, value)


def stored_values(prefix: str) -> dict[str, bytes]:
    """Every value whose key begins so."""
    keys = internal_kv._internal_kv_list(prefix)
    found = {key.decode(): internal_kv._internal_kv_get(key) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def delete_values(prefix: str) -> None:
    """Forget every value whose key begins so."""
    internal_kv._internal_kv_del(prefix, del_by_prefix=True)


@contextmanager
def on_loopback() -> Iterator[None]:
    """Have a cluster that is started meanwhile listen at 127.0.0.1, with all its ports; no other machine can join it.

    Private, for Ray does so on macOS and Windows only: on Linux it replaces even a ``_node_ip_address`` of 127.0.0.1 by
    the machine's own. Its daemons take the variable from the environment, this process has read it already.
    """
    before, enabled = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
        if before is not None:
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = before


@contextmanager
def quiet_driver() -> Iterator[None]:
    """Have Ray's core in a process that connects meanwhile write nothing but fatal errors to standard error.

    Private, for the level is an environment variable, which Ray's daemons read as well, whose logs are to be whole.
    What is left out reaches this process as exceptions, or is harmless: of every actor of Ray Data it warns that its
    arguments lie in the object store.
    """
    connect = worker.connect

    def connect_quietly(*args: Any, **options: Any) -> Any:
        os.environ[LOG_LEVEL] = "fatal"
        try:
            with _without_stderr_lines("Set ray log level"):  # it tells of the variable, too
                return connect(*args, **options)
        finally:
            del os.environ[LOG_LEVEL]

    if LOG_LEVEL not in os.environ:
        worker.connect = connect_quietly
    try:
        yield
    finally:
        worker.connect = connect


@contextmanager
def _without_stderr_lines(part: str) -> Iterator[None]:
    """Hold back what this process, its C++ parts included, writes to standard error meanwhile; lines that hold ``part``
    for good.
    """
    sys.stderr.flush()
    own = os.dup(STDERR)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), STDERR)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(own, STDERR)
            os.close(own)
            held.seek(0)
            for line in held:
                if part.encode() not in line:
                    os.write(STDERR, line)


@contextmanager
def local_head(cpus: int, object_store_bytes: int) -> Iterator[tuple[str, str]]:
    """A cluster of one node that listens at 127.0.0.1, at ports that were free, and ends with the block: its address,
    and that of its dashboard. This process is not connected to it.

    It ends without grace, of which Ray's daemon gives every worker half a minute: what is served has to be stopped
    before, to end in order.
    """
    node = {"num_cpus": cpus, "object_store_memory": object_store_bytes}
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0}
    with on_loopback():
        cluster = Cluster(initialize_head=True, head_node_args=node | dashboard)
        head: Any = cluster.head_node
        try:
            yield cluster.address, str(cluster.webui_url)
        finally:
            cluster.remove_node(head, allow_graceful=False)
            cluster.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def local_nodes(cpus: Sequence[int], object_store_bytes: int) -> Iterator[Any]:
    """A Ray cluster on this machine with a node for each number of CPUs, and this process connected to it."""
    head = {"num_cpus": cpus[0], "object_store_memory": object_store_bytes}
    before = os.environ.get("RAY_ADDRESS")
    cluster = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
    try:
        for count in cpus[1:]:
            cluster.add_node(num_cpus=count, object_store_memory=object_store_bytes)
        os.environ["RAY_ADDRESS"] = cluster.address  # so that nothing looks at this machine for room
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        yield cluster
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        if before is not None:
            os.environ["RAY_ADDRESS"] = before
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]
