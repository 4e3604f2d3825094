"""The whole loop on hosts that share no disk, and what it costs when one of them is cut off."""

from __future__ import annotations

import json
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
REPLICA = "ray::ServeReplica:.*:model"  # a process that holds a package
STEADY_S = 20.0  # that a client goes on asking


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
        job = run_recipe(hosts, laptop, recipe, *overrides)
        job.finish()
        assert job.wait_for(r"^report   s3://bucket/store/.*/report\.html\?scheme=http")
        artifacts = Store(hosts.store).artifacts()
        stages = [stage.name for stage in stages_of(load_recipe(RECIPES / f"{recipe}.yaml"))]
        assert [artifact.record.stage for artifact in artifacts] == stages
        for artifact in artifacts:
            artifact.verify()
        listed = subprocess.run(laptop.command("ls", "/tmp"), capture_output=True, text=True, check=True).stdout.split()
        assert not [name for name in listed if "overproof" in name]  # a laptop fetches nothing of a job


def is_running(host: Host, title: str) -> bool:
    """Whether a process with such a title runs there."""
    return subprocess.run(host.command("pgrep", "-f", title), capture_output=True, check=False).returncode == 0


def host_running(title: str, among: list[Host]) -> Host:
    """One of these hosts on which a process with such a title runs, once there is one."""
    deadline = time.monotonic() + RECIPE_S
    while time.monotonic() < deadline:
        for host in among:
            if is_running(host, title):
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
        job = run_recipe(hosts, hosts.add(), "digits", *few)

        def replace_host(lost: Host) -> None:
            nodes.remove(lost)
            nodes.append(hosts.add_node(cpus=3))

        def go_on(stage: str, what: str, done: str, lost: Host, cut_s: float) -> None:
            after_s = job.wait_for(done, since=cut_s)
            table.append((stage, what, f"{after_s - cut_s:.0f} s until it went on"))
            replace_host(lost)

        job.wait_for(r"train [3-9]\d\d/4000")
        leaving = host_running("RayTrainWorker", nodes)
        told_s = time.monotonic()
        hosts.run(leaving, "ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                  "--deadline-remaining-seconds", "120")  # fmt: skip
        resumed = job.wait_for_match(r"going on from step (\d+)", since=told_s)
        last = job.last_step(before=resumed.at)
        assert int(resumed.found[1]) >= last
        hosts.cut_off(leaving)
        go_on("train", "with notice: no step is made again", r"train \d+/4000 loss", leaving, resumed.at)

        job.wait_for(r"train 2\d\d\d/4000")
        lost = host_running("RayTrainWorker", nodes)
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
            lost = host_running(title, nodes)
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


@pytest.mark.usefixtures("environment")
def test_a_host_that_serves_is_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    """Two hosts hold a replica each, a third is free; one of the two is cut off while clients ask steadily."""
    with hosts_up() as hosts:
        hosts.start_head()
        nodes = [hosts.add_node(cpus=3) for _ in range(3)]
        laptop = hosts.add()
        run_recipe(hosts, laptop, "digits", "train.steps=200", "sweep.steps=200", "tune.scheduler={kind: none}",
                   "gate.rules=[{kind: parity, at_most: 1.0}]").finish()  # fmt: skip
        package = Store(hosts.store).artifacts()[-1].uri
        sets = ("port=8001", "min_replicas=2", "max_replicas=2", "cpus_per_replica=2")
        overrides = [word for each in sets for word in ("--set", each)]
        submit(hosts, laptop, "deploy", package, *overrides).finish()
        body = json.dumps({"images": [[0.0] * 64]})
        client = Running(hosts.start(hosts.head, "python", "tests/trials/steady_client.py",
                                     "http://127.0.0.1:8001/v1/classify", body, "8"))  # fmt: skip
        client.wait_for("answer 200")
        serving = [host for host in nodes if is_running(host, REPLICA)]
        assert len(serving) == 2
        cut_s = time.monotonic()
        hosts.cut_off(serving[0])
        (spare,) = [host for host in nodes if host not in serving]
        host_running(REPLICA, [spare])
        again_s = time.monotonic()
        time.sleep(STEADY_S)
        after = [line.split()[1:] for at, line in client.lines if at > cut_s]
        taken = [float(took_s) for _, took_s in after]
        failed = [status for status, _ in after if status != "200"]
        assert len(after) - len(failed) > STEADY_S
        assert not failed  # a request whose host is gone is asked of another one
        assert is_running(spare, REPLICA)
    with capsys.disabled():
        print(f"\nserve     cut off: {len(after)} answers since, {len(failed)} failed, the slowest after "
              f"{max(taken):.1f} s; another host had the replica after {again_s - cut_s:.0f} s")  # fmt: skip
