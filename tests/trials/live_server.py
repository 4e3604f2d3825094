"""`overproof serve` as a process of its own, and what it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from overproof.serve.net import free_port

HOST, START_S = "127.0.0.1", 300.0
Processes = frozenset[tuple[int, float]]  # ids and starts


@contextmanager
def live_server(package: Path, ray_address: str, log: Path, *sets: str, **environment: str) -> Iterator[int]:
    """The port of a server of one replica, with further fields ``NAME=VALUE``, until the end of the block."""
    port = free_port(HOST, 0)
    sizes = {"port": port, "max_replicas": 1, "cpus_per_replica": 0.5}
    command = [sys.executable, "-m", "overproof.cli.main", "serve", str(package)]
    given = (*(f"{name}={value}" for name, value in sizes.items()), *sets)
    command += [word for each in given for word in ("--set", each)]
    settings = {**os.environ, "RAY_ADDRESS": ray_address, **environment}
    with log.open("w") as written:
        process = subprocess.Popen(command, env=settings, stdin=subprocess.DEVNULL, stdout=written, stderr=written)
        try:
            deadline_s = time.monotonic() + START_S
            while "until Ctrl-C" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.2)
            yield port
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(START_S)


def serving_processes() -> Processes:
    """Ray's actors: the gateway, the replica, the controllers."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            name = " ".join(process.cmdline())
            if name.startswith("ray::") and "IDLE" not in name:
                found.add((process.pid, process.create_time()))
    return frozenset(found)


def memory_mib(processes: Processes) -> float:
    return sum(psutil.Process(pid).memory_info().rss for pid, _ in processes) / 2**20
