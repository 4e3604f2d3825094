"""A sweep whose trials, and whose driver, are killed for real."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from distill_world import World
from ray._private.state import actors
from test_sweep import STEPS, SWEEP, job_of

from overproof.artifact import Artifact
from overproof.distill.student import Chunk, Run
from overproof.distill.sweep import jobs, sweep
from overproof.errors import InputError
from overproof.progress import NOTICE
from overproof.stage import Context


def to_end(run: Run) -> list[Chunk]:
    chunks = [run.advance()]
    while chunks[-1].steps < STEPS:
        chunks.append(run.advance())
    return chunks


@pytest.fixture(scope="module")
def whole_curves(digits_world: World, digits_cache: Artifact) -> dict[str, list[str]]:
    """Of every student, trained alone to the end."""
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP)
    chunks = {job.name: to_end(Run(job_of(context, job.name))) for job in jobs(context)}
    return {name: [json.dumps(row) for chunk in of for row in chunk.curve] for name, of in chunks.items()}


def curves(folder: Path) -> dict[str, list[str]]:
    files = (folder / "curves").glob("*.jsonl")
    return {path.stem: path.read_text().splitlines() for path in files if path.stem != "control"}


def same_steps(found: dict[str, list[str]], expected: dict[str, list[str]]) -> bool:
    """Whether each curve begins as the other one does, to the last bit; where trials are stopped may differ."""
    assert found.keys() == expected.keys()
    both = {name: min(len(found[name]), len(expected[name])) for name in found}
    return all(found[name][:n] == expected[name][:n] and n for name, n in both.items())


def test_a_student_goes_on_from_its_checkpoint_to_the_last_bit(digits_world: World, digits_cache: Artifact) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP)
    whole, job = Run(job_of(context, "wide")), job_of(context, "wide")
    expected = to_end(whole)
    first = Run(job)
    done = [first.advance() for _ in range(3)]
    first.saver.wait()
    second = Run(job)
    assert second.began_at == done[-1].steps
    assert to_end(second) == expected
    assert all(a.equal(b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))
    second.saver.wait()
    third = Run(job)
    assert third.began_at == STEPS
    assert to_end(third) == expected
    assert third.seconds == second.seconds


def test_a_damaged_checkpoint_is_not_used(digits_world: World, digits_cache: Artifact) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP)
    job = job_of(context, "wide")
    first = Run(job)
    done = [first.advance() for _ in range(3)]
    first.saver.wait()
    state = Path(job.checkpoints.all()[-1].uri) / "state.pt"
    state.write_bytes(state.read_bytes()[:-9])
    second = Run(job)
    assert second.began_at == done[1].steps
    assert "state.pt has" in second.faults[0]


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_whose_process_is_killed_goes_on(whole_curves: dict[str, list[str]], digits_world: World,
                                                 digits_cache: Artifact) -> None:  # fmt: skip
    killed: list[int] = []
    said: list[str] = []

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        if task == NOTICE:
            said.append(note)
        if task == "sweep" and done >= STEPS and not killed:
            alive = [a for a in actors().values() if a["State"] == "ALIVE" and "Trainable" in a["ActorClassName"]]
            killed.append(alive[0]["Pid"])
            os.kill(killed[0], signal.SIGKILL)

    context = digits_world.context("sweep", progress, digits_cache, sweep=SWEEP)
    metrics = sweep(context)
    assert killed
    assert metrics["failed"] == 0
    assert same_steps(curves(Path(context.draft.uri)), whole_curves)


def test_a_sweep_whose_driver_is_killed_trains_no_student_twice(
    ray_cluster: str, whole_curves: dict[str, list[str]], digits_world: World, digits_cache: Artifact, tmp_path: Path
) -> None:
    said: list[str] = []

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        if task == NOTICE:
            said.append(note)

    context = digits_world.context("sweep", progress, digits_cache, sweep=SWEEP)
    pickled = tmp_path / "context"
    pickled.write_bytes(pickle.dumps(dataclasses.replace(context, progress=None)))
    script = Path(__file__).with_name("sweep_driver.py")
    driver = [sys.executable, str(script), ray_cluster, str(pickled), str(2 * STEPS)]
    assert subprocess.run(driver, capture_output=True).returncode == -signal.SIGKILL
    before = {job.name: job.checkpoints.committed() for job in jobs(context)}
    assert max(before.values()) == STEPS
    again = digits_world.store.begin(  # as the pipeline makes it: the unfinished draft is emptied, its workspace stays
        context.draft.recipe, "sweep", context.draft.fingerprint, context.draft.config, context.draft.parents
    )
    sweep(dataclasses.replace(context, draft=again))
    trials = json.loads((Path(again.uri) / "trials.json").read_text())["trials"]
    assert {trial["name"]: trial["began_at"] for trial in trials} == before
    assert all(f"{name}: going on from step {step}" in said for name, step in before.items() if step)
    assert same_steps(curves(Path(again.uri)), whole_curves)


def test_a_changed_sweep_does_not_go_on_from_anothers_trials(digits_world: World, digits_cache: Artifact) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep=SWEEP)
    job = jobs(context)[0]
    job.checkpoints.begin()
    first = Run(job)
    first.advance()
    first.saver.wait()
    draft = digits_world.store.begin(context.draft.recipe, "sweep", "f" * 64, {"number": "other"}, {})
    changed = Context(context.recipe, context.parents, draft, context.progress)
    with pytest.raises(InputError, match=r"unfinished training, at step 7, whose recipe differs: number \d+, now"):
        sweep(changed)
