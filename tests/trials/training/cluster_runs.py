"""Trains on a Ray cluster of its own, three nodes, and takes workers, nodes and drivers away from it.

python cluster_runs.py FOLDER            every run; leaves results.json in FOLDER. Run by test_nodes_and_drivers.py.
python cluster_runs.py FOLDER ADDRESS    one driver of the run that is killed, against that cluster
python cluster_runs.py FOLDER cases      leaves cases.json in FOLDER: the same trainings for resume_ranks.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from tiny_data import LLAMA, settings, text_like

from overproof.artifacts import ArtifactWriter, Store
from overproof.config import load_recipe as read_recipe
from overproof.stage_context import ProgressEvent, StageContext, StepTrained, TrainingResumed
from overproof.train.ray_trainer import train_teacher

DIGITS = Path(__file__).parents[3] / "jobs" / "recipes" / "digits.yaml"
SEED = 3
STEP_S = 0.2  # so that there is time to meddle
WAIT_S = 150.0
NODE = {"num_cpus": 4, "object_store_memory": 150 << 20}
COMMON: dict[str, Any] = {
    "model": LLAMA.model_dump(),
    "batch_size": 12,
    "validate_every": 10,
    "checkpoint": {"every_steps": 10},
    "cpus_per_worker": 3,  # one worker a node
}
RUNS: dict[str, dict[str, Any]] = {
    "killed": {"workers": 2, "steps": 40, "zero_stage": 2},
    "moved": {"workers": (1, 3), "steps": 150, "zero_stage": 3},
}


@dataclass(frozen=True)
class Pace:
    """A progress that writes down events, from which process and when, and makes steps slow."""

    file: str

    def __call__(self, event: ProgressEvent) -> None:
        entry = {"time": time.time(), "pid": os.getpid(), "kind": type(event).__name__, **dataclasses.asdict(event)}
        with open(self.file, "a") as file:  # noqa: PTH123  # seen by processes that pickle it by value
            file.write(json.dumps(entry) + "\n")
        if isinstance(event, StepTrained) and not os.path.exists(f"{self.file}.hurry"):  # noqa: PTH110
            time.sleep(STEP_S)


@dataclass(frozen=True)
class Run:
    """One training of the tiny text, and the events that it told."""

    folder: Path
    name: str

    @property
    def events(self) -> Path:
        return self.folder / f"{self.name}.events"

    def context(self) -> StageContext:
        """As the pipeline makes it: prepared data, a fresh draft."""
        store = Store(str(self.folder / "store"))
        prepared = store.lookup("text", "prepare", "a" * 64)
        assert prepared
        recipe = read_recipe(DIGITS).model_copy(
            update={"train": settings(**COMMON, **RUNS[self.name]), "seed": SEED, "name": self.name}
        )
        return StageContext(recipe, {"prepare": prepared}, self.draft(store), Pace(str(self.events)))

    def draft(self, store: Store) -> ArtifactWriter:
        return store.new_writer(self.name, "train", "b" * 64, {}, {})

    def entries(self) -> list[dict[str, Any]]:
        if not self.events.exists():
            return []
        return [json.loads(line) for line in self.events.read_text().splitlines() if line.endswith("}")]

    def hurry(self) -> None:
        """Nothing is left to happen to it."""
        Path(f"{self.events}.hurry").touch()

    def until(self, wanted: Callable[[dict[str, Any]], bool], since: float = 0.0) -> dict[str, Any]:
        """The first event that is wanted."""
        limit = time.monotonic() + WAIT_S
        while time.monotonic() < limit:
            for entry in self.entries():
                if entry["time"] > since and wanted(entry):
                    return entry
            time.sleep(0.1)
        raise TimeoutError(f"{self.name}: {self.entries()[-5:]}")

    def step(self, at_least: int, workers: int, since: float = 0.0) -> dict[str, Any]:
        """The first step from there on that so many workers have made."""

        def wanted(entry: dict[str, Any]) -> bool:
            return is_step(entry) and entry["done"] >= at_least and entry["workers"] == workers

        return self.until(wanted, since)


def is_step(entry: dict[str, Any]) -> bool:
    return bool(entry["kind"] == StepTrained.__name__)


def alive(kind: str) -> list[dict[str, Any]]:
    """Actors of that class which live."""
    return [a for a in actors().values() if a["ActorClassName"] == kind and a["State"] == "ALIVE"]


def workers() -> list[tuple[int, str]]:
    """Process and node of every training worker that lives."""
    return [(actor["Pid"], actor["Address"]["NodeID"]) for actor in alive("RayTrainWorker")]


def drain(cluster: Cluster, node: str, seconds: float) -> None:
    """What a cloud does to a spot node before it takes it."""
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(
        node, reason, "", int((time.time() + seconds) * 1000)
    )
    assert accepted, why


def killed(folder: Path, address: str) -> dict[str, Any]:
    """A worker is killed, then the controller, then the driver; the command is run again after both."""
    run = Run(folder, "killed")

    errors = folder / "errors"

    def drive() -> subprocess.Popen[bytes]:
        with errors.open("ab") as log:
            return subprocess.Popen([sys.executable, __file__, str(folder), address], stderr=log)

    driver = drive()
    first = run.step(14, workers=2)
    victim = next(pid for pid, _ in workers() if pid != first["pid"])
    os.kill(victim, signal.SIGKILL)
    t_worker = time.time()
    again = run.step(11, workers=2, since=t_worker + 2 * STEP_S)
    at_controller = run.step(24, workers=2, since=t_worker)
    os.kill(next(actor["Pid"] for actor in alive("TrainController")), signal.SIGKILL)
    t_controller = time.time()
    ended = driver.wait(WAIT_S)
    driver = drive()
    third = run.step(1, workers=2, since=t_controller + 2 * STEP_S)
    at_driver = run.step(34, workers=2, since=t_controller)
    left = [pid for pid, _ in workers()]
    driver.kill()
    driver.wait()
    t_driver = time.time()
    driver = drive()
    fourth = run.step(1, workers=2, since=t_driver + 2 * STEP_S)
    gone = not any(psutil.pid_exists(pid) for pid in left)
    run.hurry()
    assert driver.wait(WAIT_S) == 0
    return {
        "steps": {
            "worker": [first["done"], again["done"]],
            "controller": [at_controller["done"], third["done"]],
            "driver": [at_driver["done"], fourth["done"]],
        },
        "ended_with_the_controller": ended,
        "errors": errors.read_text(),
        "workers_of_dead_driver_gone": gone,
    }


def moved(folder: Path, cluster: Cluster, nodes: list[Any]) -> dict[str, Any]:
    """A node is killed, a node joins, a node is drained."""
    run = Run(folder, "moved")
    failed: list[BaseException] = []

    def drive() -> None:
        try:
            train_teacher(run.context())
        except BaseException as error:
            failed.append(error)
            raise

    thread = threading.Thread(target=drive)
    thread.start()
    seconds, steps = {}, {}

    before = run.step(14, workers=3)
    t_kill = time.time()
    cluster.remove_node(nodes[0], allow_graceful=False)
    after = run.step(1, workers=2, since=t_kill)
    seconds["node"], steps["node"] = after["time"] - t_kill, [before["done"], after["done"]]

    t_join = time.time()
    cluster.add_node(**NODE)
    after = run.step(1, workers=3, since=t_join)
    last = [entry for entry in run.entries() if t_join < entry["time"] < after["time"] and is_step(entry)]
    seconds["join"], steps["join"] = after["time"] - last[-1]["time"], [last[-1]["done"], after["done"]]

    run.step(after["done"] + 3, workers=3, since=t_join)
    head = ray.get_runtime_context().get_node_id()
    node = next(node for _, node in workers() if node != head)
    t_drain = time.time()
    drain(cluster, node, 600)
    after = run.step(1, workers=2, since=t_drain)
    last = [entry for entry in run.entries() if t_drain < entry["time"] < after["time"] and is_step(entry)]
    seconds["drain"], steps["drain"] = after["time"] - t_drain, [last[-1]["done"], after["done"]]
    seconds["drain notice"] = last[-1]["time"] - t_drain
    on = [where for _, where in workers()]
    run.hurry()
    thread.join(WAIT_S)
    assert not failed
    return {"seconds": seconds, "steps": steps, "drained_is_left": node not in on}


def curve(folder: Path, name: str) -> list[dict[str, float]]:
    text = next((folder / "store" / name).glob("train-*/curve.jsonl")).read_text()
    return [json.loads(line) for line in text.splitlines()]


def main(folder: Path) -> None:
    store = Store(str(folder / "store"))
    draft = store.new_writer("text", "prepare", "a" * 64, {}, {})
    with draft.directory() as data:
        text_like(data)
    draft.commit({}, 0.0)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(**NODE) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)
        results = {"killed": killed(folder, cluster.address), "moved": moved(folder, cluster, nodes)}
    finally:
        ray.shutdown()
        cluster.shutdown()
    for name, result in results.items():
        result["rows"] = curve(folder, name)
        result["resumed"] = [
            entry for entry in Run(folder, name).entries() if entry["kind"] == TrainingResumed.__name__
        ]
    (folder / "results.json").write_text(json.dumps(results))


def drive(folder: Path, address: str) -> None:
    ray.init(address=address, log_to_driver=False)
    train_teacher(Run(folder, "killed").context())


if __name__ == "__main__":
    if sys.argv[2:] == ["cases"]:
        trainings = [
            {"name": name, "data": "text", "attempts": [{"world": 2}], "train": {**COMMON, **run}}
            for name, run in RUNS.items()
        ]
        (Path(sys.argv[1]) / "cases.json").write_text(json.dumps(trainings))
    elif len(sys.argv) == 3:
        drive(Path(sys.argv[1]), sys.argv[2])
    else:
        main(Path(sys.argv[1]))
