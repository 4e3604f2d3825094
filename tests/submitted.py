"""Processes on hosts and what they print, such as a recipe that was submitted as docs/cluster.md says."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from typing import NamedTuple

from hosts import Host, Hosts

RECIPE_S = 1200


class Line(NamedTuple):
    """What was found in a line of output, and when it came."""

    at: float
    found: re.Match[str]


class Running:
    """A process on a host, and what it prints."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[tuple[float, str]] = []  # with when each came
        self.more = threading.Condition()
        self.ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self.more:
                self.lines.append((time.monotonic(), line.rstrip()))
                self.more.notify_all()
        with self.more:
            self.ended = True
            self.more.notify_all()

    def wait_for_match(self, pattern: str, since: float = 0.0) -> Line:
        """The first line of this kind that came after a moment."""
        deadline = time.monotonic() + RECIPE_S

        def find() -> Line | None:
            for at, line in self.lines:
                if at > since and (found := re.search(pattern, line)):
                    return Line(at, found)
            return None

        with self.more:
            self.more.wait_for(lambda: find() is not None or self.ended, deadline - time.monotonic())
            line = find()
        assert line is not None, f"no {pattern}:\n{self.tail()}"
        return line

    def wait_for(self, pattern: str, since: float = 0.0) -> float:
        """When it came."""
        return self.wait_for_match(pattern, since).at

    def last_step(self, before: float) -> int:
        """Of the training, as it was told."""
        steps = (re.search(r"train (\d+)/\d+ loss", line) for at, line in self.lines if at < before)
        return max(int(found[1]) for found in steps if found)

    def finish(self) -> None:
        assert self.process.wait(RECIPE_S) == 0, self.tail()

    def tail(self) -> str:
        return "\n".join(line for _, line in self.lines[-60:])


def submit(hosts: Hosts, laptop: Host, *words: str) -> Running:
    """A verb of the command line as a job of the cluster, as docs/cluster.md says."""
    job = ("ray", "job", "submit", "--address", hosts.dashboard, "--working-dir", ".", "--", "python", "jobs/run.py")
    return Running(hosts.start(laptop, *job, *words))


def run_recipe(hosts: Hosts, laptop: Host, recipe: str, *overrides: str) -> Running:
    sets = [word for each in (f"store={hosts.store}", *overrides) for word in ("--set", each)]
    return submit(hosts, laptop, "run", f"jobs/recipes/{recipe}.yaml", *sets)
