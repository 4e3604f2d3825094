"""What trials a search proposes, what it learns, and which spaces are refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from distill_world import recipe_of
from hypothesis import given, settings
from hypothesis import strategies as st

from overproof.config import Recipe
from overproof.config.search import TrialValues, apply_values, current_values
from overproof.distill import optuna_study
from overproof.distill.optuna_study import STUDENT, OptunaStudy, _least_dominated
from overproof.errors import InputError

BASE = {"kind": "vit", "hidden_size": 8, "intermediate_size": 16, "layers": 1, "heads": 2}
STUDENTS = [{"name": "a", "temperature": 2.0, "model": BASE}, {"name": "b", "temperature": 2.0, "model": BASE}]
RATE = {"kind": "log_uniform", "low": 1e-4, "high": 1e-1}


def searching(**tune: Any) -> Recipe:
    return recipe_of("digits", sweep={"students": STUDENTS}, tune=tune)


def study_of(recipe: Recipe, before: tuple[TrialValues, ...] = ()) -> OptunaStudy:
    return OptunaStudy(recipe.tune, recipe.sweep, recipe.seed, before)


def result(loss: float, **more: float) -> dict[str, float]:
    return {"validation_loss": loss, **more}


def everything(study: OptunaStudy) -> list[TrialValues]:
    found = []
    while (values := study.ask(str(len(found)))) is not None:
        found.append(values)
    return found


def test_without_a_space_the_students_are_the_trials() -> None:
    recipe = searching()
    assert recipe.tune.trials(recipe.sweep) == 2
    assert everything(study_of(recipe)) == [{STUDENT: "a"}, {STUDENT: "b"}]


def test_a_grid_has_every_combination_once() -> None:
    space = {"layers": {"kind": "integers", "low": 1, "high": 3}, "beta2": {"kind": "choice", "values": [0.95, 0.99]}}
    recipe = searching(space=space)
    found = everything(study_of(recipe))
    assert len(found) == recipe.tune.trials(recipe.sweep) == 12
    assert {(v[STUDENT], v["layers"], v["beta2"]) for v in found} == {
        (name, layers, beta) for name in "ab" for layers in (1, 2, 3) for beta in (0.95, 0.99)
    }
    rest = everything(study_of(recipe, tuple(found[5:7])))
    assert rest[:2] == found[5:7]
    assert sorted(map(str, rest)) == sorted(map(str, found))


@pytest.mark.parametrize("search", [{"kind": "grid"}, {"kind": "tpe", "trials": 6, "startup_trials": 2}])
def test_widths_of_stages_are_searched_and_found_again_in_a_journal(search: dict[str, Any]) -> None:
    """JSON gives tuples back as lists."""
    resnet = {"kind": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    pruned = {"kind": "pruned", "hidden_sizes": [8, 8]}
    widths = [(4, 8), (4, 16), (8, 12)]
    recipe = recipe_of(
        "digits", train={"model": resnet}, sweep={"students": [{"name": "a", "temperature": 2.0, "model": pruned}]},
        tune={"space": {"hidden_sizes": {"kind": "choice", "values": widths}}, "search": search},
    )  # fmt: skip
    whole = everything(study_of(recipe))
    assert sorted(values["hidden_sizes"] for values in whole) == widths
    for values in json.loads(json.dumps(whole)):
        _, student = apply_values(recipe.sweep, recipe.sweep.students[0], values)
        assert current_values(recipe.sweep, student)["hidden_sizes"] == tuple(values["hidden_sizes"])
    rest = everything(study_of(recipe, tuple(json.loads(json.dumps(whole[:2])))))
    assert rest[:2] == whole[:2]
    assert sorted(map(str, rest)) == sorted(map(str, whole))


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(["random", "tpe"]))
def test_what_is_proposed_lies_in_the_space_and_makes_a_trial(seed: int, kind: str) -> None:
    space = {
        "learning_rate": RATE,
        "weight_decay": {"kind": "uniform", "low": 0.0, "high": 0.5},
        "heads": {"kind": "choice", "values": [1, 2, 4]},
        "hidden_size": {"kind": "integers", "low": 4, "high": 16, "step": 4},
        "divergence": {"kind": "choice", "values": ["forward_kl", "jsd"]},
    }
    recipe = searching(space=space, search={"kind": kind, "trials": 12})
    study, found = OptunaStudy(recipe.tune, recipe.sweep, seed), []
    while (values := study.ask(str(len(found)))) is not None:
        found.append(values)
        changed, student = apply_values(recipe.sweep, recipe.sweep.students[0], values)
        assert 1e-4 <= changed.learning_rate <= 1e-1
        assert student.model.hidden_size in (4, 8, 12, 16)  # type: ignore[union-attr]
        assert {**current_values(changed, student), STUDENT: values[STUDENT]}.items() >= values.items()
        study.tell(str(len(found) - 1), result(float(len(found))))
    assert len(found) == 12


def test_a_search_is_a_function_of_its_seed_and_of_what_it_is_told() -> None:
    recipe = searching(space={"learning_rate": RATE}, search={"kind": "tpe", "trials": 14})

    def run(before: tuple[TrialValues, ...] = ()) -> list[TrialValues]:
        study, found = study_of(recipe, before), list[TrialValues]()
        while (values := study.ask("x")) is not None:
            found.append(values)
            study.tell("x", result(abs(values["learning_rate"] - 0.01)))
        return found

    whole = run()
    assert run() == whole
    assert run(tuple(whole[:9])) == whole


def test_a_search_that_forgets_goes_on_alike_and_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna_study, "REMEMBERED", 12)
    monkeypatch.setattr(optuna_study, "BEST", 4)
    recipe = searching(space={"learning_rate": RATE}, search={"kind": "tpe", "trials": 60, "startup_trials": 5})

    def run(before: tuple[TrialValues, ...] = ()) -> tuple[list[TrialValues], OptunaStudy]:
        """Two trials at a time, each told as the next is asked for."""
        study, found = study_of(recipe, before), list[TrialValues]()
        while (values := study.ask(str(len(found)))) is not None:
            found.append(values)
            if len(found) > 1:
                study.tell(str(len(found) - 2), result(abs(found[-2]["learning_rate"] - 0.01)))
        study.tell(str(len(found) - 1), result(abs(found[-1]["learning_rate"] - 0.01)))
        return found, study

    whole, study = run()
    losses = sorted(abs(values["learning_rate"] - 0.01) for values in whole)
    kept = [trial.value for trial in study.study.trials]
    assert len(kept) < 24
    assert set(losses[:4]) <= set(kept)
    assert study.study.best_value == losses[0]
    assert run(tuple(whole[:50]))[0] == whole


def test_of_several_objectives_those_stay_that_few_are_better_than() -> None:
    values = np.array([[3.0, 1.0], [1.0, 3.0], [3.0, 3.0], [2.0, 2.0], [4.0, 4.0], [2.0, 2.0]])
    assert _least_dominated(values) == [0, 1, 3, 5, 2, 4]
    assert _least_dominated(values[:, :1]) == [1, 3, 5, 0, 2, 4]


@pytest.mark.parametrize("kind", ["random", "tpe"])
@pytest.mark.parametrize("seed", [4295, 2**32 - 1, 2**32, 2**63 - 1])
def test_any_seed_of_a_recipe_starts_a_search(kind: str, seed: int) -> None:
    """Optuna's samplers take 32 bits; the numbers made for the trials of seed 4,295 and above need more."""
    recipe = searching(space={"learning_rate": RATE}, search={"kind": kind, "trials": 3}).model_copy(
        update={"seed": seed}
    )
    found, again = everything(study_of(recipe)), everything(study_of(recipe))
    assert found == again
    assert len({values["learning_rate"] for values in found}) == 3


