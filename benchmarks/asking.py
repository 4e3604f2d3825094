"""Clients that the trials of serving share, and the processes that serve them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
from ray.serve.context import _get_global_client

WAIT_S = 120
BODY = {"prompt": "import os\n", "max_tokens": 32, "temperature": 1.0}


@dataclass(frozen=True)
class Seen:
    """One reply."""

    status: int
    package: str
    seconds: float


def until(reached: Callable[[], bool], what: str) -> float:
    """The seconds that it took."""
    began_s = time.perf_counter()
    while not reached():
        if time.perf_counter() - began_s > WAIT_S:
            raise SystemExit(f"{what}: not in {WAIT_S} s")
        time.sleep(0.02)
    return time.perf_counter() - began_s


@contextmanager
def at_once(clients: int, work: Callable[[int, threading.Event], None]) -> Iterator[None]:
    """Clients in threads, each told its number, and when it is over."""
    over = threading.Event()
    threads = [threading.Thread(target=work, args=(number, over)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@contextmanager
def load(url: str, clients: int, body: dict[str, Any] = BODY) -> Iterator[list[Seen]]:
    """Clients that ask all the time over kept connections; yields what they get, 0 for a broken connection."""
    seen = list[Seen]()

    def ask(_: int, over: threading.Event) -> None:
        with httpx.Client(timeout=WAIT_S, trust_env=False) as client:
            while not over.is_set():
                began_s = time.perf_counter()
                try:
                    reply = client.post(url, json=body)
                    status, package = reply.status_code, reply.json().get("package", "")
                except httpx.TransportError:
                    status, package = 0, ""
                seen.append(Seen(status, package, time.perf_counter() - began_s))

    with at_once(clients, ask):
        yield seen


def processes() -> dict[str, list[int]]:
    """Process ids of what serves: replicas by deployment, our controller, and Ray Serve's."""
    client: Any = _get_global_client()
    found: dict[str, list[int]] = {}
    for application in client.get_serve_details()["applications"].values():
        for name, deployment in application["deployments"].items():
            pids = [r["pid"] for r in deployment["replicas"] if r["state"] == "RUNNING" and r["pid"]]
            found.setdefault(name, []).extend(pids)
    commands = {p.pid: _command(p) for p in psutil.Process().children(recursive=True)}
    for name, command in (("controller", "ray::Controller"), ("serve controller", "ray::ServeController")):
        found[name] = [pid for pid, line in commands.items() if line.startswith(command)]
    return found


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return ""


def resident_mb() -> float:
    """Of all processes that serve."""
    total = 0
    for pid in {pid for pids in processes().values() for pid in pids if pid != os.getpid()}:
        try:
            total += psutil.Process(pid).memory_info().rss
        except psutil.Error:
            continue
    return total / 1e6
