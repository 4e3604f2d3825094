"""A cluster that begins with a head alone: work makes nodes come, nodes without work leave, and one is taken away."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from autoscaled import IDLE_S, MOST, Cluster, autoscaled_cluster

from hosts import Host
from submitted import RECIPE_S, run_recipe, submit

pytestmark = pytest.mark.trial

STEPS, INTERVAL = 3000, 200
RECIPE = (
    f"train.steps={STEPS}", f"train.checkpoint.every_steps={INTERVAL}", "train.cpus_per_worker=1.6", "sweep.steps=400",
    "sweep.cpus_per_trial=1.5", "tune.scheduler={kind: none}", "gate.rules=[{kind: parity, at_most: 1.0}]",
)  # fmt: skip
WITH_GPUS = ("sweep.gpus_per_trial=1", "sweep.steps=410")  # another sweep
SERVED = ("port=8000", "min_replicas=1", f"max_replicas={MOST}", "cpus_per_replica=2", "slots=1",
          "node_labels.group=serve", "downscale_delay_s=5")  # fmt: skip
CLIENTS = 12
CLIENT = f"""
import threading, httpx
def ask():
    with httpx.Client(base_url="http://127.0.0.1:8000", timeout=60) as client:
        while True:
            client.post("/v1/classify", json={{"images": [[0.5] * 64]}}).raise_for_status()
threads = [threading.Thread(target=ask) for _ in range({CLIENTS})]
[thread.start() for thread in threads]
"""
Row = tuple[str, str, str, str]


def test_nodes_come_for_work_and_leave_without(capsys: pytest.CaptureFixture[str]) -> None:
    table: list[Row] = [("what", "nodes", "what it cost", "what came after")]
    with autoscaled_cluster() as cluster:
        laptop = cluster.hosts.add()
        try:
            train_and_sweep(cluster, laptop, table)
            serve_under_load(cluster, laptop, table)
        finally:
            print_table(capsys, table)


def train_and_sweep(cluster: Cluster, laptop: Host, table: list[Row]) -> None:
    """The whole recipe on nodes of the group cpu, and its sweep once more on those of the group gpu, without any."""
    assert not cluster.nodes
    queued_s = time.monotonic()
    job = run_recipe(cluster.hosts, laptop, "digits", *RECIPE)
    came_s = cluster.wait_until(lambda: bool(cluster.nodes), "node for a job that waits")
    began_s = job.wait_for(r"train \d+/\d+ loss")
    table.append(("a job is queued", f"the first came after {came_s - queued_s:.0f} s", "",
                  f"trains after {began_s - queued_s:.0f} s, on {cluster.describe()}"))  # fmt: skip

    job.wait_for(rf"train 1\d\d\d/{STEPS} loss")
    cluster.node_running("RayTrainWorker").kill()  # all of it at once, without a word
    lost_s = time.monotonic()
    resumed = job.wait_for_match(r"going on from step (\d+)", since=lost_s)
    last, after_s = job.last_step(before=resumed.at), job.wait_for(rf"train \d+/{STEPS} loss", since=resumed.at)
    again = last - int(resumed.found[1])

    swept_s = job.wait_for(r"sweep \d+/")
    came = [change.at - lost_s for change in cluster.changes if lost_s < change.at < swept_s and change.came]
    table.append(("a node is taken in training", f"another came after {came[0]:.0f} s" if came else "none came",
                  f"{again} steps again", f"trains after {after_s - lost_s:.0f} s"))  # fmt: skip
    control_s = job.wait_for(r"control \d+/", since=swept_s)
    at_once = cluster.most("cpu", since=swept_s, until=control_s)
    table.append(("four trials, two a node", f"{at_once} of cpu at a time", "", "as many trials"))
    job.finish()

    asked_s = time.monotonic()
    refused = run_recipe(cluster.hosts, laptop, "digits", *RECIPE, *WITH_GPUS)
    grown_s = cluster.wait_until(lambda: cluster.count("gpu") == MOST, "nodes for trials that want a GPU")
    ended_s = refused.wait_for(r"student \S+: host1: 1 GPUs are reserved here, and torch \S+ finds none")
    table.append(("trials of a GPU each", f"{MOST} of gpu after {grown_s - asked_s:.0f} s", "",
                  "refused in a line: torch finds no GPU there"))  # fmt: skip
    assert refused.process.wait(RECIPE_S) != 0
    gone_s = cluster.wait_until(lambda: not cluster.nodes, "end of nodes without work")
    table.append(("no job is left", f"all left after {gone_s - ended_s:.0f} s", "", f"nodes may idle {IDLE_S} s"))
    assert 0 <= again < 2 * INTERVAL  # the interval, and what was made while a checkpoint was written
    assert at_once == MOST


def serve_under_load(cluster: Cluster, laptop: Host, table: list[Row]) -> None:
    """The package, from nothing to one replica, and more of them while many ask."""
    asked_s = time.monotonic()
    sets = [word for each in SERVED for word in ("--set", each)]
    submit(cluster.hosts, laptop, "deploy", "digits/package", "--store", cluster.hosts.store, *sets).finish()
    table.append(("a package is deployed", cluster.describe(), "", f"answers after {time.monotonic() - asked_s:.0f} s"))
    with clients(cluster):
        began_s = time.monotonic()
        grown_s = cluster.wait_until(lambda: cluster.count("serve") == MOST, "node for a second replica")
        table.append((f"{CLIENTS} clients ask", f"{cluster.describe()} after {grown_s - began_s:.0f} s", "", ""))
    ended_s = time.monotonic()
    shrunk_s = cluster.wait_until(lambda: cluster.count("serve") == 1, "end of a node without replicas")
    table.append(("nobody asks", f"{cluster.describe()} after {shrunk_s - ended_s:.0f} s", "", ""))


@contextmanager
def clients(cluster: Cluster) -> Iterator[subprocess.Popen[str]]:
    """Ask the server as fast as it answers, from the host of the head."""
    asking = cluster.hosts.start(cluster.hosts.head, "python", "-c", CLIENT)
    try:
        yield asking
        assert asking.poll() is None, asking.communicate()[0]
    finally:
        cluster.hosts.end(asking)


def print_table(capsys: pytest.CaptureFixture[str], table: list[Row]) -> None:
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    with capsys.disabled():
        print()
        for row in table:
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
