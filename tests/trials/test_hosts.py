"""The whole loop on hosts that share no disk, and what it costs when one of them is cut off."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time

import pytest
from hosts import Host, Hosts, hosts_up

from finished import RECIPES
from overproof.artifacts import Store
from overproof.config import load_recipe
from overproof.pipeline import stages_of

pytestmark = [pytest.mark.trial, pytest.mark.skipif(os.getuid() != 0, reason="namespaces need root")]

RECIPE_S = 1200


class Job:
    """A recipe, submitted from a laptop as docs/cluster.md says, and what it prints."""

    def __init__(self, hosts: Hosts, laptop: Host, recipe: str, *overrides: str) -> None:
        sets = [word for each in (f"store={hosts.store}", *overrides) for word in ("--set", each)]
        self.process = hosts.start(
            laptop, "ray", "job", "submit", "--address", hosts.dashboard, "--working-dir", ".", "--",
            "python", "jobs/run.py", "run", f"jobs/recipes/{recipe}.yaml", *sets,
        )  # fmt: skip
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

    def wait_for(self, pattern: str) -> float:
        """When a line of this kind came."""
        deadline = time.monotonic() + RECIPE_S

        def found() -> float | None:
            return next((at for at, line in self.lines if re.search(pattern, line)), None)

        with self.more:
            self.more.wait_for(lambda: found() is not None or self.ended, deadline - time.monotonic())
            at = found()
        assert at is not None, f"no {pattern}:\n{self.tail()}"
        return at

    def finish(self) -> None:
        assert self.process.wait(RECIPE_S) == 0, self.tail()

    def tail(self) -> str:
        return "\n".join(line for _, line in self.lines[-60:])


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """For this process to read the bucket as well."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("digits", ()),
        ("stdlib-lm", ("train.steps=20", "sweep.steps=20", "evaluate.max_documents=6", "evaluate.timed_requests=20",
                       "gate.rules=[{kind: parity, at_most: 1.0}]")),
    ],
    ids=["digits", "stdlib-lm"],
)  # fmt: skip
def test_the_whole_loop(recipe: str, overrides: tuple[str, ...]) -> None:
    with hosts_up() as hosts:
        hosts.start_head()
        for _ in range(2):
            hosts.add_node(cpus=4)
        laptop = hosts.add()
        job = Job(hosts, laptop, recipe, *overrides)
        job.finish()
        artifacts = Store(hosts.store).artifacts()
        stages = [stage.name for stage in stages_of(load_recipe(RECIPES / f"{recipe}.yaml"))]
        assert [artifact.record.stage for artifact in artifacts] == stages
        for artifact in artifacts:
            artifact.verify()
        listed = subprocess.run(laptop.command("ls", "/tmp"), capture_output=True, text=True, check=True).stdout.split()
        assert not [name for name in listed if "overproof" in name]  # a laptop fetches nothing of a job
