"""The Ray cluster a run uses: find or start it, say how large it can ever get, relay progress."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overproof.cluster.placement import Capacity, NodeShape, describe
from overproof.errors import InputError
from overproof.stage_context import NOTICE, Progress

LOCAL_MIN_CPUS = 4  # logical: workers and readers share the cores of a small machine
OBJECT_STORE_BYTES = 1 << 30
POLL_S = 0.2
LOCK_NAMESPACE = "overproof-held"  # the namespace of what jobs hold


def local_capacity() -> Capacity:
    """What a cluster started on this machine would have: one node of at least four logical CPUs."""
    cpus = max(os.cpu_count() or 1, LOCAL_MIN_CPUS)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    node = NodeShape("this machine", cpus, gpus, 1, always=1)
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
        try:
            ray.init(runtime_env={"py_modules": [str(Path(__file__).parents[1])]}, log_to_driver=False)
        except (ConnectionError, RuntimeError) as error:
            raise InputError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: {error}") from None
    elif not ray.is_initialized():
        # On one machine the token that Ray makes for itself is no news to a user.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        ray.init(
            address="local",  # not whatever else runs on this machine
            num_cpus=int(local_capacity().cpus),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,  # nobody is told where it is, and it takes 5 CPU seconds to start
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    return _attached_capacity()


def dashboard_url() -> str | None:
    """The dashboard of the cluster this process is told to use, None where there is no such cluster.

    Raises:
        InputError: RAY_ADDRESS names a cluster that does not answer.
    """
    if not is_remote():
        return None
    import ray

    try:
        url: str | None = ray.init(log_to_driver=False, logging_level=logging.ERROR).dashboard_url
    except (ConnectionError, RuntimeError) as error:
        raise InputError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: {error}") from None
    ray.shutdown()
    return f"http://{url}" if url else None


def _attached_capacity() -> Capacity:
    import ray
    from ray._private.state import state

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    shapes = Counter((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in alive)
    now = [NodeShape("nodes up now", *size, count, always=count) for size, count in sorted(shapes.items())]
    config = state.get_cluster_config()  # of its autoscaler, if it has one
    grown = []
    for group in config.node_group_configs if config else ():
        cpus, gpus = float(group.resources.get("CPU", 0)), float(group.resources.get("GPU", 0))
        more = max(0, group.max_count - shapes[cpus, gpus])
        if more:
            grown.append(NodeShape(group.name, cpus, gpus, more))
    where = f"this cluster has {describe(now)}" + (f" and may add {describe(grown)}" if grown else "")
    return Capacity((*now, *grown), where)


class _Lock:
    """Its name is the lock."""


@contextmanager
def cluster_lock(where: str, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold something for this job among all jobs of the cluster, and wait while another one does.

    Ray gives a name to one actor at a time, and frees it when the actor's job ends, however it ends.
    """
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # as long as this process lives
    name = f"{what} {hashlib.sha256(where.encode()).hexdigest()[:16]}"  # a URI may hold a secret
    asking = ray.remote(num_cpus=0, max_restarts=-1, label_selector=here)(_Lock).options(
        name=name, namespace=LOCK_NAMESPACE
    )
    held: Any = None
    waited = False
    while held is None:
        try:
            held = asking.remote()
        except ValueError:  # another job's has the name
            if not waited:
                say(f"{what}: another job of this cluster is making it; waiting for it")
            waited = True
            time.sleep(POLL_S)
    try:
        yield
    finally:
        ray.kill(held)


@contextmanager
def preserve_sigint() -> Iterator[None]:
    """Take Ctrl-C back afterwards: Ray Train and Ray Tune keep it for ever."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


ProgressEvent = tuple[Any, ...]  # what a Progress was called with


class _Relay:
    """A `Progress` that any process of the cluster may call."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        self.mailbox.put.remote(task, done, total, note)


class _ProgressQueue:
    """Keeps the newest word on each task, and every notice."""

    def __init__(self) -> None:
        self.news: dict[str, ProgressEvent] = {}
        self.notices: list[ProgressEvent] = []

    def put(self, *word: Any) -> None:
        if word[0] == NOTICE:
            self.notices.append(word)
        else:
            self.news[word[0]] = word

    def take(self) -> list[ProgressEvent]:
        words = [*self.notices, *self.news.values()]
        self.news, self.notices = {}, []
        return words


@contextmanager
def relay(show: Progress) -> Iterator[Progress]:
    """A picklable `Progress` whose words reach ``show`` in this process."""
    import ray

    # Here, for it must not go with another node.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    mailbox: Any = ray.remote(num_cpus=0, label_selector=here)(_ProgressQueue).remote()
    done = threading.Event()

    def pump() -> None:
        while True:
            last = done.wait(POLL_S)
            for word in ray.get(mailbox.take.remote()):
                show(*word)
            if last:
                return

    thread = threading.Thread(target=pump, daemon=True, name="progress")
    thread.start()
    try:
        yield _Relay(mailbox)
    finally:
        done.set()
        thread.join(timeout=5)
        ray.kill(mailbox)
