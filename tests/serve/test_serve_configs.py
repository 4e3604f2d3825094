"""The Serve YAML of the repository, run as its comments say."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from overproof.config import Serve
from overproof.errors import InputError
from overproof.serve import server
from packing import copy, edit
from shared_server import wait_until

CONFIGS = Path(__file__).parents[2] / "serve_configs"
COMMAND = str(Path(sys.executable).parent / "serve")


pytestmark = pytest.mark.usefixtures("no_server")


def _config(name: str, package: Path, folder: Path) -> tuple[Path, str]:
    """The configuration with another package and port, and where it will answer."""
    tree = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tree["applications"][0]["args"]["port"] = port
    tree["applications"][0]["args"]["package"] = str(package)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path, f"http://127.0.0.1:{port}"


def _model(base: str) -> Any:
    try:
        reply = httpx.get(f"{base}/v1/models")
    except httpx.TransportError:
        return None
    return reply.json()["data"][0] if reply.status_code == 200 else None


@pytest.mark.trial
def test_serve_run_serves_until_interrupted(ray_cluster: str, text_package: Path, tmp_path: Path) -> None:
    path, base = _config("stdlib-lm", text_package.parent, tmp_path)  # the recipe's folder in the store
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen([COMMAND, "run", str(path)], env=os.environ | {"RAY_ADDRESS": ray_cluster},
                                   stdout=out, stderr=out)  # fmt: skip
    try:
        model = wait_until(lambda: _model(base) or (process.poll() is not None and pytest.fail(log.read_text())))
        assert model["id"] == "stdlib-lm"
        reply = httpx.post(
            f"{base}/v1/completions", json={"prompt": "import os\n", "max_tokens": 4, "logit_bias": {"0": -100}}
        )
        assert reply.json()["usage"]["completion_tokens"] == 4
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    wait_until(lambda: _model(base) is None)


def test_serve_deploy_serves_this_machine_and_refuses_the_unproven(
    ray_cluster: str, digits_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OVERPROOF_API_KEY", raising=False)
    dashboard = f"http://{ray._private.worker.global_worker.node.address_info['webui_url']}"
    path, base = _config("digits", digits_package, tmp_path)
    tree = yaml.safe_load(path.read_text())
    done = subprocess.run([COMMAND, "deploy", "-a", dashboard, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert wait_until(lambda: _model(base))["overproof"]["task"] == "image_classification"
    reply = httpx.post(f"{base}/v1/classify", json={"images": [[0.0] * 64]})
    assert 0 <= reply.json()["data"][0]["label"] < 10
    spoiled = copy(digits_package, tmp_path)
    edit(spoiled / "verdict.json", lambda verdict: verdict.update(passed=False, chosen=None))
    tree["applications"][0]["args"]["package"] = str(spoiled)
    ServeSubmissionClient(dashboard).deploy_applications(tree)
    failed = wait_until(lambda: (a := serve.status().applications["overproof"]).status == "DEPLOY_FAILED" and a)
    assert "has no passing verdict; only what passed its gate is served" in failed.message
    assert _model(base)["overproof"]["task"] == "image_classification"  # what was there goes on


def test_a_taken_port_is_refused_before_anything_starts(digits_package: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1:{port}"):
            server.start_serving(digits_package, Serve(port=port))