def test_tpe_comes_near_the_best_more_often_than_chance() -> None:
    near = {"random": 0, "tpe": 0}
    for kind in near:
        for seed in range(8):
            recipe = searching(space={"learning_rate": RATE}, search={"kind": kind, "trials": 30})
            study = OptunaStudy(recipe.tune, recipe.sweep, seed)
            for number in range(30):
                values = study.ask(str(number))
                assert values
                off = abs(values["learning_rate"] / 0.003 - 1)
                near[kind] += off < 0.3
                study.tell(str(number), result(off))
    assert near["tpe"] > 1.5 * near["random"]


def test_several_objectives_lead_to_their_trade_off() -> None:
    space = {"layers": {"kind": "integers", "low": 1, "high": 64}, "learning_rate": RATE}
    recipe = searching(space=space, search={"kind": "tpe", "trials": 60}, objectives=["validation_loss", "parameters"])
    study = study_of(recipe)
    for number in range(60):
        values = study.ask(str(number))
        assert values
        loss = 1 / values["layers"] + abs(values["learning_rate"] / 0.003 - 1)
        study.tell(str(number), result(loss, parameters=values["layers"]))
    best = study.study.best_trials
    assert len({trial.params["layers"] for trial in best}) > 3
    assert all(abs(trial.params["learning_rate"] / 0.003 - 1) < 3 for trial in best)


def test_a_trial_that_failed_teaches_nothing_and_a_stopped_one_what_it_had_reached() -> None:
    recipe = searching(space={"learning_rate": RATE}, search={"kind": "random", "trials": 3})
    study = study_of(recipe)
    for key in "abc":
        study.ask(key)
    study.tell("a", result(0.5))
    study.tell("b", None)
    study.tell("c", result(math.nan))
    assert [(trial.state.name, trial.value) for trial in study.study.trials] == [
        ("COMPLETE", 0.5), ("FAIL", None), ("FAIL", None),
    ]  # fmt: skip


