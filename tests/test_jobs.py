"""`ray job submit` from a laptop to a cluster that demands a token, on hosts that share no disk; and the jobs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from finished import RECIPES
from hosts import REPOSITORY, Host, Hosts, hosts_up
from overproof.artifacts import Store
from overproof.cli import main
from overproof.config import load_recipe
from overproof.pipeline import stages_of
from submitted import run_recipe, submit

FEW = ("train.steps=2", "sweep.steps=2", "evaluate.timed_requests=20", "gate.rules=[{kind: parity, at_most: 1.0}]")
SHORT = {
    "digits": (
        "sweep.students=[{name: narrow, model: {kind: vit, hidden_size: 24, intermediate_size: 48, layers: 1, "
        "heads: 2, patch_size: 4}}]",
    ),
    "stdlib-lm": (
        "sweep.students=[{name: narrow, model: {kind: llama, hidden_size: 64, intermediate_size: 128, layers: 1, "
        "heads: 2, kv_heads: 2}}]",
        "tune={search: {kind: grid}}", "sweep.keep=1", "compress.formats=[q8_0]", "data.tokenizer.vocab_size=512",
        "train.validate_every=2", "sweep.validate_every=2", "cache.rows=64", "evaluate.max_documents=4",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A cluster of a head and two nodes."""
    with hosts_up() as up:
        up.start_head()
        for _ in range(2):
            up.add_node(cpus=4)
        yield up


@pytest.fixture(scope="module")
def laptop(hosts: Hosts) -> Host:
    return hosts.add()


@pytest.mark.parametrize("recipe", SHORT)
def test_a_recipe_runs_whole(recipe: str, hosts: Hosts, laptop: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """In short; among the trials are the recipes as they are, and hosts that are cut off."""
    run_recipe(hosts, laptop, recipe, *FEW, *SHORT[recipe]).finish()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    artifacts = [artifact for artifact in Store(hosts.store).artifacts() if artifact.record.recipe == recipe]
    stages = [stage.name for stage in stages_of(load_recipe(RECIPES / f"{recipe}.yaml"))]
    assert [artifact.record.stage for artifact in artifacts] == stages
    for artifact in artifacts:
        artifact.verify()


def test_a_job_with_bad_input_fails_with_the_reason(hosts: Hosts, laptop: Host) -> None:
    job = submit(hosts, laptop, "train", "jobs/recipes/digits.yaml", "--set", "train.steps=-1")
    job.wait_for(r"train\.steps: found -1")
    assert job.process.wait() != 0


def test_a_wrong_token_is_turned_away(hosts: Hosts, laptop: Host) -> None:
    command = ("ray", "job", "submit", "--address", hosts.dashboard, "--", "python", "jobs/run.py", "--help")
    job = hosts.start(laptop, *command, RAY_AUTH_TOKEN="0" * 32)
    said, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "oken" in said
    assert httpx.get(f"{hosts.dashboard}/api/jobs/", trust_env=False).status_code in (401, 403)


def test_a_job_takes_any_verb_wherever_it_starts() -> None:
    job = REPOSITORY / "jobs/run.py"
    done = subprocess.run([sys.executable, job, "--help"], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    for verb in (*main.STAGE_VERBS, "run", "plan", "serve"):
        assert f"\n    {verb} " in done.stdout
