"""The whole loop: killed at every stage, and from source code to a streamed answer by the command alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from finished import RECIPES
from overproof.artifacts import Store
from overproof.config import load_recipe
from overproof.export.stage import read_exports
from overproof.pipeline import stages_of

pytestmark = pytest.mark.trial

DIGITS = str(RECIPES / "digits.yaml")
NAMES = tuple(stage.name for stage in stages_of(load_recipe(DIGITS)))
STAGE_S = 240


def _command(verb: str, recipe: str, *overrides: str) -> list[str]:
    sets = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, "-m", "overproof.cli.main", verb, recipe, *sets]


def _own_ray() -> dict[str, str]:
    """An environment in which a command starts a cluster of its own."""
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}


def test_killed_at_any_stage_only_that_stage_is_lost(ray_cluster: str, tmp_path: Path) -> None:
    """On a cluster that stays, where the next run meets what the last one left; and once with the run's own cluster."""
    shared = os.environ | {"RAY_ADDRESS": ray_cluster}
    few = ("train.steps=30", "sweep.steps=30", "tune.scheduler.grace_steps=10", "evaluate.timed_requests=20",
           "gate.rules.3.at_least=0.5")  # fmt: skip
    command = _command("run", DIGITS, f"store={tmp_path}", *few)
    finished: dict[str, str] = {}
    for stage in ("prepare", "train", "cache", "sweep", "compress", "evaluate"):
        process = subprocess.Popen(
            command,
            env=_own_ray() if stage == "sweep" else shared,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + STAGE_S
        while not list(tmp_path.glob(f"digits/{stage}-*")):
            assert process.poll() is None, f"ended before {stage}"
            assert time.monotonic() < deadline, f"never reached {stage}"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        found = {a.record.stage: a.record.created for a in Store(str(tmp_path)).artifacts()}
        assert set(found) >= set(NAMES[: NAMES.index(stage)])
        assert {name: created for name, created in found.items() if name in finished} == finished
        finished = found
    done = subprocess.run(command, env=shared, capture_output=True, text=True, check=False, timeout=STAGE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == len(finished)
    for artifact in Store(str(tmp_path)).artifacts():
        artifact.verify()


def test_the_language_model_from_source_code_to_a_streamed_answer(tmp_path: Path) -> None:
    """The demo with smaller models and fewer steps: every stage is real, and the answer comes over HTTP."""
    shape = "kind: llama, intermediate_size: 192, layers: 1"
    overrides = (
        f"store={tmp_path}", "serve.port=0", "data.tokenizer.vocab_size=1024",
        f"train.model={{{shape}, hidden_size: 128, heads: 4, kv_heads: 4}}",
        "train.steps=32", "train.validate_every=16",
        f"sweep.students=[{{name: deep, model: {{{shape}, hidden_size: 64, heads: 2, kv_heads: 2}}}},"
        f" {{name: wide, model: {{{shape}, hidden_size: 96, heads: 3, kv_heads: 3}}}}]",
        "sweep.steps=20", "sweep.validate_every=10", "sweep.keep=1", 
        "tune.scheduler.grace_steps=10", "tune.search={kind: tpe, trials: 4, startup_trials: 2}",
        "evaluate.max_documents=4", "evaluate.timed_requests=10",
        "gate.rules=[{kind: smaller, against: teacher, at_least: 2}, {kind: parity, at_most: 0.5}]",
    )  # fmt: skip
    command = [*_command("demo", str(RECIPES / "stdlib-lm.yaml"), *overrides), "--keep"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=_own_ray(), stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 3 * STAGE_S
        while "until Ctrl-C" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        said = (tmp_path / "log").read_text()
        curl = next(line for line in said.splitlines() if line.startswith("curl "))
        streamed = subprocess.run(curl, shell=True, capture_output=True, text=True, check=True, timeout=60).stdout
        events = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        text = "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])
        assert text
        assert len(events) > 3
        base = curl.split()[2].removesuffix("/v1/completions")
        assert httpx.get(f"{base}/healthz").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
        (compressed,) = (tmp_path / "stdlib-lm").glob("compress-*")
        for export in read_exports(compressed):
            assert f"│ {export.name} " in said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
