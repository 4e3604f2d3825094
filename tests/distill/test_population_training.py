"""Population-based training: weights and settings that go from trial to trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distill_world import World, jobs, recipe_of
from hypothesis import given
from hypothesis import strategies as st
from test_sweep import STEPS, STUDENTS, SWEEP, WIDE

from overproof.artifacts import Artifact
from overproof.config import Space
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep import train_students
from overproof.distill.sweep_state import SweepState
from overproof.distill.sweep_tracker import SweepTracker
from overproof.distill.tune_search import perturbed
from overproof.errors import InputError

RATES = {"kind": "log_uniform", "low": 1e-8, "high": 3e-2}
LEARNER = {**STUDENTS[0], "model": {**WIDE, "initializer_range": 0.2}}
POPULATION = {
    "space": {"learning_rate": {"kind": "choice", "values": [1e-8, 3e-2]}},
    "scheduler": {"kind": "pbt", "interval_steps": 4, "quantile": 0.5},
}
ALONE = {**SWEEP, "students": [LEARNER], "validate_every": 4}


@given(st.integers(0, 2**32), st.floats(1e-8, 3e-2), st.sampled_from([0.25, 0.5, 0.75]))
def test_what_is_explored_stays_in_its_domain_and_moves(seed: int, rate: float, weight: float) -> None:
    weights = {"kind": "choice", "values": [0.25, 0.5, 0.75]}
    space = Space.parse({"learning_rate": RATES, "teacher_weight": weights})
    random, before = np.random.default_rng(seed), {"learning_rate": rate, "teacher_weight": weight}
    found = [perturbed(before, space, random) for _ in range(20)]
    assert all(1e-8 <= values["learning_rate"] <= 3e-2 and values["teacher_weight"] in (0.25, 0.5, 0.75)
               for values in found)  # fmt: skip
    assert len({values["learning_rate"] for values in found}) > 1
    assert perturbed(before, space, np.random.default_rng(seed)) == perturbed(
        before, space, np.random.default_rng(seed)
    )


def test_a_trial_goes_on_from_anothers_state_with_its_own_settings(
    digits_world: World, digits_cache: Artifact, tmp_path: Path
) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep=ALONE)
    donor = StudentTrainer(jobs(context)[0])
    while donor.run_to_validation().steps < STEPS // 2:
        pass
    donor.write_state(tmp_path)
    same, other = (
        StudentTrainer(jobs(digits_world.context("sweep", cached=digits_cache, sweep=ALONE))[0].with_values(values))
        for values in ({}, {"learning_rate": 1e-3, "weight_decay": 0.0, "beta2": 0.5})
    )
    same.load_state(tmp_path)
    other.load_state(tmp_path)
    assert {group["betas"] for group in other.engine.optimizer.param_groups} == {(0.9, 0.5)}
    expected, found, changed = donor.run_to_validation(), same.run_to_validation(), other.run_to_validation()
    assert found == expected
    assert changed.curve[0]["loss"] == expected.curve[0]["loss"]  # the same weights and rows
    assert changed.curve[0]["learning_rate"] == pytest.approx(expected.curve[0]["learning_rate"] / 20)
    assert changed.validation_loss != expected.validation_loss


@pytest.mark.trial
@pytest.mark.usefixtures("ray_cluster")
def test_the_worst_take_over_from_the_best(digits_world: World, digits_cache: Artifact, tmp_path: Path) -> None:
    context = digits_world.context("sweep", cached=digits_cache, sweep=ALONE, tune=POPULATION)
    tracker = SweepTracker(context.progress, STEPS, 2, 0, tmp_path)
    trials = [tracker.trial_entry(job) for job in train_students(context, SweepState(context.draft), {}, tracker, None)]
    assert [(trial["status"], trial["reason"]) for trial in trials] == [("finished", None)] * 2
    first = [tracker.read_curve(trial["name"])[0]["learning_rate"] for trial in trials]
    assert sorted(first) == pytest.approx([1e-8 / 5, 3e-2 / 5])  # of the first step of a warm-up of 4
    # The one that learned nothing by itself would stay at 2.8.
    assert max(trial["validation_loss"] for trial in trials) < 2.3
    assert not list(Path(context.draft.workspace).glob("tune-*"))


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"space": {}}, "space names none; expected some of learning_rate"),
        (
            {"space": {"learning_rate": RATES}, "search": {"kind": "random", "trials": 5}},
            "5 trials must run at the same time, and .* is 2",
        ),
        ({"space": {"layers": {"kind": "choice", "values": [1, 2]}}}, "space names layers; expected some of"),
    ],
)
def test_a_population_that_cannot_be_is_refused(tune: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipe_of("digits", sweep=ALONE, tune={**POPULATION, **tune})
    two = [LEARNER, {**STUDENTS[3], "name": "narrow"}]
    with pytest.raises(InputError, match="students need the same model"):
        recipe_of("digits", sweep={"students": two}, tune=POPULATION)
