"""What breaks next, from 1 to 1,024 workers, with 10 TB of text: costs that are measured here, and arithmetic.

    .venv/bin/python benchmarks/scale_model.py

Prints two Markdown tables. The first has what one process does for all workers, and one unit of it, measured on one
core of this machine. The second says which share of its time that process would be busy: above 1 everything waits for
it. What is assumed of the cluster stands in ``Cluster``, and nothing of it is measured. Under two minutes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
from measuring import machine, say, table

from overproof.data.order import Order
from overproof.files import HASHING_THREADS, file_sha256, filesystem
from overproof.train.checkpoint import read_checksummed, with_checksum

WORKERS = (1, 8, 64, 256, 1024)
REPEATS = 5
TASKS, HASHED_MB, FILES_A_RANK = 200, 256, 3


@dataclass(frozen=True)
class Cluster:
    """What is assumed."""

    text_tb: float = 10.0
    tokens_tb: float = 5.0  # two bytes a token, from text of some four bytes a token
    tokenized_mb_per_s: float = 4.0  # by one core
    cores_per_worker: int = 8
    block_mb: float = 128.0  # of text, a task
    trained_tokens_per_s: float = 9_400.0  # by one worker: 7B parameters at 40 % of an H100's 989 TFLOP/s
    tokens_a_row: int = 4096
    rows_a_worker: int = 4  # in a step
    checkpoint_every_s: float = 600.0
    captured_bytes_a_token: float = 64.0
    captured_tokens_per_s: float = 28_000.0
    trial_s: float = 600.0
    trials: int = 10_000
    served_tokens_per_s: float = 2_000.0  # by one replica
    gateway_s_a_token: float = 105e-6  # results/serving.md
    driver_s_a_trial: float = 0.05


@dataclass(frozen=True)
class Serial:
    """Something that one process does for all."""

    what: str
    unit: str
    seconds: float  # of a unit
    units_per_s: Callable[[int], float]  # by workers


def seconds_of(action: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Of this process's CPU time, unless another clock is given; the median."""
    found = []
    for _ in range(REPEATS):
        began_s = clock()
        action()
        found.append(clock() - began_s)
    return statistics.median(found)


def task_s() -> float:
    """Of a Ray task that does nothing: submitted, run and taken back."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    nothing = ray.remote(num_cpus=1)(lambda: None)
    run = lambda: ray.get([nothing.remote() for _ in range(TASKS)])  # noqa: E731
    run()
    found = seconds_of(run, time.perf_counter) / TASKS
    ray.shutdown()
    return found


def hash_s_per_mb(folder: Path) -> float:
    path = folder / "hashed"
    path.write_bytes(os.urandom(HASHED_MB << 20))
    return seconds_of(lambda: file_sha256(path)) / HASHED_MB


def record_s(folder: Path) -> float:
    """Of one rank, to write and read the record of a checkpoint to which as many as can be brought files."""
    path = str(folder / "checkpoint.json")
    names = [f"rank-{rank:05d}-{part}" for rank in range(max(WORKERS)) for part in range(FILES_A_RANK)]
    content = {"files": {name: {"sha256": "ab" * 32, "size_bytes": 1 << 30} for name in names}}

    def write_and_read() -> None:
        Path(path).write_bytes(with_checksum(content))
        read_checksummed(filesystem(path)[0], path)

    return seconds_of(write_and_read) / max(WORKERS)


def order_s(workers: int, cluster: Cluster) -> float:
    """One rank's part of a step's order, of all the rows of the text."""
    rows = int(cluster.tokens_tb * 1e12 / 2 / cluster.tokens_a_row)
    order = Order(seed=1, groups=rows // 16, rows_per_group=16)
    batch = workers * cluster.rows_a_worker
    return seconds_of(lambda: order.steps_rows(10, 20, batch, 0, workers)) / 10


def serial_parts(cluster: Cluster, folder: Path) -> list[Serial]:
    rows_mb, blocks = cluster.tokens_tb * 1e6, cluster.text_tb * 1e6 / cluster.block_mb
    targets_mb = rows_mb / 2 * cluster.captured_bytes_a_token
    step_s = cluster.rows_a_worker * cluster.tokens_a_row / cluster.trained_tokens_per_s
    hashed_s = hash_s_per_mb(folder) / HASHING_THREADS

    def prepared_per_s(workers: int) -> float:
        """Of the whole text."""
        return workers * cluster.cores_per_worker * cluster.tokenized_mb_per_s / (cluster.text_tb * 1e6)

    def captured_per_s(workers: int) -> float:
        """Of all tokens."""
        return workers * cluster.captured_tokens_per_s / (rows_mb * 1e6 / 2)

    return [
        Serial("prepare: blocks are handed out, twice", "task", task_s(), lambda n: 2 * blocks * prepared_per_s(n)),
        Serial("prepare: rows are hashed as they are committed", "MB", hashed_s, lambda n: rows_mb * prepared_per_s(n)),
        Serial("train: each rank works out its order", "step", order_s(max(WORKERS), cluster), lambda _: 1 / step_s),
        Serial("train: record of a checkpoint", "rank", record_s(folder), lambda n: n / cluster.checkpoint_every_s),
        Serial("cache: targets are hashed as they are committed", "MB", hashed_s,
               lambda n: targets_mb * captured_per_s(n)),
        Serial("sweep: the driver of the trials", "trial", cluster.driver_s_a_trial, lambda n: n / cluster.trial_s),
        Serial("serve: one gateway", "token", cluster.gateway_s_a_token, lambda n: n * cluster.served_tokens_per_s),
    ]  # fmt: skip


def main() -> None:
    cluster = Cluster()
    say(machine(1))
    with tempfile.TemporaryDirectory() as folder:
        parts = serial_parts(cluster, Path(folder))
    table(["one process does", "unit", "µs of a unit"], [[p.what, p.unit, f"{p.seconds * 1e6:,.1f}"] for p in parts])
    print()
    head = ["busy share of that process, by workers", *map(str, WORKERS)]
    table(head, [[p.what, *(f"{p.units_per_s(n) * p.seconds:.2g}" for n in WORKERS)] for p in parts])


if __name__ == "__main__":
    main()
