"""What a run came to is said in sentences that hold in every case, and the next step is a line that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from overproof.config import Recipe, load_recipe
from overproof.config.overrides import set_override
from overproof.evaluate.gate import judge
from overproof.evaluate.metrics import Comparison, MeasuredFile, Report
from overproof.evaluate.outcome import Outcome, Training, find_outcome, late_fall
from overproof.evaluate.remedies import find_nearest, longer_students, passing_values
from overproof.tasks.base import Metric

RECIPE = Path(__file__).parents[2] / "jobs/recipes/stdlib-lm.yaml"
KEEP = {"kind": "keep", "against": "teacher", "at_least": 0.95}
FLAT = Training({"teacher": ((10, 2.0), (20, 1.01), (40, 1.0)), "student": ((10, 2.0), (30, 1.51), (40, 1.5))})

SURE = Metric(value=0.9, low=0.8, high=1, unit="", n=40)


def recipe(*rules: dict[str, Any], candidate: str | None = None, **changes: Any) -> Recipe:
    whole = load_recipe(RECIPE)
    tree = whole.model_dump() | {"gate": {"rules": list(rules) or [KEEP], "candidate": candidate}}
    tree["sweep"]["students"][0]["name"] = "student"
    for section, fields in changes.items():
        tree[section] |= fields
    return Recipe.model_validate(tree)


def file(name: str, size: int, student: str | None = "student", **metrics: Metric) -> MeasuredFile:
    quality = {"bits_per_byte": Metric(value=1.0, low=0.9, high=1.1, unit="", n=40)}
    return MeasuredFile(
        name=name, student=student, format=name.rpartition("-")[2], size_bytes=size, sha256="0" * 64,
        candidate="-" in name, metrics={**quality, "agreement": SURE, **metrics},
    )  # fmt: skip


def compared(name: str, against: str, value: float, low: float | None, high: float | None) -> Comparison:
    return Comparison(
        name=name, against=against, value=value, low=low, high=high, kept=1 - value,
        kept_low=None if high is None else 1 - high, kept_high=None if low is None else 1 - low,
    )  # fmt: skip


FILES = (
    file("teacher", 1_000_000, None), file("student", 500_000), file("student-q8_0", 270_000),
    file("student-q4_0", 150_000), file("control", 500_000, None),
)  # fmt: skip
GOOD = (
    compared("student", "teacher", 0.01, 0.005, 0.02),
    compared("student-q8_0", "teacher", 0.011, 0.005, 0.02),
    compared("student-q4_0", "teacher", 0.03, 0.02, 0.04),
    compared("control", "teacher", 0.2, 0.1, 0.3),
    compared("student", "control", -0.0164, -0.03, -0.005),
)


def report(*changes: Comparison, files: tuple[MeasuredFile, ...] = FILES, **fields: Any) -> Report:
    """Of a run in which all is well, but for the changes."""
    pairs = {(c.name, c.against): c for c in (*GOOD, *changes)}
    whole: dict[str, Any] = {
        "task": "language_modeling", "quality": "bits_per_byte", "engine": "any", "computes_with": "any",
        "confidence": 0.95, "measured": files, "comparisons": tuple(pairs.values()),
    }  # fmt: skip
    return Report(**whole | fields)


def outcome(of: Report, by: Recipe | None = None, training: Training = FLAT) -> Outcome:
    by = by or recipe()
    return find_outcome(by, of, judge(by.gate, of), training)


def test_what_ships_and_why() -> None:
    said = outcome(report())
    assert said.sentences == (
        "student-q4_0 ships: the smallest of 2 files that met every rule.",
        "student-q4_0 is 3.00 % worse in bits per byte than teacher (95 % interval: 2.00 to 4.00 "
        "% "
        "worse; 40 test documents).",
        "Distillation bought quality: student is 1.64 % better in bits per byte than control (95 % interval: 0.50 to "
        "3.00 % better; 40 test documents), which trained as long without the teacher.",
    )
    assert (said.passed, said.warnings, said.nearest, said.next_steps) == (True, (), None, ())


SIZE = {"kind": "size", "at_most_mb": 0.2}


@pytest.mark.parametrize(
    ("by", "of", "ships"),
    [
        (recipe(KEEP, SIZE), report(), "student-q4_0 ships: the only one of 2 files that met every rule."),
        (
            recipe(candidate="student-q8_0"),
            report(),
            "student-q8_0 ships: gate.candidate names it, and it met every rule.",
        ),
        (
            recipe(),
            report(files=(*FILES[:3], file("student-q4_0", 270_000), FILES[4])),
            "student-q4_0 ships: the smallest of 2 files that met every rule (as small as student-q8_0, and first by "
            "name).",
        ),
        (recipe(), report(files=(*FILES[:2], *FILES[3:])), "student-q4_0 ships: the one file there is met every rule."),
        (
            recipe(SIZE | {"at_most_mb": 0.1}),
            report(),
            "Nothing ships: none of 2 files met every rule; the nearest, student-q4_0, broke size.",
        ),
        (
            recipe(SIZE | {"at_most_mb": 0.1}),
            report(files=(*FILES[:2], *FILES[3:])),
            "Nothing ships: the one file there is did not meet every rule; the nearest, student-q4_0, broke size.",
        ),
        (
            recipe(KEEP, SIZE, candidate="student-q8_0"),
            report(),
            "Nothing ships: gate.candidate names student-q8_0, which broke size; student-q4_0 met every rule.",
        ),
        (
            recipe(SIZE | {"at_most_mb": 0.1}, candidate="student-q8_0"),
            report(),
            "Nothing ships: gate.candidate names student-q8_0, which broke size.",
        ),
        (
            recipe(),
            report(files=(*FILES[:2], FILES[4])),
            "Nothing ships: there is no file that may be packaged.",
        ),
    ],
)  # fmt: skip
def test_why_a_file_ships_or_none_does(by: Recipe, of: Report, ships: str) -> None:
    assert outcome(of, by).ships == ships


@pytest.mark.parametrize(
    ("found", "did"),
    [
        (
            compared("student", "control", 0.0164, 0.01, 0.02),
            "Distillation cost quality: student is 1.64 % worse in bits per byte than control (95 % interval: 1.00 to "
            "2.00 "
            "% worse; 40 test documents), which trained as long without the teacher.",
        ),
        (
            compared("student", "control", -0.0164, -0.04, 0.01),
            "Whether distillation bought or cost anything is not shown: student is 1.64 % better in bits per byte than "
            "control (95 % interval: 4.00 % better to 1.00 % worse; 40 test documents), which trained as long without "
            "the "
            "teacher.",
        ),
        (
            compared("student", "control", 0.0, 0.0, 0.0),
            "Whether distillation bought or cost anything is not shown: student is exactly as good in bits per byte as "
            "control (95 % interval: 0.00 to 0.00 % better; 40 test documents), which trained as long without the "
            "teacher.",
        ),
        (
            compared("student", "control", -0.0164, None, None),
            "Whether distillation bought or cost anything is not shown: student is 1.64 % better in bits per byte than "
            "control (no interval; 40 test documents), which trained as long without the teacher.",
        ),
    ],
)  # fmt: skip
def test_what_distillation_bought_has_the_right_sign(found: Comparison, did: str) -> None:
    assert outcome(report(found)).bought == did


def test_a_share_is_told_in_points_and_in_its_own_words() -> None:
    files = tuple(
        m.model_copy(update={"metrics": m.metrics | {"accuracy": Metric(value=1, unit="", n=1)}}) for m in FILES
    )
    said = outcome(report(task="image_classification", quality="accuracy", files=files)).bought
    assert (
        "student is 1.64 points higher in accuracy than control (95 % interval: 0.50 to 3.00 points higher; 1" in said
    )


def test_nothing_is_said_to_be_distilled_into_a_student_without_a_teacher() -> None:
    said = outcome(report(), training=Training(FLAT.curves, taught=False))
    assert said.bought == "Nothing was distilled: the best student, student, learnt without the teacher."


def test_a_teacher_that_is_worse_than_its_control_or_student_makes_a_comparison_hollow() -> None:
    said = outcome(report(compared("control", "teacher", -0.1, -0.2, -0.05)))
    assert said.warnings == (
        "the teacher is worse than control, which trained without it: control is 10.00 % better in bits per byte than "
        "teacher (95 % interval: 5.00 to 20.00 % better; 40 test documents). To keep much of such a teacher shows "
        "little",
    )
    assert [remedy.overrides for remedy in said.next_steps] == [(f"train.steps={2 * recipe().train.steps}",)]
    said = outcome(report(compared("student", "teacher", -0.01, -0.02, 0.01)))
    assert len(said.warnings) == 1
    assert said.warnings[0].startswith("the teacher is not shown to be better than student, its own student: ")
    as_it_is = recipe(train={"steps": 0, "model": {"kind": "pretrained", "path": "x"}})
    assert outcome(report(compared("control", "teacher", -0.1, -0.2, -0.05)), as_it_is).next_steps == ()


def test_a_curve_that_still_falls_is_told() -> None:
    steep = Training({"teacher": ((10, 3.0), (20, 2.0), (30, 1.5), (40, 1.0)), "student": FLAT.curves["student"]})
    said = outcome(report(), training=steep)
    assert said.warnings == (
        "the validation loss of teacher still fell by 33 % in the last quarter of its steps: longer training would "
        "change "
        "what is compared",
    )
    assert [remedy.overrides for remedy in said.next_steps] == [(f"train.steps={2 * recipe().train.steps}",)]
    said = outcome(report(), training=Training({"student": steep.curves["teacher"]}))
    assert [remedy.overrides for remedy in said.next_steps] == [(f"sweep.steps={2 * recipe().sweep.steps}",)]


@pytest.mark.parametrize(
    ("curve", "share"),
    [
        ((), None),
        (((5, 2.0), (10, 1.0)), None),  # nothing between a start and an end
        (((0, 4.0), (50, 2.0), (100, 1.0)), 1 / 3),  # 1.5 at step 75
        (((25, 9.0), (75, 1.25), (100, 1.0)), 0.2),
        (((25, 1.0), (75, 1.0), (100, 1.25)), -0.25),
        (((10, 1.0), (20, 0.5), (30, 0.0)), None),
    ],
)
def test_late_fall(curve: tuple[tuple[int, float], ...], share: float | None) -> None:
    assert late_fall(curve) == (share if share is None else pytest.approx(share))


def test_few_units_trials_that_are_not_told_apart_and_a_busy_machine_are_told() -> None:
    few = {"bits_per_byte": Metric(value=1.0, low=0.9, high=1.1, unit="", n=21)}
    busy = {"contended_cores": Metric(value=1.26, unit="cores", n=1)}
    quiet = {"contended_cores": Metric(value=0.1, unit="cores", n=1)}
    files = (
        FILES[0],
        FILES[1],
        file("student-q8_0", 270_000, **quiet),
        file("student-q4_0", 150_000, **few, **busy),
        FILES[4],
    )
    other = file("other", 400_000, "other")
    said = outcome(report(compared("student", "other", -0.001, -0.01, 0.008), files=(*files, other)))
    assert said.warnings == (
        "21 test documents, fewer than 30: intervals are themselves uncertain",
        "the best student is not told apart from other: student is 0.10 % better in bits per byte than other (95 % "
        "interval: "
        "1.00 % better to 0.80 % worse; 40 test documents)",
        "latencies of 1 of 6 files were measured while other processes kept cores busy that the engine wanted (of "
        "student-q4_0 1.3): they are too long",
    )
    assert "21 test documents" in said.lost


NEVER = {"kind": "improvement", "against": "control", "at_least": 0.5}
ROUNDED = {"kind": "regression", "against": "student", "at_most": 0.01}
WORSE = compared("student-q4_0", "student", 0.02, 0.01, 0.03)
EXACT = compared("student-q4_0", "control", -0.04, -0.06, -0.02)
LATENCY = {"kind": "latency", "percentile": 95, "at_most_ms": 40}
SLOW = {"latency_p95_s": Metric(value=0.05, high=0.0625, unit="s", n=60)}
FEW = {"latency_p95_s": Metric(value=0.05, unit="s", n=20)}
PARITY = {"parity_nats": Metric(value=0.2, unit="", n=4), "split_otherwise": Metric(value=0.25, unit="", n=4)}
STEPS = {"sweep.steps=240"}
VALUE = "gate.rules.0."


@pytest.mark.parametrize(
    ("rule", "found", "overrides"),
    [
        (KEEP | {"at_least": 0.99}, (), STEPS | {f"{VALUE}at_least=0.96"}),
        (KEEP | {"at_least": 0.97}, (), {"compress.formats=[q4_0,q4_0-gptq,q4_k_m-gptq]", f"{VALUE}at_least=0.96"}),
        ({"kind": "regression", "against": "teacher", "at_most": 0.01}, (), STEPS | {f"{VALUE}at_most=0.04"}),
        (ROUNDED, WORSE, {"compress.formats=[q4_0,q4_0-gptq,q4_k_m-gptq]", f"{VALUE}at_most=0.03"}),
        (SIZE | {"at_most_mb": 0.1}, (), {f"{VALUE}at_most_mb=0.15"}),
        ({"kind": "smaller", "against": "teacher", "at_least": 9}, (), {f"{VALUE}at_least=6.66"}),
        (LATENCY, SLOW, {f"{VALUE}at_most_ms=62.5"}),
        (LATENCY, FEW, {"evaluate.probe_s=1045"}),
        ({"kind": "agreement", "at_least": 0.9}, (), STEPS | {f"{VALUE}at_least=0.8"}),
        ({"kind": "parity", "at_most": 0.1}, PARITY, {f"{VALUE}at_most=0.2", f"{VALUE}split_otherwise=0.25"}),
        ({"kind": "parity", "at_most": 0.5}, PARITY, {f"{VALUE}split_otherwise=0.25"}),
        ({"kind": "quality", "limit": 1.05}, (), STEPS | {f"{VALUE}limit=1.1"}),
        (NEVER, EXACT, STEPS | {f"{VALUE}at_least=0.0199"}),  # it must be better by more
        (NEVER, (), set()),  # no such comparison
        (NEVER, compared("student-q4_0", "control", 0.1, None, None), set()),
    ],
)
def test_each_rule_that_is_broken_has_its_remedies(rule: dict[str, Any], found: Any, overrides: set[str]) -> None:
    """Each a line that runs: the recipe takes it, and where it loosens the rule the file passes."""
    changed = {"kind": "gguf", "formats": ["q4_0"]}
    by = recipe(rule, compress=changed, evaluate={"probe_s": 295.0}, sweep={"steps": 120})
    metrics = found if isinstance(found, dict) else {}
    comparisons = (found,) if isinstance(found, Comparison) else ()
    of = report(*comparisons, files=(*FILES[:2], file("student-q4_0", 150_000, **metrics), FILES[4]))
    nearest = find_nearest(by, of, judge(by.gate, of))
    assert nearest is not None
    (broken,) = nearest.broken
    assert broken.remedies
    assert {override for remedy in broken.remedies for override in remedy.overrides} == overrides
    for remedy in broken.remedies:
        changed_recipe = overridden(by, *remedy.overrides)
        if remedy.overrides and remedy.overrides[0].startswith("gate."):
            assert judge(changed_recipe.gate, of).passed, remedy
    if not overrides:
        assert [remedy.text for remedy in broken.remedies] == ["more test documents: of one there is no interval"]


def overridden(by: Recipe, *overrides: str) -> Recipe:
    tree = json.loads(by.model_dump_json())
    for override in overrides:
        set_override(tree, override)
    return Recipe.parse(tree, "recipe")


def test_students_that_train_longer_have_as_many_rows_to_read() -> None:
    whole = recipe()
    rows = whole.rows_read
    by = overridden(whole, f"cache.rows={rows}")
    remedy = longer_students(by)
    assert remedy.overrides == (f"sweep.steps={2 * by.sweep.steps}", f"cache.rows={2 * rows}")
    assert overridden(by, *remedy.overrides).rows_read == 2 * rows


def test_the_file_that_misses_by_least_is_the_nearest_and_no_value_is_named_that_a_rule_cannot_have() -> None:
    by = recipe(KEEP | {"at_least": 0.99}, SIZE | {"at_most_mb": 0.14})
    found = find_nearest(by, report(), judge(by.gate, report()))
    assert found is not None
    assert (found.name, [broken.kind for broken in found.broken]) == ("student-q4_0", ["keep", "size"])
    worse = report(compared("student-q4_0", "teacher", 2.0, 1.5, 2.5), files=(*FILES[:2], *FILES[3:]))
    rule = recipe(KEEP).gate.rules[0]
    assert passing_values(rule, worse, FILES[3]) is None
    found = find_nearest(recipe(KEEP), worse, judge(recipe(KEEP).gate, worse))
    assert found is not None
    assert found.broken[0].remedies[-1].text == "no value of this rule would let it pass"


def test_a_teacher_that_is_behind_is_trained_before_its_students_are() -> None:
    names = ("student", "student-q8_0", "student-q4_0")
    worse = [compared(name, "teacher", 0.1, 0.08, 0.2) for name in names]
    behind = report(compared("control", "teacher", -0.1, -0.2, -0.05), *worse)
    found = find_nearest(recipe(), behind, judge(recipe().gate, behind))
    assert found is not None
    overrides = [remedy.overrides for remedy in found.broken[0].remedies]
    steps = recipe().train.steps, recipe().sweep.steps
    assert overrides[:2] == [(f"train.steps={2 * steps[0]}",), (f"sweep.steps={2 * steps[1]}",)]
