"""A training on a Ray cluster of its own that can be followed, held at a step and disturbed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from overproof import console, pipeline
from overproof.artifacts import Artifact, Store
from overproof.cluster.progress_relay import relay_progress
from overproof.config import Recipe, Train
from overproof.data.manifest import Manifest
from overproof.data.order import rows_hash
from overproof.models.pretrained import weights_sha256
from overproof.stage_context import Progress, ProgressEvent, StageContext, StepTrained, TrainingResumed
from overproof.train.checkpoint import CURVE_FILE

OBJECT_STORE_BYTES = 200 << 20
WAIT_S = 300.0
HELD_POLL_S = 0.01
NODE_END_S = 5.0
NO_LIMIT = sys.maxsize


@dataclass
class ProgressLog:
    """A progress that remembers events and when they came, for one who waits for them."""

    show: Progress
    events: list[tuple[float, ProgressEvent]] = field(default_factory=list)  # seconds of the monotonic clock
    finished: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, event: ProgressEvent) -> None:
        self.show(event)
        with self._changed:
            self.events.append((time.monotonic(), event))
            self._changed.notify_all()

    def finish(self) -> None:
        """The training is over; nobody waits any longer."""
        with self._changed:
            self.finished = True
            self._changed.notify_all()

    def wait_finished(self) -> None:
        """Until the training is over."""
        with self._changed:
            self._changed.wait_for(lambda: self.finished)

    def wait_step(
        self, since_s: float = 0.0, at_least: int = 0, workers: int | None = None, timeout_s: float = WAIT_S
    ) -> tuple[float, StepTrained] | None:
        """When the first such step was made, and the step; None when the time or the training is over without."""

        def find() -> tuple[float, StepTrained] | None:
            return next(
                (
                    (time_s, event)
                    for time_s, event in self.events
                    if time_s > since_s
                    and isinstance(event, StepTrained)
                    and event.done >= at_least
                    and workers in (None, event.workers)
                ),
                None,
            )

        with self._changed:
            self._changed.wait_for(lambda: self.finished or find() is not None, timeout_s)
            return find()

    def resumed_step(self, since_s: float, until_s: float) -> int:
        """The step that a training went on from between two times; of several restarts the last."""
        steps = [
            event.step
            for time_s, event in self.events
            if since_s < time_s <= until_s and isinstance(event, TrainingResumed)
        ]
        return steps[-1] if steps else 0


@dataclass(frozen=True)
class StepLimit:
    """The step at which a training waits, in a file that its workers read."""

    file: Path

    def set(self, step: int = NO_LIMIT) -> None:
        """Let the training make so many steps and then wait, so that it is not over before all has happened."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(str(step))
        fresh.replace(self.file)

    def reached(self, step: int) -> bool:
        return step >= int(self.file.read_text())


@dataclass(frozen=True)
class PausedProgress:
    """A progress that gives a training back only when it may make another step."""

    progress: Progress
    limit: StepLimit

    def __call__(self, event: ProgressEvent) -> None:
        self.progress(event)
        while isinstance(event, StepTrained) and self.limit.reached(event.done):
            time.sleep(HELD_POLL_S)


@dataclass(frozen=True)
class Disruption:
    """Something done to a training, and how it went on."""

    what: str
    at_step: int
    resumed_from: int
    seconds: float  # from the disruption to the next step
    workers: str = ""

    @property
    def lost(self) -> int:
        """Steps that were made again."""
        return max(0, self.at_step - self.resumed_from)


@dataclass(frozen=True)
class TrainingRecord:
    """What came of a training, in numbers that can be compared."""

    rows: list[dict[str, float]]
    weights_sha256: str

    @classmethod
    def read(cls, artifact: Artifact) -> TrainingRecord:
        """A train artifact's."""
        lines = (artifact.local(CURVE_FILE) / CURVE_FILE).read_text().splitlines()
        return cls([json.loads(line) for line in lines], weights_sha256(artifact.record.files, "model"))

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    def digest(self, name: str) -> str:
        """Sha256 over values as hex floats: equal only if every bit is."""
        text = "\n".join(float(value).hex() for value in self.values(name))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def rows_hash(self) -> int:
        """Hash of the multiset of rows that came, as the workers counted them."""
        from overproof.train.metrics import ROWS_HASH  # torch: seconds to import

        return int(sum(self.values(ROWS_HASH)))


