"""`ray job submit` against a real head node that demands a token, and the jobs themselves."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from overproof.artifacts import Store
from overproof.cli import main

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
START_S, JOB_S = 60, 240


@dataclass(frozen=True)
class Head:
    """A running head node: its dashboard, and the environment that holds its token."""

    url: str
    environment: dict[str, str]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head", numbered=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    port, agent = _free_port(), _free_port()
    command = [
        "ray", "start", "--head", "--block", "--port", str(_free_port()), "--dashboard-port", str(port),
        "--ray-client-server-port", str(_free_port()), "--num-cpus", "4", "--object-store-memory", str(200 << 20),
        "--dashboard-agent-listen-port", str(agent), "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    bearer = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    needed = (f"{url}/api/jobs/", f"http://127.0.0.1:{agent}/api/local_raylet_healthz")  # a job is started by the agent
    while True:
        try:
            if all(httpx.get(each, headers=bearer).status_code == 200 for each in needed):
                break
        except httpx.TransportError:
            pass
        assert process.poll() is None, (folder / "head.log").read_text()
        assert time.monotonic() < deadline, (folder / "head.log").read_text()
        time.sleep(0.3)
    yield Head(url, environment)
    started = psutil.Process(process.pid)
    for each in (started, *started.children(recursive=True)):  # asked politely, it takes half a minute
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait(timeout=60)


def _submit(head: Head, *entrypoint: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = head.environment | ({"RAY_AUTH_TOKEN": token} if token else {})
    return subprocess.run(
        ["ray", "job", "submit", "--address", head.url, "--working-dir", ".", "--", *entrypoint],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=JOB_S, check=False,
    )  # fmt: skip


def test_a_submitted_job_trains_and_leaves_its_artifacts(head: Head, tmp_path: Path) -> None:
    overrides = ("--set", f"store={tmp_path}", "--set", "train.steps=2", "--set", "train.workers=1")
    done = _submit(head, "python", "jobs/run.py", "train", "jobs/recipes/digits.yaml", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    artifacts = Store(str(tmp_path)).artifacts()
    assert [a.record.stage for a in artifacts] == ["prepare", "train"]
    for artifact in artifacts:
        artifact.verify()
    assert (artifacts[1].local() / "model/model.safetensors").is_file()


def test_a_job_with_bad_input_fails_with_the_reason(head: Head, tmp_path: Path) -> None:
    done = _submit(head, "python", "jobs/run.py", "train", "jobs/recipes/digits.yaml", "--set", "train.steps=-1")
    assert done.returncode != 0
    assert "train.steps: found -1" in done.stdout + done.stderr


def test_a_wrong_token_is_turned_away(head: Head) -> None:
    done = _submit(head, "python", "jobs/run.py", "plan", "jobs/recipes/digits.yaml", token="0" * 32)
    assert done.returncode != 0
    assert httpx.get(f"{head.url}/api/jobs/").status_code in (401, 403)


def test_a_job_takes_any_verb_wherever_it_starts() -> None:
    job = REPOSITORY / "jobs/run.py"
    done = subprocess.run([sys.executable, job, "--help"], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    for verb in (*main.STAGE_VERBS, "run", "plan", "serve"):
        assert f"\n    {verb} " in done.stdout
