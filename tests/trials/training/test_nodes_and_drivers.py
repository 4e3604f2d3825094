"""Nodes that are killed, join and are drained under a training; workers and drivers that are killed: on real nodes.

The suite moves nodes once (``test_elastic.py``) and kills ranks without Ray (``test_resume.py``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.trial

HERE, TRAIN = Path(__file__).parent, Path(__file__).parents[2] / "train"
RECIPE = Path(__file__).parents[3] / "jobs/recipes/digits.yaml"
TOLERANCE = 1e-5


def _python(*arguments: str) -> str:
    paths = (str(TRAIN), *filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        | {"OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("elastic")
    _python(str(HERE / "cluster_runs.py"), str(folder))
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same trainings, never interrupted, on two workers, without Ray."""
    folder = tmp_path_factory.mktemp("whole")
    _python(str(HERE / "cluster_runs.py"), str(folder), "cases")
    _python(str(TRAIN / "resume_ranks.py"), str(folder), (folder / "cases.json").read_text())
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def values(result: dict[str, Any], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in result["rows"] if key in row]


@pytest.mark.parametrize("key", ["loss", "grad_norm", "learning_rate", "validation_loss"])
def test_kills_of_a_worker_the_controller_and_the_driver_leave_no_trace(
    ran: dict[str, Any], whole: dict[str, Any], key: str
) -> None:
    """Rows are those of the plan, or a worker refuses; equal to the last bit, none was lost or came twice."""
    found, expected = (values(each["killed"], key) for each in (ran, whole))
    assert [(step, value.hex()) for step, value in found] == [(step, value.hex()) for step, value in expected]
    assert found


def test_a_kill_costs_no_more_than_the_steps_since_the_last_checkpoint(ran: dict[str, Any]) -> None:
    for before, after in ran["killed"]["steps"].values():
        assert after == before // 10 * 10 + 1
    assert any("a worker died" in event["text"] and event["step"] == 10 for event in ran["killed"]["resumed"])


def test_a_run_whose_controller_is_killed_ends_and_says_what_to_do(ran: dict[str, Any]) -> None:
    assert ran["killed"]["ended_with_the_controller"] != 0
    assert "run again: training goes on from step 20" in ran["killed"]["errors"]


def test_workers_go_with_their_driver_on_a_cluster_that_stays(ran: dict[str, Any]) -> None:
    assert ran["killed"]["workers_of_dead_driver_gone"]


def test_a_killed_node_leaves_fewer_workers(ran: dict[str, Any]) -> None:
    before, after = ran["moved"]["steps"]["node"]
    assert after == before // 10 * 10 + 1


def test_a_node_that_joins_is_used_from_a_checkpoint_made_for_it(ran: dict[str, Any]) -> None:
    last, first = ran["moved"]["steps"]["join"]
    assert first == last + 1


def test_a_drained_node_is_left_at_the_next_step(ran: dict[str, Any]) -> None:
    last, first = ran["moved"]["steps"]["drain"]
    assert first == last + 1
    assert ran["moved"]["drained_is_left"]
    resumed = ran["moved"]["resumed"][-1]
    assert resumed["step"] == last
    assert f"checkpoint of step {last} committed" in resumed["text"]


def test_other_numbers_of_workers_train_the_same(ran: dict[str, Any], whole: dict[str, Any]) -> None:
    for key in ("loss", "validation_loss"):
        found, expected = (values(each["moved"], key) for each in (ran, whole))
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert max(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True)) < TOLERANCE


def test_twenty_kills_change_not_one_bit() -> None:
    sets = ("--set", "train.steps=240", "--set", "train.checkpoint.every_steps=8")
    lines = _python("-m", "overproof.cli.main", "prove", "resume", str(RECIPE), "--kills", "20", *sets).splitlines()
    assert sum("kill -9 of worker" in line for line in lines) == 20
    assert "proven: 20 kills, and nothing differs" in lines


def test_nodes_that_die_and_join_change_no_more_than_rounding() -> None:
    small = ("train.steps=150", "train.batch_size=48", "train.learning_rate=2e-4", "train.checkpoint.every_steps=20")
    sets = [part for value in small for part in ("--set", value)]
    lines = _python("-m", "overproof.cli.main", "prove", "elastic", str(RECIPE), *sets).splitlines()
    assert any(line.startswith("a node died") and "3 to 2" in line for line in lines)
    assert any(line.startswith("a node joined") and "2 to 3" in line for line in lines)
    assert "proven: losses within 1e-05, every row as planned" in lines
