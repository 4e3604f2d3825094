"""Proofs that anyone can replay: a training that is killed, or moved about, against the same one left alone.

Both run on a Ray cluster of several nodes that is started here for them, in a store that is deleted afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import signal
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

from rich.table import Table

from overproof import cluster, console, pipeline
from overproof.artifact import Artifact, Store
from overproof.data.manifest import Manifest
from overproof.data.plan import Order, rows_hash
from overproof.errors import InputError
from overproof.progress import Progress
from overproof.recipe import Recipe
from overproof.stage import Context

OBJECT_STORE_BYTES = 200 << 20
ROOMY_CPUS = 8  # logical, of one node
NARROW_CPUS, NARROW_WORKER_CPUS = 3, 1.9  # one worker a node, and a CPU for the readers even on one node
STALE_S = 0.7  # words of the dead may still arrive
WAIT_S = 300.0
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Word:
    """What a training said."""

    time_s: float
    done: int
    note: str

    @property
    def step(self) -> bool:
        """Whether a step was made, and not something told about the run."""
        return self.note.startswith(("loss", "step left out"))


@dataclass
class Log:
    """A progress that remembers, for one who waits for something to happen."""

    show: Progress
    words: list[Word] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        self.words.append(Word(time.monotonic(), done, note))
        self.show(task, done, total, note)

    def until(self, wanted: Callable[[Word], bool], since_s: float = 0.0) -> Word | None:
        """The first word that is wanted; None when the training is over without."""
        limit_s = time.monotonic() + WAIT_S
        while time.monotonic() < limit_s and not self.over.is_set():
            for word in self.words:
                if word.time_s > since_s and wanted(word):
                    return word
            time.sleep(0.05)
        return None


@dataclass(frozen=True)
class Event:
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
class Trained:
    """What came of a training, in numbers that can be compared."""

    rows: list[dict[str, float]]
    weights: str  # sha256

    @classmethod
    def read(cls, artifact: Artifact) -> Trained:
        """A train artifact's."""
        lines = (artifact.local() / "curve.jsonl").read_text().splitlines()
        return cls([json.loads(line) for line in lines], artifact.record.files["model/model.safetensors"].sha256)

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    def digest(self, *names: str) -> str:
        """Sha256 over values as hex floats: equal only if every bit is."""
        text = "\n".join(value.hex() for name in names for value in map(float, self.values(name)))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def multiset(self) -> int:
        """Hash of all rows that came, as the workers counted them."""
        return int(sum(self.values("rows_hash")))


def resume(recipe: Recipe, kills: int, seed: int) -> int:
    """Train, then train again and kill a worker at random steps; print both beside each other.

    Returns 0 if losses, gradient norms, rows and weights are the same to the last bit, else 1.
    """
    dice = random.Random(seed)
    steps = sorted(dice.sample(range(2, max(recipe.train.steps, kills + 3)), kills))

    def harm(log: Log, _: Any) -> Iterator[Event]:
        since_s = 0.0
        for step in steps:
            word = log.until(lambda word, step=step: word.step and word.done >= step, since_s)  # type: ignore[misc]
            if word is None:
                return
            victim = dice.choice(_workers())
            began_s = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            if event := _went_on(log, f"kill -9 of worker {victim}", word.done, began_s):
                yield event
            since_s = time.monotonic()

    with _store(recipe) as own, _nodes([ROOMY_CPUS]) as nodes:
        whole = _train(own, "uninterrupted", nodes, None)
        killed, events = _train(own, "killed", nodes, harm)
        planned = _planned(own)
    _print_events(events)
    same = [
        ("steps", len(whole[0].values("loss")), len(killed.values("loss"))),
        ("last loss", whole[0].values("loss")[-1].hex(), killed.values("loss")[-1].hex()),
        *(
            (f"sha256 of {label}", whole[0].digest(*names)[:16], killed.digest(*names)[:16])
            for label, names in {
                "losses": ("loss",),
                "gradient norms": ("grad_norm",),
                "validation losses": ("validation_loss",),
            }.items()
        ),
        ("rows, as a multiset", f"{whole[0].multiset:x}", f"{killed.multiset:x}"),
        ("rows, as planned", f"{planned:x}", f"{planned:x}"),
        ("sha256 of the weights", whole[0].weights[:16], killed.weights[:16]),
    ]
    proven = all(a == b for _, a, b in same) and killed.multiset == planned and len(events) == kills
    _print_pairs("resumed", same)
    return _verdict(proven, f"{len(events)} kills, and nothing differs", f"{len(events)} of {kills} kills")


