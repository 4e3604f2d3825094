"""What Tune is given when it gives a trial up."""

from __future__ import annotations

from typing import Any

from distill_world import recipe_of
from ray.tune.search import Searcher

from overproof.config.search import TrialValues
from overproof.distill.optuna_study import STUDENT, OptunaStudy
from overproof.distill.tune_search import OptunaSearcher

BASE = {"kind": "vit", "hidden_size": 8, "intermediate_size": 16, "layers": 1, "heads": 2}


class Named:
    """As much of a job as the search looks at."""

    def __init__(self, name: str) -> None:
        self.name = name


def trials_of(given_up: set[str], room: int = 9) -> tuple[OptunaSearcher, list[str]]:
    students = [{"name": name, "temperature": 2.0, "model": BASE} for name in "ab"]
    recipe = recipe_of("digits", sweep={"students": students})
    begun: list[str] = []

    def begin(values: TrialValues) -> Any:
        begun.append(values[STUDENT])
        return Named(values[STUDENT])

    study = OptunaStudy(recipe.tune, recipe.sweep, 0)
    return OptunaSearcher(study, begin, given_up.__contains__, lambda: room), begun


def test_a_trial_is_chosen_when_there_is_room_for_it() -> None:
    trials, begun = trials_of(set(), room=1)
    assert trials.suggest("1")["job"].name == "a"
    assert trials.suggest("2") is None
    assert begun == ["a"]
    trials.on_trial_complete("1", result(2.0))
    assert trials.suggest("3")["job"].name == "b"


def result(loss: float) -> dict[str, Any]:
    return {"failed": None, "steps": 4, "validation_loss": loss}


def test_a_trial_lost_before_it_ran_is_proposed_again_as_the_same() -> None:
    trials, begun = trials_of(set())
    first = trials.suggest("1")["job"]
    trials.suggest("2")
    assert trials.suggest("3") is None  # one of the two may yet be lost
    trials.on_trial_complete("1", error=True)
    assert trials.suggest("4")["job"] is first
    trials.on_trial_complete("4", result(2.0))
    trials.on_trial_complete("2", result(1.0))
    assert trials.suggest("5") == Searcher.FINISHED
    assert begun == ["a", "b"]
    assert [trial.state.name for trial in trials.study.study.trials] == ["COMPLETE", "COMPLETE"]


def test_a_trial_given_up_for_good_is_told_as_failed() -> None:
    given_up: set[str] = set()
    trials, _ = trials_of(given_up)
    trials.suggest("1")
    trials.on_trial_complete("1", error=True)
    given_up.add("a")
    assert trials.suggest("2")["job"].name == "b"
    trials.on_trial_complete("2", result(1.0))
    assert trials.suggest("3") == Searcher.FINISHED
    assert [trial.state.name for trial in trials.study.study.trials] == ["FAIL", "COMPLETE"]
