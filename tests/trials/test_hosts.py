"""The whole loop on hosts that share no disk, and what it costs when one of them is cut off."""

from __future__ import annotations

import json
import subprocess
import time

import pytest

from finished import RECIPES
from hosts import Host, hosts_up
from overproof.artifacts import Store
from overproof.config import load_recipe
from overproof.pipeline import stages_of
from submitted import RECIPE_S, Running, run_recipe, submit

pytestmark = pytest.mark.trial

REPLICA = "ray::ServeReplica:.*:model"  # a process that holds a package
STEADY_S = 20.0  # that a client goes on asking


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
