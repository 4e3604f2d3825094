"""What breaks next, from 1 to 1,024 workers, with 10 TB of text: costs that are measured here, and arithmetic.

    .venv/bin/python benchmarks/scale_model.py

Prints two Markdown tables. The first has what one process does for all workers, and one unit of it, measured on one
core of this machine. The second says which share of its time that process would be busy: above 1 everything waits for
it. What is assumed of the cluster stands in ``Cluster``, and nothing of it is measured. Commits are made in a bucket of
moto's server, a process of its own that is slower than a real one: what they take is wall time. Some three minutes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import ray
from measuring import machine, say, table

from overproof.artifacts import RECORD, Store
from overproof.data.order import Order
from overproof.data.prepare import AT_ONCE
from overproof.files import CHUNK_BYTES, HashingStream, filesystem
from overproof.ray_tasks import run_tasks
from overproof.train.checkpoint import read_checksummed, with_checksum

WORKERS = (1, 8, 64, 256, 1024)
REPEATS = 5
TASKS, HASHED_MB, FILES_A_RANK = 1000, 256, 3
FILES = 1000  # of the artifact that is committed
MOTO = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("{}:{}".format(*server.get_host_and_port()), flush=True)
input()
"""


@dataclass(frozen=True)
class Cluster:
    """What is assumed."""

    text_tb: float = 10.0
    tokens_tb: float = 5.0  # two bytes a token, from text of some four bytes a token
    tokenized_mb_per_s: float = 4.0  # by one core
    cores_per_worker: int = 8
    block_mb: float = 128.0  # of text, a task
    shard_mb: float = 256.0  # of rows, a file
    cache_mb: float = 1_000.0  # of targets, a file
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
    """Of a Ray task that does nothing, as ``prepare`` runs its own: submitted, run and taken back."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    calls = {str(number): () for number in range(TASKS)}
    run = lambda: run_tasks(os.getpid, calls, at_once=AT_ONCE)  # noqa: E731
    run()
    found = seconds_of(run, time.perf_counter) / TASKS
    ray.shutdown()
    return found


def hash_s_per_mb() -> float:
    """What it adds to writing a file that its bytes are hashed on the way."""
    chunk = os.urandom(CHUNK_BYTES)

    def write(hashed: bool) -> None:
        with Path(os.devnull).open("wb") as stream:
            target = HashingStream(stream) if hashed else stream
            for _ in range(HASHED_MB):
                target.write(chunk)

    return (seconds_of(lambda: write(True)) - seconds_of(lambda: write(False))) / HASHED_MB


@contextmanager
def bucket() -> Iterator[str]:
    """The URI of a store in an empty bucket of a server on this machine."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-c", MOTO], text=True, **pipes)
    assert server.stdout
    try:
        address = server.stdout.readline().strip()
        boto3.client("s3", endpoint_url=f"http://{address}", region_name="us-east-1").create_bucket(Bucket="bucket")
        yield f"s3://bucket/store?scheme=http&endpoint_override={address}&region=us-east-1"
    finally:
        server.kill()
        server.wait()


def commit_s() -> float:
    """Of one file of a commit of as many as one listing's page has."""
    with bucket() as uri:
        draft = Store(uri).new_writer("bench", "prepare", "a" * 64, {}, {})
        with draft.directory("train") as folder:
            for number in range(FILES):
                (folder / f"{number:05d}.parquet").write_bytes(b"rows")
        files, root = filesystem(draft.uri)

        def commit() -> None:
            draft.commit({}, 0.0)
            files.delete_file(f"{root}/{RECORD}")

        return seconds_of(commit, time.perf_counter) / FILES


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
    hashed_s, committed_s = hash_s_per_mb(), commit_s()
    core_mb_s = cluster.tokenized_mb_per_s * rows_mb / (cluster.text_tb * 1e6)  # of rows

    def prepared_per_s(workers: int) -> float:
        """Of the whole text."""
        return workers * cluster.cores_per_worker * cluster.tokenized_mb_per_s / (cluster.text_tb * 1e6)

    def captured_per_s(workers: int) -> float:
        """Of all tokens."""
        return workers * cluster.captured_tokens_per_s / (rows_mb * 1e6 / 2)

    return [
        Serial("prepare: blocks are handed out, twice", "task", task_s(), lambda n: 2 * blocks * prepared_per_s(n)),
        Serial("prepare: a core hashes the rows that it writes", "MB", hashed_s, lambda _: core_mb_s),
        Serial("prepare: shards are committed", "file", committed_s,
               lambda n: rows_mb / cluster.shard_mb * prepared_per_s(n)),
        Serial("train: each rank works out its order", "step", order_s(max(WORKERS), cluster), lambda _: 1 / step_s),
        Serial("train: record of a checkpoint", "rank", record_s(folder), lambda n: n / cluster.checkpoint_every_s),
        Serial("cache: files are committed", "file", committed_s,
               lambda n: targets_mb / cluster.cache_mb * captured_per_s(n)),
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