def elastic(recipe: Recipe, seed: int) -> int:
    """Train on a fixed number of workers, then on nodes that die and join; print both beside each other.

    Returns 0 if every loss is within 1e-5 and the rows are the same, else 1.

    Raises:
        InputError: the batch divides by neither 3 nor 2.
    """
    batch = recipe.train.batch_size
    most = next((world for world in (3, 2) if batch % world == 0), None)
    if most is None:
        raise InputError(f"train.batch_size {batch}: divides by neither 3 nor 2; expected one that does: --set it")
    dice = random.Random(seed)
    changed = {"workers": (1, most), "cpus_per_worker": NARROW_WORKER_CPUS}
    train = recipe.train.model_copy(update=changed)
    first = dice.randint(2, max(2, train.steps // 4))

    def harm(log: Log, nodes: Any) -> Iterator[Event]:
        word = log.until(lambda word: word.step and word.done >= first)
        if word is None:
            return
        began_s = time.monotonic()
        nodes.remove_node(dice.choice(nodes.list_all_nodes()[1:]), allow_graceful=False)
        event = _went_on(log, "a node died", word.done, began_s, f"{most} to {most - 1}")
        if event is None:
            return
        yield event
        began_s = time.monotonic()
        with _joined(nodes):
            grown = log.until(lambda word: word.step and word.note.endswith(f"{most} workers"), began_s)
            told = _told(log, began_s)
            if grown and told:
                yield Event("a node joined", told, told, grown.time_s - began_s, f"{most - 1} to {most}")
            log.over.wait()

    fixed = recipe.model_copy(update={"train": train.model_copy(update={"workers": most})})
    with _store(fixed) as own, _nodes([NARROW_CPUS] * most) as nodes:
        whole = _train(own, "fixed", nodes, None)
        moved, events = _train(own.model_copy(update={"train": train}), "moved", nodes, harm)
        planned = _planned(own)
    _print_events(events)
    gaps = {name: _gap(whole[0], moved, name) for name in ("loss", "validation_loss")}
    pairs: list[tuple[str, Any, Any]] = [
        ("steps", len(whole[0].values("loss")), len(moved.values("loss"))),
        ("last loss", f"{whole[0].values('loss')[-1]:.8f}", f"{moved.values('loss')[-1]:.8f}"),
        *((f"largest difference of {name}", "", f"{gap:.1e}") for name, gap in gaps.items()),
        ("rows, as a multiset", f"{whole[0].multiset:x}", f"{moved.multiset:x}"),
        ("rows, as planned", f"{planned:x}", f"{planned:x}"),
    ]
    _print_pairs("moved", pairs)
    proven = max(gaps.values()) <= TOLERANCE and whole[0].multiset == moved.multiset == planned and len(events) == 2
    instead = f"{len(events)} of 2 events; a loss differs by {max(gaps.values()):.1e}, expected {TOLERANCE:g} at most"
    if max(gaps.values()) > TOLERANCE:
        instead += (
            ". Other numbers of workers add gradients up in another order, and a high learning_rate or many steps make "
            "much of the last bits: try fewer steps, or a lower rate"
        )
    return _verdict(proven, f"losses within {TOLERANCE:g}, every row as planned", instead)


def _gap(one: Trained, other: Trained, name: str) -> float:
    pairs = zip(one.values(name), other.values(name), strict=True)
    return max(abs(a - b) for a, b in pairs)


def _went_on(log: Log, what: str, at_step: int, began_s: float, workers: str = "") -> Event | None:
    """Wait for the next step after a deed."""
    word = log.until(lambda word: word.step, began_s + STALE_S)
    told = _told(log, began_s)
    return Event(what, at_step, told or 0, word.time_s - began_s, workers) if word else None


def _told(log: Log, since_s: float) -> int | None:
    """The step from which a training said that it goes on."""
    for word in log.words:
        found = re.search(r"going on from step (\d+)", word.note)
        if found and word.time_s > since_s:
            return int(found.group(1))
    return None


@contextmanager
def _store(recipe: Recipe) -> Iterator[Recipe]:
    with tempfile.TemporaryDirectory(prefix="overproof-proof-") as store:
        yield recipe.model_copy(update={"store": store})


@contextmanager
def _nodes(cpus: list[int]) -> Iterator[Any]:
    """A Ray cluster of that many nodes on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    with console.waiting(f"starting Ray: {len(cpus)} nodes"):
        head = {"num_cpus": cpus[0], "object_store_memory": OBJECT_STORE_BYTES}
        nodes = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": True, "dashboard_port": 0})
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
def _joined(nodes: Any) -> Iterator[None]:
    """One more node, from any thread; ``Cluster.add_node`` works in the main one alone."""
    ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={nodes.address}",
                 f"--num-cpus={NARROW_CPUS}", f"--object-store-memory={OBJECT_STORE_BYTES}"]  # fmt: skip
    node = subprocess.Popen(ray_start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        node.terminate()
        node.wait()


def _train(
    recipe: Recipe, name: str, nodes: Any, harm: Callable[[Log, Any], Iterator[Event]] | None
) -> tuple[Trained, list[Event]]:
    """Train under a name of its own, while ``harm`` is done to it."""
    from overproof.train.launch import train

    prepared = pipeline.run(recipe, "prepare")["prepare"]
    draft = Store(recipe.store).begin(f"{recipe.name}-{name}", "train", "0" * 64, {}, {})
    events: list[Event] = []
    began_s = time.monotonic()
    with console.bars() as show:
        log = Log(show)
        doer = threading.Thread(target=lambda: events.extend(harm(log, nodes) if harm else ()), daemon=True)
        with cluster.relay(log) as progress:
            doer.start()
            try:
                metrics = train(Context(recipe, {"prepare": prepared}, draft, progress))
            finally:
                log.over.set()
        doer.join()
    artifact = draft.commit(metrics, time.monotonic() - began_s)
    console.out.print(f"[green]✓[/] {name:<13} {artifact.record.seconds:6.1f} s")
    return Trained.read(artifact), events


def _workers() -> list[int]:
    """Process ids of the training workers that live."""
    from ray._private.state import actors

    living = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
    return [int(actor["Pid"]) for actor in living if actor["ActorClassName"] == "RayTrainWorker"]


def _planned(recipe: Recipe) -> int:
    """The hash of the rows that all steps should have had."""
    prepared = pipeline.run(recipe, "prepare")["prepare"]
    manifest = Manifest.read(Path(prepared.uri))
    order = Order(manifest.groups, manifest.rows_per_group, recipe.seed)
    return rows_hash(order.rows_at(0, recipe.train.steps * recipe.train.batch_size))


def _print_events(events: list[Event]) -> None:
    table = Table(
        "what", "at step", "went on from", "steps lost", "s to the next step", "workers", box=None, pad_edge=False
    )
    for event in events:
        table.add_row(event.what, str(event.at_step), str(event.went_on_from), str(event.lost), f"{event.seconds:.1f}",
                      event.workers)  # fmt: skip
    console.out.print(table)


def _print_pairs(name: str, pairs: list[tuple[str, Any, Any]]) -> None:
    table = Table("", "uninterrupted", name, "", box=None, pad_edge=False)
    for what, one, other in pairs:
        table.add_row(what, str(one), str(other), "[green]same[/]" if one == other else "")
    console.out.print(table)


def _verdict(proven: bool, why: str, instead: str) -> int:
    console.out.print(f"[green]proven[/]: {why}" if proven else f"[red]not proven[/]: {instead}")
    return 0 if proven else 1
