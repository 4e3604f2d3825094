"""Two jobs of one cluster that want the same cache: real processes, a real object store."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from distill_world import capture, make, recipe_of
from test_together import start

from overproof.artifacts import Store, compute_fingerprint
from overproof.distill.target_cache import TargetCache
from overproof.pipeline import STAGES

pytestmark = pytest.mark.trial


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
    names = [f"0000{number}.parquet" for number in range(3)]
    assert sorted(artifact.record.files) == [*names, "cache.json"]
    assert artifact.record.metrics["positions"] == artifact.record.metrics["rows"]
    ids = np.arange(artifact.record.metrics["rows"])
    alone = TargetCache(capture(world, None).local()).take(ids)
    for name, values in TargetCache(artifact.local()).take(ids).items():
        np.testing.assert_allclose(values, alone[name], rtol=1e-3, atol=1e-4)
