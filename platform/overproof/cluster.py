"""The Ray cluster a run uses: find or start it, ask whether it can ever give what a recipe needs, relay progress."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overproof.errors import InputError
from overproof.progress import Progress
from overproof.recipe import Recipe

LOCAL_MIN_CPUS = 4  # logical: workers and readers share the cores of a small machine
OBJECT_STORE_BYTES = 1 << 30
POLL_S = 0.2


@dataclass(frozen=True)
class Need:
    """What one stage asks for at the same time: equal bundles that each fit one node, and loose CPUs beside them."""

    stage: str
    bundles: int
    cpus: float
    gpus: float = 0
    loose_cpus: float = 0
    why: str = ""

    @property
    def total_cpus(self) -> float:
        return self.bundles * self.cpus + self.loose_cpus

    @property
    def total_gpus(self) -> float:
        return self.bundles * self.gpus


def needs(recipe: Recipe) -> tuple[Need, ...]:
    """What each stage cannot start without."""
    train, cache, sweep, serve = recipe.train, recipe.cache, recipe.sweep, recipe.serve
    return (
        Need("prepare", 1, 1, why="1 reader"),
        Need(
            "train",
            train.fewest,
            train.cpus_per_worker,
            train.gpus_per_worker,
            1,
            f"{train.fewest} workers + 1 reader",
        ),
        Need("cache", cache.actors, cache.cpus_per_actor, cache.gpus_per_actor, 1, f"{cache.actors} actors + 1 reader"),
        Need("sweep", 1, sweep.cpus_per_trial, sweep.gpus_per_trial, 0, "1 trial at least"),
        Need("evaluate", 1, 1, why="1 task at least"),
        Need("serve", serve.min_replicas, serve.cpus_per_replica, why=f"{serve.min_replicas} replica at least"),
    )


@dataclass(frozen=True)
class Capacity:
    """The most a cluster can ever give, grown to its limits."""

    cpus: float
    gpus: float
    where: str


def local_capacity() -> Capacity:
    """What a cluster started on this machine would have: at least four logical CPUs."""
    cpus = max(os.cpu_count() or 1, LOCAL_MIN_CPUS)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return Capacity(cpus, gpus, f"a local cluster here has {cpus} logical CPUs and {gpus} GPUs")


def check(recipe: Recipe, capacity: Capacity) -> None:
    """Refuse a recipe that would wait for ever.

    Raises:
        InputError: a stage needs more than the cluster can ever give, with the sum.
    """
    for need in needs(recipe):
        for unit, wanted, given in (("CPUs", need.total_cpus, capacity.cpus), ("GPUs", need.total_gpus, capacity.gpus)):
            if wanted > given:
                each = need.cpus if unit == "CPUs" else need.gpus
                loose = f" + {need.loose_cpus:g}" if unit == "CPUs" and need.loose_cpus else ""
                raise InputError(
                    f"{need.stage}: {need.why} need {need.bundles} x {each:g}{loose} = {wanted:g} {unit} at the same "
                    f"time; {capacity.where}; it could never start. Ask for less, or give the cluster more"
                )


def elsewhere() -> bool:
    """Whether this process is told to use a running cluster (`ray job submit`, or RAY_ADDRESS)."""
    return bool(os.environ.get("RAY_ADDRESS"))


def connect() -> Capacity:
    """Attach to the cluster this process is told to use, else start one here that ends with this process.

    Raises:
        InputError: RAY_ADDRESS names a cluster that does not answer.
    """
    import ray

    if not ray.is_initialized() and elsewhere():
        try:
            ray.init(runtime_env={"py_modules": [str(Path(__file__).parent)]}, log_to_driver=False)
        except (ConnectionError, RuntimeError) as error:
            raise InputError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: {error}") from None
    elif not ray.is_initialized():
        # On one machine the token that Ray makes for itself is no news to a user.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        ray.init(
            address="local",  # not whatever else runs on this machine
            num_cpus=int(local_capacity().cpus),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=True,
            dashboard_port=0,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    return _attached_capacity()


def _attached_capacity() -> Capacity:
    import ray
    from ray._private.state import state

    now = ray.cluster_resources()  # type: ignore[no-untyped-call]
    grown = state.get_max_resources_from_cluster_config() or {}
    cpus, gpus = (max(now.get(unit, 0), grown.get(unit, 0)) for unit in ("CPU", "GPU"))
    return Capacity(
        cpus,
        gpus,
        f"this cluster has {now.get('CPU', 0):g} CPUs and {now.get('GPU', 0):g} GPUs"
        + (f" and may grow to {cpus:g} and {gpus:g}" if grown else ""),
    )


@contextmanager
def own_interrupt() -> Iterator[None]:
    """Take Ctrl-C back afterwards: Ray Train and Ray Tune keep it for ever."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


class _Relay:
    """A `Progress` that any process of the cluster may call."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        self.mailbox.put.remote(task, done, total, note)


class _Mailbox:
    """Keeps the newest word on each task."""

    def __init__(self) -> None:
        self.news: dict[str, tuple[int, int, str]] = {}

    def put(self, task: str, done: int, total: int, note: str) -> None:
        self.news[task] = (done, total, note)

    def take(self) -> dict[str, tuple[int, int, str]]:
        news, self.news = self.news, {}
        return news


@contextmanager
def relay(show: Progress) -> Iterator[Progress]:
    """A picklable `Progress` whose words reach ``show`` in this process."""
    import ray

    mailbox: Any = ray.remote(num_cpus=0)(_Mailbox).remote()
    done = threading.Event()

    def pump() -> None:
        while True:
            last = done.wait(POLL_S)
            for task, (count, total, note) in ray.get(mailbox.take.remote()).items():
                show(task, count, total, note)
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