FINITE = {
    "layers": {"kind": "choice", "values": [4, 1, 2]},
    "divergence": {"kind": "choice", "values": ["forward_kl", "jsd"]},
}


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_no_combination_is_tried_twice(kind: str) -> None:
    recipe = searching(space=FINITE, search={"kind": kind, "trials": 100})

    def run(before: tuple[TrialValues, ...] = ()) -> list[TrialValues]:
        study, found = study_of(recipe, before), list[TrialValues]()
        while (values := study.ask("x")) is not None:
            found.append(values)
            study.tell("x", result(values["layers"]))
        return found

    whole = run()
    assert len(whole) == recipe.tune.trials(recipe.sweep) == 12 == len({tuple(values.values()) for values in whole})
    assert run(tuple(whole[:7])) == whole


def test_listed_numbers_lie_in_a_row() -> None:
    """What is best lies next to what is good; among mere categories it takes up to 88 trials, at random 90."""
    space = {
        "layers": {"kind": "choice", "values": [2**place for place in range(12)]},
        "weight_decay": {"kind": "choice", "values": [place / 10 for place in range(8)]},
    }
    recipe = searching(space=space, search={"kind": "tpe", "trials": 96, "startup_trials": 6})
    sweep = recipe.sweep.model_copy(update={"students": recipe.sweep.students[:1]})
    for seed in range(12):
        study, off, tried = OptunaStudy(recipe.tune, sweep, seed), 1.0, 0
        while off > 1e-9:
            values = study.ask("x")
            assert values
            off = abs(math.log2(values["layers"]) - 5) + abs(values["weight_decay"] * 10 - 5)
            study.tell("x", result(off))
            tried += 1
        assert tried < 48


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"space": {"heads": {"kind": "choice", "values": [2, 3]}}},
         r"tune\.space: student a with heads 3 cannot be: heads 3 does not divide hidden_size 8"),
        ({"space": {"hidden_size": {"kind": "integers", "low": 8, "high": 24, "step": 8},
                    "heads": {"kind": "choice", "values": [2, 5]}}},
         r"student a with hidden_size 8, heads 5 cannot be"),
        ({"space": {"kv_heads": {"kind": "choice", "values": [1]}}},
         r"tune\.space\.kv_heads: the model of student a has no such field"),
        ({"space": {"learning_rate": RATE}}, r"space\.learning_rate: a grid has no end in a log_uniform range"),
        ({"space": {"learning_rate": {**RATE, "low": 1}}}, r"low 1 is not below high 0\.1"),
        ({"space": {"learning_rate": {**RATE, "low": -1}}}, r"space\.learning_rate\.low: found -1; .*greater than 0"),
        ({"space": {"beta1": {"kind": "uniform", "low": 0.5, "high": 1.5}}, "search": {"kind": "random", "trials": 2}},
         r"student a with beta1 1\.5 cannot be: Input should be less than 1"),
        ({"space": {"schedule": {"kind": "choice", "values": ["cosine", "steps"]}}}, r"with schedule steps cannot be"),
        ({"space": {"temperature": {"kind": "choice", "values": [3.0]}}}, r"temperature 3, which cache\.temperatures"),
        ({"space": {"layers": {"kind": "integers", "low": 1, "high": 4, "step": 2}}}, r"high 4 is not low 1 plus"),
        ({"space": {"layers": {"kind": "choice", "values": [1, 2, 1]}}}, r"space\.layers: values has 1 twice"),
        ({"objectives": ["accuracy"]}, r"tune\.objectives\.0: found 'accuracy'; .*'validation_loss', 'parameters'"),
        ({"objectives": ["parameters"]}, r"expected validation_loss and others beside it"),
        ({"objectives": ["validation_loss", "parameters"], "scheduler": {"kind": "asha", "grace_steps": 2}},
         r"scheduler asha compares validation losses alone"),
        ({"space": {"rate": RATE}}, r"tune\.space\.rate: unknown field"),
    ],
)  # fmt: skip
def test_a_search_that_makes_no_sense_is_refused(tune: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        searching(**tune)


def test_the_cache_must_hold_what_the_largest_batch_reads() -> None:
    space = {"batch_size": {"kind": "choice", "values": [8, 32]}}
    with pytest.raises(InputError, match=r"sweep reads 4 x 32 = 128 rows, and cache\.rows is 100"):
        recipe_of("digits", cache={"rows": 100}, tune={"space": space})
    assert recipe_of("digits", cache={"rows": 128}, tune={"space": space}).rows_read == 128
