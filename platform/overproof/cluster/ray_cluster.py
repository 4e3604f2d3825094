"""The Ray cluster a run uses: find or start it, say how large it can ever get."""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from overproof.cluster.cluster_yaml import autoscaled_capacity
from overproof.cluster.machine import available_cpus, gpus
from overproof.cluster.placement import Capacity, NodeShape, describe
from overproof.errors import InputError
from overproof.files import MAX_SOCKET_BYTES, socket_folder

LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # of Ray, below its own folder
LOCAL_MIN_CPUS = 4  # logical: workers and readers share the cores of a small machine
OBJECT_STORE_BYTES = 1 << 30
POLL_S = 0.2
ANSWER_TIMEOUT_S = 5.0  # of a cluster's head
NODE_ANSWER_TIMEOUT_S = 120  # of a node that starts a process for it
NOTICE_EVERY_S = 4.0  # while another job is waited for
LOCK_NAMESPACE = "overproof-locks"  # of the actors whose names are the locks

ResultT = TypeVar("ResultT")


def local_cpus() -> int:
    """Logical CPUs of a cluster that is started on this machine."""
    return max(available_cpus(), LOCAL_MIN_CPUS)


def local_capacity() -> Capacity:
    """What a cluster started on this machine would have: one node of at least four logical CPUs."""
    node = NodeShape("this machine", local_cpus(), gpus(), 1, always=1)
    return Capacity((node,), f"a local cluster here has {describe([node])}")


def is_remote() -> bool:
    """Whether this process is told to use a running cluster (`ray job submit`, or RAY_ADDRESS)."""
    return bool(os.environ.get("RAY_ADDRESS"))


def connect() -> Capacity:
    """Attach to the cluster this process is told to use, else start one here that ends with this process.

    Raises:
        InputError: RAY_ADDRESS names a cluster that does not answer.
    """
    import ray

    if not ray.is_initialized() and is_remote():
        _attach(runtime_env={"py_modules": [str(Path(__file__).parents[1])]}, logging_level=logging.WARNING)
    elif not ray.is_initialized():
        # On one machine the token that Ray makes is of no interest to a user.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        from overproof.cluster import ray_private

        with ray_private.on_loopback(), ray_private.quiet_driver(), preserve_handler(signal.SIGTERM):
            ray.init(
                address="local",  # not whatever else runs on this machine
                _temp_dir=_ray_temp_dir(),
                num_cpus=local_cpus(),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,  # nobody learns its address, and it takes 5 CPU seconds to start
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    return capacity()


def disconnect() -> None:
    """Leave the cluster; one that was started here ends."""
    import ray

    ray.shutdown()


def _attach(**options: Any) -> Any:
    """Attach to the cluster that RAY_ADDRESS names.

    Raises:
        InputError: it does not answer, or not to this process.
    """
    import ray

    from overproof.cluster import ray_private

    named = f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}"
    try:
        why = ray_private.why_no_answer(os.environ["RAY_ADDRESS"], ANSWER_TIMEOUT_S)
        if why is None:
            with ray_private.quiet_driver(), preserve_handler(signal.SIGTERM):
                return ray.init(log_to_driver=False, **options)
    except (OSError, RuntimeError) as error:  # a ConnectionError is one; files of TLS may be missing
        raise InputError(f"{named}: {error}") from None
    file = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if "token" in why and file and not Path(file).is_file():
        why += f" (RAY_AUTH_TOKEN_PATH {file}: no such file)"
    token = "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN with the token of its head"
    expected = token if "token" in why else "the address of a running cluster's head, such as auto or HOST:6379"
    raise InputError(f"{named}: {why}; expected {expected}")


def _ray_temp_dir() -> str | None:
    """Where a local cluster has its sockets: None for where Ray would, unless their paths would be too long there.

    Raises:
        InputError: they would be, and there is no short folder.
    """
    ordinary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(f"{ordinary}/ray/{LONGEST_SOCKET}".encode()) <= MAX_SOCKET_BYTES:
        return None
    folder = socket_folder(LONGEST_SOCKET, prefix="r")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