@dataclass(frozen=True)
class RunningTraining:
    """What a fault script may do to a training: follow it, hold it, and harm its workers and nodes."""

    log: ProgressLog
    limit: StepLimit
    cluster: Any  # ray.cluster_utils.Cluster

    def recovery(self, what: str, at_step: int, began_s: float, workers: str = "") -> Disruption | None:
        """Wait for the next step after a disruption; None when there was none."""
        step = self.log.wait_step(began_s)
        if step is None:
            return None
        return Disruption(what, at_step, self.log.resumed_step(began_s, step[0]), step[0] - began_s, workers)


FaultScript = Callable[[RunningTraining], Iterator[Disruption]]  # runs beside a training and disturbs it


@dataclass(frozen=True)
class FaultTestbed:
    """Prepared data in a store that is deleted afterwards, and a Ray cluster to train on."""

    recipe: Recipe
    prepared: Artifact
    cluster: Any  # ray.cluster_utils.Cluster

    @classmethod
    @contextmanager
    def start(cls, recipe: Recipe, cpus: list[int]) -> Iterator[FaultTestbed]:
        """With a node for each number of logical CPUs."""
        with tempfile.TemporaryDirectory(prefix="overproof-proof-") as store, _start_cluster(cpus) as cluster:
            own = recipe.model_copy(update={"store": store})
            yield cls(own, pipeline.run(own, "prepare")["prepare"], cluster)

    def train(
        self, name: str, train: Train, script: FaultScript | None = None
    ) -> tuple[TrainingRecord, list[Disruption]]:
        """Train under a name of its own while the script disturbs it; gives the disruptions, too."""
        from overproof.train import ray_trainer

        draft = Store(self.recipe.store).new_writer(f"{self.recipe.name}-{name}", "train", "0" * 64, {}, {})
        own = self.recipe.model_copy(update={"train": train})
        disruptions: list[Disruption] = []
        began_s = time.monotonic()
        with console.progress_bars() as show:
            running = RunningTraining(
                ProgressLog(show), StepLimit(Path(self.recipe.store) / f"{name}.limit"), self.cluster
            )
            running.limit.set()

            def disturb() -> None:
                try:
                    disruptions.extend(script(running) if script else ())
                finally:
                    running.limit.set()

            thread = threading.Thread(target=disturb, daemon=True)
            with relay_progress(running.log) as progress:
                thread.start()
                try:
                    paused = PausedProgress(progress, running.limit)
                    metrics = ray_trainer.train_teacher(StageContext(own, {"prepare": self.prepared}, draft, paused))
                finally:
                    running.log.finish()
            thread.join()
        artifact = draft.commit(metrics, time.monotonic() - began_s)
        console.out.print(f"[green]✓[/] {name:<13} {artifact.record.seconds:6.1f} s")
        return TrainingRecord.read(artifact), disruptions

    @property
    def planned_rows_hash(self) -> int:
        """Hash of the rows that all steps should have."""
        order = Manifest.read(Path(self.prepared.uri)).order(self.recipe.seed)
        return rows_hash(order.rows_at(0, self.recipe.train.steps * self.recipe.train.batch_size))


@contextmanager
def _start_cluster(cpus: list[int]) -> Iterator[Any]:
    from overproof.cluster.ray_private import local_nodes

    with ExitStack() as started:
        with console.waiting(f"starting Ray: {len(cpus)} nodes"):
            cluster = started.enter_context(local_nodes(cpus, OBJECT_STORE_BYTES))
        yield cluster


@contextmanager
def extra_node(address: str, cpus: int) -> Iterator[None]:
    """One more node of the cluster there, from any thread; ``Cluster.add_node`` works in the main one alone."""
    ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}",
                 f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]  # fmt: skip
    node = subprocess.Popen(ray_start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        started = psutil.Process(node.pid)
        processes = [started, *started.children(recursive=True)]
        node.terminate()
        _, alive = psutil.wait_procs(processes, NODE_END_S)  # one whose actors still live may wait for ever
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()


def training_worker_pids() -> list[int]:
    """Process ids of the training workers that live."""
    from overproof.cluster.ray_private import living_actors
    from overproof.train.ray_train_private import WORKER_CLASS

    return [actor.pid for actor in living_actors(WORKER_CLASS)]
