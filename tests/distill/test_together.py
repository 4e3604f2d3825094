"""Several jobs of one cluster that want the same thing: real processes. Two whole captures are among the trials."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from distill_world import replica

from overproof.cluster.ray_cluster import cluster_lock
from overproof.distill.teacher_pool import finished_files

CAPTOR = str(Path(__file__).with_name("captor.py"))


def start(address: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, CAPTOR, address, *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_job_that_is_killed_leaves_its_place(ray_cluster: str) -> None:
    holder = start(ray_cluster, "hold")
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        print("0", file=holder.stdin, flush=True)

    with cluster_lock("here", "a thing", say), cluster_lock("elsewhere", "a thing", say):
        assert said == ["a thing: another job of this cluster is making it; waiting for it (0 s)"]
        assert holder.wait(timeout=60) < 0
    with cluster_lock("here", "a thing", say):
        pass


def test_two_captures_of_one_file_at_the_same_time_end_as_one(digits_world: Any) -> None:
    """As two clusters may: each writes to a name of its own, and the file is whole whenever one looks."""
    first, index = replica(digits_world, 200)
    second, _ = replica(digits_world, 200)
    second.job = first.job
    writers = [teacher({"file": np.array([0])}) for teacher in (first, second)]
    reports = [[next(writer)] for writer in writers]
    assert not finished_files(first.job)
    for report, writer in zip(reports, writers, strict=True):
        report.extend(writer)
        assert list(finished_files(first.job)) == [index.files[0].path]
    assert not any(part["fault"][0] for report in reports for part in report)
    draft = first.job.draft
    assert [path.name for path in Path(draft.uri).iterdir()] == [index.files[0].path]
    assert [path.name for path in Path(draft.marks).iterdir()] == [f"{index.files[0].path}.json"]
