"""What the benchmarks of servers share: starting one, asking it from another process, and what its processes spend.

A server is a command that works until its standard input ends (ours, under ``servers/``) or until it is told to end.
Ours print one JSON object, ``{"url": ...}``, when they are ready; the others are ready when a path answers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from measuring import HERE, TreeCpu, environment, printed

from overproof.serve.net import free_port

SERVERS = HERE / "servers"
START_S, END_S = 120, 30
TAIL = 4000  # characters of its log that a failure shows


@dataclass(frozen=True)
class Server:
    """A running server; ``url`` is empty where it is asked over its standard input."""

    process: subprocess.Popen[str]
    url: str

    def ask(self, plan: dict[str, Any]) -> dict[str, Any]:
        """What clients in a process of their own found, and the CPU seconds of the server's processes meanwhile."""
        with TreeCpu(psutil.Process(self.process.pid)) as cpu:
            found = self._over_http(plan) if self.url else self._over_input(plan)
        return {**found, "server_cpu_s": cpu.seconds}

    def _over_http(self, plan: dict[str, Any]) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, HERE / "clients.py", self.url],
            input=json.dumps(plan),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{self.process.args!r}\n{done.stderr[-TAIL:]}")
        return printed(done.stdout)

    def _over_input(self, plan: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(plan) + "\n")
        self.process.stdin.flush()
        return _line(self.process)


@contextmanager
def ours(script: str, *arguments: Any, threads: int, python: Path | None = None, **more: str) -> Iterator[Server]:
    """A script of ``servers/``."""
    command = [str(python or sys.executable), str(SERVERS / script), *map(str, arguments)]
    with _running(command, threads, None, **more) as process:
        yield Server(process, _line(process)["url"])


@contextmanager
def theirs(command: Sequence[Any], path: str, threads: int, log: Path, **more: str) -> Iterator[Server]:
    """A command that listens at the port which replaces ``{port}`` in it, ready when ``path`` answers."""
    port = free_port("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port}"
    with (
        log.open("w") as file,
        _running([str(c).replace("{port}", str(port)) for c in command], threads, file, **more) as p,
    ):
        deadline_s = time.monotonic() + START_S
        while not _answers(f"{url}{path}"):
            if p.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"{' '.join(map(str, command))} is not there\n{log.read_text()[-TAIL:]}")
            time.sleep(0.1)
        yield Server(p, url)


@contextmanager
def _running(command: list[str], threads: int, log: IO[str] | None, **more: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        env=environment(threads, **more),
        stdin=subprocess.PIPE,
        stdout=log or subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        assert process.stdin is not None
        process.stdin.close()
        if log is not None:
            process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
        for left in psutil.wait_procs(family, END_S)[1]:
            left.kill()


def _line(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next JSON object that it prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    sys.exit(f"{process.args!r} ended with {process.wait()}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
