"""The whole loop on hosts that share no disk, and what it costs when one of them is cut off."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from typing import NamedTuple

import pytest
from hosts import Host, Hosts, hosts_up

from finished import RECIPES
from overproof.artifacts import Store
from overproof.config import load_recipe
from overproof.pipeline import stages_of

pytestmark = [pytest.mark.trial, pytest.mark.skipif(os.getuid() != 0, reason="namespaces need root")]

RECIPE_S = 1200


class Line(NamedTuple):
    """What was found in a line of output, and when it came."""

    at: float
    found: re.Match[str]


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
        assert job.wait_for(r"^report   s3://bucket/store/.*/report\.html\?scheme=http")
        artifacts = Store(hosts.store).artifacts()
        stages = [stage.name for stage in stages_of(load_recipe(RECIPES / f"{recipe}.yaml"))]
        assert [artifact.record.stage for artifact in artifacts] == stages
        for artifact in artifacts:
            artifact.verify()
        listed = subprocess.run(laptop.command("ls", "/tmp"), capture_output=True, text=True, check=True).stdout.split()
        assert not [name for name in listed if "overproof" in name]  # a laptop fetches nothing of a job


def host_running(hosts: Hosts, title: str, among: list[Host]) -> Host:
    """One of these hosts on which a process with such a title runs, once there is one."""
    deadline = time.monotonic() + RECIPE_S
    while time.monotonic() < deadline:
        for host in among:
            found = subprocess.run(host.command("pgrep", "-f", title), capture_output=True, check=False)
            if found.returncode == 0:
                return host
        time.sleep(0.2)
    raise AssertionError(f"no process {title} on any host")


@pytest.mark.usefixtures("environment")
def test_hosts_are_cut_off_in_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """A host at work is told to leave, others are cut off, and each time a new one joins: the recipe goes on."""
    table = list[tuple[str, str, str]]()
    few = ("train.steps=4000", "train.checkpoint.every_steps=100", "train.cpus_per_worker=2", "sweep.steps=1500",
           "tune.scheduler={kind: none}", "cache.rows=null", "gate.rules=[{kind: parity, at_most: 1.0}]")  # fmt: skip
    with hosts_up() as hosts:
        hosts.start_head()
        nodes = [hosts.add_node(cpus=3) for _ in range(3)]
        job = Job(hosts, hosts.add(), "digits", *few)

        def replace_host(lost: Host) -> None:
            nodes.remove(lost)
            nodes.append(hosts.add_node(cpus=3))

        def go_on(stage: str, what: str, done: str, lost: Host, cut_s: float) -> None:
            after_s = job.wait_for(done, since=cut_s)
            table.append((stage, what, f"{after_s - cut_s:.0f} s until it went on"))
            replace_host(lost)

        job.wait_for(r"train [3-9]\d\d/4000")
        leaving = host_running(hosts, "RayTrainWorker", nodes)
        told_s = time.monotonic()
        hosts.run(leaving, "ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                  "--deadline-remaining-seconds", "120")  # fmt: skip
        resumed = job.wait_for_match(r"going on from step (\d+)", since=told_s)
        last = job.last_step(before=resumed.at)
        assert int(resumed.found[1]) >= last
        hosts.cut_off(leaving)
        go_on("train", "with notice: no step is made again", r"train \d+/4000 loss", leaving, resumed.at)

        job.wait_for(r"train 2\d\d\d/4000")
        lost = host_running(hosts, "RayTrainWorker", nodes)
        cut_s = time.monotonic()
        hosts.cut_off(lost)
        resumed = job.wait_for_match(r"going on from step (\d+)", since=cut_s)
        again = job.last_step(before=resumed.at) - int(resumed.found[1])
        assert 0 <= again <= 200  # the interval, and what was made while a checkpoint was written
        go_on("train", f"cut off: {again} steps are made again", r"train \d+/4000 loss", lost, cut_s)

        for stage, title, done in (
            ("cache", "TargetWorker|MapWorker|MapBatches", r"cache\s.*cache-"),
            ("sweep", "TuneTrial", r"sweep \d+/"),
            ("evaluate", r"ray::_(score|probe)", r"(score|engine|evaluate) "),
        ):
            lost = host_running(hosts, title, nodes)
            cut_s = time.monotonic()
            hosts.cut_off(lost)
            go_on(stage, "cut off", done, lost, cut_s)
        job.finish()
        artifacts = Store(hosts.store).artifacts()
        assert artifacts[-1].record.stage == "package"
        for artifact in artifacts:
            artifact.verify()
    with capsys.disabled():
        print()
        for row in table:
            print("{:<10}{:<45}{}".format(*row))