def dashboard_url() -> str | None:
    """The dashboard of the cluster this process is told to use, None where there is no such cluster.

    Raises:
        InputError: RAY_ADDRESS names a cluster that does not answer.
    """
    if not is_remote():
        return None
    import ray

    url: str | None = _attach(logging_level=logging.ERROR).dashboard_url
    ray.shutdown()
    return f"http://{url}" if url else None


def capacity() -> Capacity:
    """Of the cluster that this process is attached to: the nodes that are up, and those that its autoscaler may add."""
    import ray

    from overproof.cluster import ray_private

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    counts = Counter((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in alive)
    present = [NodeShape("nodes up now", *size, count, always=count) for size, count in sorted(counts.items())]
    here = f"this cluster has {describe(present)}"
    config = ray_private.autoscaler_config()
    if config is None:
        return Capacity(tuple(present), here)
    grown = autoscaled_capacity(config)
    groups = [group for group in grown.nodes if not group.always]  # the head is up
    more = [(group, group.count - counts[group.cpus, group.gpus]) for group in groups]
    addable = [replace(group, count=count, always=0) for group, count in more if count > 0]
    most = None if grown.most_nodes is None else max(0, grown.most_nodes + 1 - len(alive))  # the head is not counted
    where = f"{here} and may add {describe(addable)}" if addable else here
    return Capacity((*present, *addable), where, most)


def call_on_each_node(function: Callable[..., ResultT], *arguments: Any) -> list[tuple[str, ResultT]]:
    """What a function gives on every node of the connected cluster that is up, with the node's address.

    Raises:
        InputError: a node does not answer.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=1)(function)
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    calls = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(*arguments)
        for node in nodes
    ]
    ray.wait(calls, num_returns=len(calls), timeout=NODE_ANSWER_TIMEOUT_S)
    found = []
    for address, call in zip((node["NodeManagerAddress"] for node in nodes), calls, strict=True):
        try:
            found.append((address, ray.get(call, timeout=0)))
        except (GetTimeoutError, RayError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise InputError(f"node {address}: no answer ({why}); expected one that starts tasks") from None
    return found


class _LockHolder:
    """An actor whose name is the lock."""


@contextmanager
def cluster_lock(scope: str, resource: str, notify: Callable[[str], None]) -> Iterator[None]:
    """Hold a resource, such as an artifact of the store ``scope``, for this job; wait while another job holds it.

    Ray gives a name to one actor at a time, and frees it when the actor's job ends, however it ends.
    """
    import ray

    this_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # as long as this process lives
    name = f"{resource} {hashlib.sha256(scope.encode()).hexdigest()[:16]}"  # a URI may hold a secret
    named_actor = ray.remote(num_cpus=0, max_restarts=-1, label_selector=this_node)(_LockHolder).options(
        name=name, namespace=LOCK_NAMESPACE
    )
    holder: Any = None
    began_s = time.monotonic()
    next_notice_s = 0.0
    while holder is None:
        try:
            holder = named_actor.remote()
        except ValueError:  # the name is taken by another job
            waited_s = time.monotonic() - began_s
            if waited_s >= next_notice_s:
                notify(f"{resource}: another job of this cluster is making it; waiting for it ({waited_s:.0f} s)")
                next_notice_s = waited_s + NOTICE_EVERY_S
            time.sleep(POLL_S)
    try:
        yield
    finally:
        ray.kill(holder)


@contextmanager
def preserve_handler(number: signal.Signals) -> Iterator[None]:
    """Take a signal back afterwards, where somebody had it: Ray keeps SIGTERM, its Train and Tune Ctrl-C, for ever."""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        if handler not in (None, signal.SIG_DFL) and threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)
