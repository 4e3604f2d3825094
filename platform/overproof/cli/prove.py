"""Proofs that anyone can replay: a training that is killed, or moved about, against the same one left alone.

Both run on a Ray cluster of several nodes that is started here for them, in a store that is deleted afterwards.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from overproof import console
from overproof.cli.fault_injection import (
    Disruption,
    FaultTestbed,
    ProgressLog,
    TrainingRecord,
    await_recovery,
    extra_node,
    resumed_from,
    training_worker_pids,
)
from overproof.config import Recipe
from overproof.errors import InputError

ROOMY_CPUS = 8  # logical, of one node
NARROW_CPUS, NARROW_WORKER_CPUS = 3, 1.9  # one worker a node, and a CPU for the readers even on one node
GROWING_S = 120.0  # over which the steps that are left are spread while a node joins
TOLERANCE = 1e-5


def prove_resume(recipe: Recipe, kills: int, seed: int) -> int:
    """Train, then train again and kill a worker at random steps; print both beside each other.

    Returns 0 if losses, gradient norms, rows and weights are the same to the last bit, else 1.
    """
    dice = random.Random(seed)
    steps = sorted(dice.sample(range(2, max(recipe.train.steps, kills + 3)), kills))

    def harm(log: ProgressLog, _: Any) -> Iterator[Disruption]:
        since_s = 0.0
        for step in steps:
            log.let(step)
            word = log.until(lambda word, step=step: word.step and word.done >= step, since_s)  # type: ignore[misc]
            if word is None:
                return
            victim = dice.choice(training_worker_pids())
            began_s = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            if event := await_recovery(log, f"kill -9 of worker {victim}", word.done, began_s):
                yield event
            since_s = began_s

    with FaultTestbed.of(recipe, [ROOMY_CPUS]) as ground:
        whole, _ = ground.train("uninterrupted", recipe.train)
        killed, events = ground.train("killed", recipe.train, harm)
        planned = ground.planned
    _print_events(events)
    pairs = [
        ("steps", len(whole.values("loss")), len(killed.values("loss"))),
        ("last loss", whole.values("loss")[-1].hex(), killed.values("loss")[-1].hex()),
        *(
            (f"sha256 of {label}", whole.digest(name)[:16], killed.digest(name)[:16])
            for label, name in {
                "losses": "loss",
                "gradient norms": "grad_norm",
                "validation losses": "validation_loss",
            }.items()
        ),
        *_rows(planned, whole, killed),
        ("sha256 of the weights", whole.weights[:16], killed.weights[:16]),
    ]
    proven = all(a == b for _, a, b in pairs) and killed.multiset == planned and len(events) == kills
    _print_pairs("resumed", pairs)
    return _verdict(proven, f"{len(events)} kills, and nothing differs", f"{len(events)} of {kills} kills")


def prove_elastic(recipe: Recipe, seed: int) -> int:
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

    def harm(log: ProgressLog, nodes: Any) -> Iterator[Disruption]:
        log.let(first)
        word = log.until(lambda word: word.step and word.done >= first)
        if word is None:
            return
        began_s = time.monotonic()
        nodes.remove_node(dice.choice(nodes.list_all_nodes()[1:]), allow_graceful=False)
        event = await_recovery(log, "a node died", word.done, began_s, f"{most} to {most - 1}")
        if event is None:
            return
        yield event
        began_s = time.monotonic()
        pace_s = GROWING_S / (train.steps - word.done)
        with extra_node(nodes, NARROW_CPUS):
            for step in range(word.done, train.steps):
                log.let(step)
                if grown := log.until(lambda word: word.note.endswith(f"{most} workers"), began_s, pace_s):
                    found = resumed_from(log, began_s) or 0
                    yield Disruption("a node joined", found, found, grown.time_s - began_s, f"{most - 1} to {most}")
                    break
            log.let()
            log.over.wait()

    with FaultTestbed.of(recipe, [NARROW_CPUS] * most) as ground:
        whole, _ = ground.train("fixed", train.model_copy(update={"workers": most}))
        moved, events = ground.train("moved", train, harm)
        planned = ground.planned
    _print_events(events)
    gaps = {name: _gap(whole, moved, name) for name in ("loss", "validation_loss")}
    pairs: list[tuple[str, Any, Any]] = [
        ("steps", len(whole.values("loss")), len(moved.values("loss"))),
        ("last loss", f"{whole.values('loss')[-1]:.8f}", f"{moved.values('loss')[-1]:.8f}"),
        *((f"largest difference of {name}", "", f"{gap:.1e}") for name, gap in gaps.items()),
        *_rows(planned, whole, moved),
    ]
    _print_pairs("moved", pairs)
    proven = max(gaps.values()) <= TOLERANCE and whole.multiset == moved.multiset == planned and len(events) == 2
    instead = f"{len(events)} of 2 events; a loss differs by {max(gaps.values()):.1e}, expected {TOLERANCE:g} at most"
    if max(gaps.values()) > TOLERANCE:
        instead += (
            ". Other numbers of workers add gradients up in another order, and a high learning_rate or many steps make "
            "much of the last bits: try fewer steps, or a lower rate"
        )
    return _verdict(proven, f"losses within {TOLERANCE:g}, every row as planned", instead)


def _gap(one: TrainingRecord, other: TrainingRecord, name: str) -> float:
    pairs = zip(one.values(name), other.values(name), strict=True)
    return max(abs(a - b) for a, b in pairs)


def _rows(planned: int, one: TrainingRecord, other: TrainingRecord) -> list[tuple[str, str, str]]:
    """What came, and whether it is what was planned."""
    said = {True: "yes", False: "no"}
    return [
        ("rows, as a multiset", f"{one.multiset:x}", f"{other.multiset:x}"),
        ("rows, as planned", said[one.multiset == planned], said[other.multiset == planned]),
    ]


def _print_events(events: list[Disruption]) -> None:
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
