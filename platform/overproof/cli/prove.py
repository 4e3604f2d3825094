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
    RunningTraining,
    TrainingRecord,
    extra_node,
    training_worker_pids,
)
from overproof.config import Recipe
from overproof.errors import InputError

LARGE_NODE_CPUS = 8  # logical
SMALL_NODE_CPUS, WORKER_CPUS = 3, 1.9  # one worker a node, and a CPU for the readers even on one node
GROW_TIMEOUT_S = 120.0  # over which the steps that are left are spread while a node joins
TOLERANCE = 1e-5


def prove_resume(recipe: Recipe, kills: int, seed: int) -> int:
    """Train, then train again and kill a worker at random steps; print both beside each other.

    Returns 0 if losses, gradient norms, rows and weights are the same to the last bit, else 1.
    """
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(2, max(recipe.train.steps, kills + 3)), kills))

    def kill_workers(training: RunningTraining) -> Iterator[Disruption]:
        since_s = 0.0
        for step in steps:
            training.limit.set(step)
            reached = training.log.wait_step(since_s, at_least=step)
            if reached is None:
                return
            pid = rng.choice(training_worker_pids())
            began_s = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            if disruption := training.recovery(f"kill -9 of worker {pid}", reached[1].done, began_s):
                yield disruption
            since_s = began_s

    with FaultTestbed.start(recipe, [LARGE_NODE_CPUS]) as testbed:
        reference, _ = testbed.train("uninterrupted", recipe.train)
        killed, disruptions = testbed.train("killed", recipe.train, kill_workers)
        planned = testbed.planned_rows_hash
    _print_disruptions(disruptions)
    pairs = [
        ("steps", len(reference.values("loss")), len(killed.values("loss"))),
        ("last loss", reference.values("loss")[-1].hex(), killed.values("loss")[-1].hex()),
        *(
            (f"sha256 of {label}", reference.digest(name)[:16], killed.digest(name)[:16])
            for label, name in {
                "losses": "loss",
                "gradient norms": "grad_norm",
                "validation losses": "validation_loss",
            }.items()
        ),
        *_row_pairs(planned, reference, killed),
        ("sha256 of the weights", reference.weights_sha256[:16], killed.weights_sha256[:16]),
    ]
    proven = all(a == b for _, a, b in pairs) and killed.rows_hash == planned and len(disruptions) == kills
    _print_pairs("resumed", pairs)
    return _verdict(proven, f"{len(disruptions)} kills, and nothing differs", f"{len(disruptions)} of {kills} kills")


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
    rng = random.Random(seed)
    changed = {"workers": (1, most), "cpus_per_worker": WORKER_CPUS}
    train = recipe.train.model_copy(update=changed)
    first = rng.randint(2, max(2, train.steps // 4))

    def move_nodes(training: RunningTraining) -> Iterator[Disruption]:
        log, limit, cluster = training.log, training.limit, training.cluster
        limit.set(first)
        reached = log.wait_step(at_least=first)
        if reached is None:
            return
        began_s = time.monotonic()
        cluster.remove_node(rng.choice(cluster.list_all_nodes()[1:]), allow_graceful=False)
        disruption = training.recovery("a node died", reached[1].done, began_s, f"{most} to {most - 1}")
        if disruption is None:
            return
        yield disruption
        began_s = time.monotonic()
        step_s = GROW_TIMEOUT_S / (train.steps - reached[1].done)
        with extra_node(cluster.address, SMALL_NODE_CPUS):
            for step in range(reached[1].done, train.steps):  # slowly, so that steps are left when the node is there
                limit.set(step)
                if grown := log.wait_step(began_s, workers=most, timeout_s=step_s):
                    step = log.resumed_step(began_s, grown[0])
                    yield Disruption("a node joined", step, step, grown[0] - began_s, f"{most - 1} to {most}")
                    break
            limit.set()
            log.wait_finished()

    with FaultTestbed.start(recipe, [SMALL_NODE_CPUS] * most) as testbed:
        reference, _ = testbed.train("fixed", train.model_copy(update={"workers": most}))
        moved, disruptions = testbed.train("moved", train, move_nodes)
        planned = testbed.planned_rows_hash
    _print_disruptions(disruptions)
    gaps = {name: _largest_gap(reference, moved, name) for name in ("loss", "validation_loss")}
    pairs: list[tuple[str, Any, Any]] = [
        ("steps", len(reference.values("loss")), len(moved.values("loss"))),
        ("last loss", f"{reference.values('loss')[-1]:.8f}", f"{moved.values('loss')[-1]:.8f}"),
        *((f"largest difference of {name}", "", f"{gap:.1e}") for name, gap in gaps.items()),
        *_row_pairs(planned, reference, moved),
    ]
    _print_pairs("moved", pairs)
    rows_match = reference.rows_hash == moved.rows_hash == planned
    proven = max(gaps.values()) <= TOLERANCE and rows_match and len(disruptions) == 2
    failure = (
        f"{len(disruptions)} of 2 events; a loss differs by {max(gaps.values()):.1e}, expected {TOLERANCE:g} at most"
    )
    if max(gaps.values()) > TOLERANCE:
        failure += (
            ". Other numbers of workers add gradients up in another order, and a high learning_rate or many steps make "
            "much of the last bits: try fewer steps, or a lower rate"
        )
    return _verdict(proven, f"losses within {TOLERANCE:g}, every row as planned", failure)


def _largest_gap(one: TrainingRecord, other: TrainingRecord, name: str) -> float:
    pairs = zip(one.values(name), other.values(name), strict=True)
    return max(abs(a - b) for a, b in pairs)


def _row_pairs(planned: int, one: TrainingRecord, other: TrainingRecord) -> list[tuple[str, str, str]]:
    """The rows that came, and whether they are those that were planned."""
    yes_no = {True: "yes", False: "no"}
    return [
        ("rows, as a multiset", f"{one.rows_hash:x}", f"{other.rows_hash:x}"),
        ("rows, as planned", yes_no[one.rows_hash == planned], yes_no[other.rows_hash == planned]),
    ]


def _print_disruptions(disruptions: list[Disruption]) -> None:
    table = Table(
        "what", "at step", "resumed from", "steps lost", "s to the next step", "workers", box=None, pad_edge=False
    )
    for each in disruptions:
        table.add_row(
            each.what, str(each.at_step), str(each.resumed_from), str(each.lost), f"{each.seconds:.1f}", each.workers
        )
    console.out.print(table)


def _print_pairs(name: str, pairs: list[tuple[str, Any, Any]]) -> None:
    table = Table("", "uninterrupted", name, "", box=None, pad_edge=False)
    for what, one, other in pairs:
        table.add_row(what, str(one), str(other), "[green]same[/]" if one == other else "")
    console.out.print(table)


def _verdict(proven: bool, evidence: str, failure: str) -> int:
    console.out.print(f"[green]proven[/]: {evidence}" if proven else f"[red]not proven[/]: {failure}")
    return 0 if proven else 1
