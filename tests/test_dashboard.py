"""TensorBoard shows every trial with its settings and its losses, and the cluster's own dashboard is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from finished import RECIPES, Run
from overproof.cli.dashboard import link_newest
from overproof.cli.main import main
from overproof.config.search import varying_values

START_S = 90


def ignore_sigint() -> None:
    """As in what shells start in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def board(log: Path, *argv: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The running command and what it says."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "overproof.cli.main", "dashboard", *argv, "--port", "0"]
    with log.open("w") as said:
        process = subprocess.Popen(
            command, env=inherited | environment, stdout=said, stderr=said, preexec_fn=ignore_sigint
        )
    try:
        deadline = time.monotonic() + START_S
        while "until Ctrl-C" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def ask(base: str, path: str, **body: Any) -> Any:
    return httpx.post(f"{base}data/plugin/hparams/{path}", json=body, timeout=30).raise_for_status().json()


def test_both_dashboards_answer_and_the_trials_are_there(digits: Run, ray_cluster: str, tmp_path: Path) -> None:
    argv = (str(RECIPES / "digits.yaml"), "--set", f"store={digits.recipe.store}")
    with board(tmp_path / "log", *argv, RAY_ADDRESS=ray_cluster) as (process, said):
        base = re.search(r"TensorBoard +(http://127\.0\.0\.1:\d+/)", said)
        ray = re.search(r"Ray +(http://\S+)", said)
        assert base is not None, said
        assert ray is not None, said
        assert httpx.get(base[1]).status_code == 200
        assert httpx.get(ray[1]).status_code == 200

        names = {*(student.name for student in digits.recipe.sweep.students), "control"}
        experiment = ask(base[1], "experiment", experimentName="")
        shown = {each["name"] for each in experiment["hparamInfos"]}
        assert shown == varying_values(digits.recipe.sweep, digits.recipe.tune) | {"status"}
        assert {"temperature", "hidden_size", "teacher_weight"} <= shown
        assert "batch_size" not in shown  # the same in all
        asked = {
            "experimentName": "",
            "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_FAILURE"],
            "colParams": [{"hparam": "temperature", "includeInResult": True}],
            "startIndex": 0,
            "sliceSize": 99,
        }
        groups = ask(base[1], "session_groups", **asked)["sessionGroups"]
        shown = {group["sessions"][0]["name"].rpartition("/")[2]: group for group in groups}
        assert set(shown) == names
        swept = json.loads((digits.artifacts["sweep"].local() / "trials.json").read_text())
        for trial in (*swept["trials"], swept["control"]):
            group = shown[trial["name"]]
            metrics = {m["name"]["tag"]: m["value"] for m in group["metricValues"]}
            assert metrics["validation_loss"] == pytest.approx(trial["validation_loss"], rel=1e-6)
            assert group["hparams"]["temperature"] == trial["temperature"]
        tags = httpx.get(f"{base[1]}data/plugin/scalars/tags", timeout=30).json()
        assert {run.rpartition("/")[2]: set(tags[run]) for run in tags if "train-" not in run} == {
            name: {"loss", "validation_loss"} for name in names
        }

        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(base[1])


def test_without_a_cluster_it_says_so(digits: Run, tmp_path: Path) -> None:
    with board(tmp_path / "log", "--store", digits.recipe.store) as (_, said):
        assert "no cluster to look at" in said


def test_a_store_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", "--store", str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["dashboard", "--store", "s3://bucket/store?region=us-east-1"]) == 2
    assert "expected a local store" in capsys.readouterr().err


def test_of_a_recipe_the_newest_sweep_is_shown_and_a_running_one_takes_its_place(tmp_path: Path) -> None:
    root, links = tmp_path / "store/recipe", tmp_path / "links"
    links.mkdir()
    root.mkdir(parents=True)

    def write(folder: str, time_s: int) -> None:
        (root / folder / "events/wide").mkdir(parents=True)
        os.utime(root / folder / "events", (time_s, time_s))

    def shown() -> set[str]:
        link_newest(root, links)
        return {link.name for link in links.iterdir() if (link / "wide").is_dir()}

    assert shown() == set()
    write("train-1", 50)
    write("sweep-1", 100)
    write("sweep-2", 200)
    assert shown() == {"train-1", "2"}
    write("sweep.work", 300)
    assert shown() == {"train-1", "running"}
    write("sweep-3", 400)
    shutil.rmtree(root / "sweep.work")
    assert shown() == {"train-1", "3"}
    shutil.rmtree(root / "sweep-3")
    assert shown() == {"train-1", "2"}
