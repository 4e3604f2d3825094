"""Several jobs of one cluster that want the same cache: real processes, a real object store."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from distill_world import capture, make, recipe_of, replica

from overproof.artifacts import Store, compute_fingerprint
from overproof.cluster.ray_cluster import cluster_lock
from overproof.distill.target_cache import TargetCache
from overproof.distill.teacher_pool import finished_files
from overproof.pipeline import STAGES

CAPTOR = str(Path(__file__).with_name("captor.py"))


def start(address: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, CAPTOR, address, *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_jobs_at_once_capture_once(ray_cluster: str, s3_uri: str, tmp_path: Path) -> None:
    world = make("digits", Store(s3_uri.replace("s3://", "s3://testing:testing@")))
    recipe, stage = recipe_of("digits", cache={"actors": 1}), next(s for s in STAGES if s.name == "cache")
    parents = {name: artifact.record.fingerprint for name, artifact in world.artifacts.items()}
    config = {"test": "together"}
    fingerprint = compute_fingerprint(stage.name, stage.format, config, parents)
    pickled = tmp_path / "arguments"
    pickled.write_bytes(pickle.dumps((config, fingerprint, parents, recipe, world.store, world.artifacts)))
    jobs = [start(ray_cluster, "make", str(pickled)) for _ in range(2)]
    said = [job.communicate(timeout=300)[0].splitlines() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    made = [json.loads(lines[-1]) for lines in said]
    assert made[0] == made[1]
    waited = [any("another job of this cluster is making it" in line for line in lines) for lines in said]
    took = [any("done by another job" in line for line in lines) for lines in said]
    assert sum(took) == 1
    assert not any(w and not t for w, t in zip(waited, took, strict=True))  # unless it came when all was done
    artifact = world.store.lookup(recipe.name, "cache", fingerprint)
    assert artifact is not None
    artifact.verify()
    ids = np.arange(artifact.record.metrics["rows"])
    alone = TargetCache(capture(world, None).local()).take(ids)
    for name, values in TargetCache(artifact.local()).take(ids).items():
        np.testing.assert_allclose(values, alone[name], rtol=1e-3, atol=1e-4)


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
        assert said == ["a thing: another job of this cluster is making it; waiting for it"]
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
    names = sorted(path.name for path in Path(first.job.uri).iterdir())
    assert names == [index.files[0].path, f"{index.files[0].path}.json"]
