"""A training on a Ray cluster of its own, for one who wants to see what becomes of it when harm is done."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overproof import console, pipeline
from overproof.artifacts import Artifact, Store
from overproof.cluster import ray_cluster
from overproof.config import Recipe, Train
from overproof.data.manifest import Manifest
from overproof.data.order import rows_hash
from overproof.stage_context import Progress, StageContext
from overproof.train.metrics_logger import CURVE_FILE, ROWS_HASH

OBJECT_STORE_BYTES = 200 << 20
WAIT_S = 300.0
HELD_S = 0.01


@dataclass(frozen=True)
class ProgressRecord:
    """What a training said."""

    time_s: float
    done: int
    note: str

    @property
    def step(self) -> bool:
        """Whether a step was made, and not something told about the run."""
        return self.note.startswith(("loss", "step left out"))


@dataclass
class ProgressLog:
    """A progress that remembers, for one who waits for something to happen and holds the training meanwhile."""

    show: Progress
    leash: Path
    words: list[ProgressRecord] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        self.words.append(ProgressRecord(time.monotonic(), done, note))
        self.show(task, done, total, note)

    def until(
        self, wanted: Callable[[ProgressRecord], bool], since_s: float = 0.0, wait_s: float = WAIT_S
    ) -> ProgressRecord | None:
        """The first word that is wanted; None when the time or the training is over without."""
        limit_s = time.monotonic() + wait_s
        while time.monotonic() < limit_s and not self.over.is_set():
            for word in self.words:
                if word.time_s > since_s and wanted(word):
                    return word
            time.sleep(0.05)
        return None

    def let(self, step: int = sys.maxsize) -> None:
        """Let the training make so many steps and then wait, so that it is not over before all has happened."""
        fresh = self.leash.with_suffix(".new")
        fresh.write_text(str(step))
        fresh.replace(self.leash)


@dataclass(frozen=True)
class PausedProgress:
    """A progress that gives a training back only when it may make another step."""

    progress: Progress
    leash: Path

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        self.progress(task, done, total, note)
        while ProgressRecord(0.0, done, note).step and done >= int(self.leash.read_text()):
            time.sleep(HELD_S)


@dataclass(frozen=True)
class Disruption:
    """Something done to a training, and how it went on."""

    what: str
    at_step: int
    went_on_from: int
    seconds: float  # from the deed to the next step
    workers: str = ""

    @property
    def lost(self) -> int:
        """Steps that were made again."""
        return max(0, self.at_step - self.went_on_from)


@dataclass(frozen=True)
class TrainingRecord:
    """What came of a training, in numbers that can be compared."""

    rows: list[dict[str, float]]
    weights: str  # sha256

    @classmethod
    def read(cls, artifact: Artifact) -> TrainingRecord:
        """A train artifact's."""
        lines = (artifact.local() / CURVE_FILE).read_text().splitlines()
        return cls([json.loads(line) for line in lines], artifact.record.files["model/model.safetensors"].sha256)

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    def digest(self, name: str) -> str:
        """Sha256 over values as hex floats: equal only if every bit is."""
        text = "\n".join(float(value).hex() for value in self.values(name))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def multiset(self) -> int:
        """Hash of all rows that came, as the workers counted them."""
        return int(sum(self.values(ROWS_HASH)))


FaultScript = Callable[
    [ProgressLog, Any], Iterator[Disruption]
]  # done to a training on a ``cluster_utils.Cluster`` while it runs


@dataclass(frozen=True)
class FaultTestbed:
    """Prepared data in a store that is deleted afterwards, and a Ray cluster to train on."""

    recipe: Recipe
    prepared: Artifact
    nodes: Any  # ray.cluster_utils.Cluster

    @classmethod
    @contextmanager
    def of(cls, recipe: Recipe, cpus: list[int]) -> Iterator[FaultTestbed]:
        """With a node for each number of logical CPUs."""
        with tempfile.TemporaryDirectory(prefix="overproof-proof-") as store, _nodes(cpus) as nodes:
            own = recipe.model_copy(update={"store": store})
            yield cls(own, pipeline.run(own, "prepare")["prepare"], nodes)

    def train(
        self, name: str, train: Train, harm: FaultScript | None = None
    ) -> tuple[TrainingRecord, list[Disruption]]:
        """Train under a name of its own, while harm is done to it; gives what was done, too."""
        from overproof.train import ray_trainer

        draft = Store(self.recipe.store).new_writer(f"{self.recipe.name}-{name}", "train", "0" * 64, {}, {})
        own = self.recipe.model_copy(update={"train": train})
        events: list[Disruption] = []
        began_s = time.monotonic()
        with console.progress_bars() as show:
            log = ProgressLog(show, Path(self.recipe.store) / "leash")
            log.let()

            def do() -> None:
                try:
                    events.extend(harm(log, self.nodes) if harm else ())
                finally:
                    log.let()

            doer = threading.Thread(target=do, daemon=True)
            with ray_cluster.relay(log) as progress:
                doer.start()
                try:
                    context = StageContext(own, {"prepare": self.prepared}, draft, PausedProgress(progress, log.leash))
                    metrics = ray_trainer.train_teacher(context)
                finally:
                    log.over.set()
            doer.join()
        artifact = draft.commit(metrics, time.monotonic() - began_s)
        console.out.print(f"[green]✓[/] {name:<13} {artifact.record.seconds:6.1f} s")
        return TrainingRecord.read(artifact), events

    @property
    def planned(self) -> int:
        """Hash of the rows that all steps should have."""
        order = Manifest.read(Path(self.prepared.uri)).order(self.recipe.seed)
        return rows_hash(order.rows_at(0, self.recipe.train.steps * self.recipe.train.batch_size))


def await_recovery(log: ProgressLog, what: str, at_step: int, began_s: float, workers: str = "") -> Disruption | None:
    """Wait for the next step after a deed."""
    word = log.until(lambda word: word.step, began_s)
    return Disruption(what, at_step, resumed_from(log, began_s) or 0, word.time_s - began_s, workers) if word else None


def resumed_from(log: ProgressLog, since_s: float) -> int | None:
    """The step from which a training said that it goes on."""
    for word in log.words:
        found = re.search(r"going on from step (\d+)", word.note)
        if found and word.time_s > since_s:
            return int(found.group(1))
    return None


@contextmanager
def _nodes(cpus: list[int]) -> Iterator[Any]:
    """A Ray cluster of that many nodes on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    with console.waiting(f"starting Ray: {len(cpus)} nodes"):
        head = {"num_cpus": cpus[0], "object_store_memory": OBJECT_STORE_BYTES}
        nodes = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
        for count in cpus[1:]:
            nodes.add_node(num_cpus=count, object_store_memory=OBJECT_STORE_BYTES)
        os.environ["RAY_ADDRESS"] = nodes.address  # so that nothing looks at this machine for room
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield nodes
    finally:
        del os.environ["RAY_ADDRESS"]
        ray.shutdown()
        nodes.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def extra_node(nodes: Any, cpus: int) -> Iterator[None]:
    """One more node, from any thread; ``Cluster.add_node`` works in the main one alone."""
    ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={nodes.address}",
                 f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]  # fmt: skip
    node = subprocess.Popen(ray_start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        node.terminate()
        node.wait()


def training_worker_pids() -> list[int]:
    """Process ids of the training workers that live."""
    from ray._private.state import actors

    living = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
    return [int(actor["Pid"]) for actor in living if actor["ActorClassName"] == "RayTrainWorker"]
