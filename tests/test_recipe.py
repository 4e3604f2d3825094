"""The recipe schema: what it refuses, in which words, and that help, editor schema and files agree with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from jsonschema import Draft202012Validator

from overproof.config import Recipe, Section, load_recipe, schema_docs
from overproof.config.base import RESOURCE, sections_in
from overproof.config.search import first_comparison
from overproof.errors import InputError

RECIPES = sorted((Path(__file__).parents[1] / "jobs/recipes").glob("*.yaml"))
DIGITS = Path(__file__).parents[1] / "jobs/recipes/digits.yaml"
LM = DIGITS.with_name("stdlib-lm.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_fits_the_editor_schema(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    Draft202012Validator(json.loads(schema_docs.json_schema())).validate(yaml.safe_load(path.read_text()))


def test_the_editor_schema_file_is_current() -> None:
    assert (DIGITS.parent / "recipe.schema.json").read_text() == schema_docs.json_schema()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=1", ["train.stepz: unknown field, nearest is 'steps'"]),
        ("trian.steps=1", ["trian: unknown field, nearest is 'train'"]),
        ("train.checkpoint.evry_steps=1", ["train.checkpoint.evry_steps: ", "nearest is 'every_steps'"]),
        ("sweep.students.0.model.patchsize=2", ["sweep.students.0.model.patchsize: ", "nearest is 'patch_size'"]),
        ("tune.space.temperature={kind: choice, valuse: [1]}", ["temperature.valuse: ", "nearest is 'values'"]),
        ("sweep.zzz=1", ["sweep.zzz: unknown field; `overproof schema"]),
        ("train.workers=[2, 4, x]", ["train.workers: found [2, 4, 'x']"]),
        ("train.steps=many", ["train.steps", "'many'", "integer"]),
        ("train.steps=-1", ["train.steps", "-1", "greater than or equal to 0"]),
        ("train.learning_rate=.nan", ["train.learning_rate", "finite"]),
        ("train.zero_stage=4", ["train.zero_stage", "4"]),
        ("train.batch_size=33", ["batch_size 33", "workers 2"]),
        ("sweep.students.0.temperature=9", ["temperature 9", "cache.temperatures"]),
        ("sweep.students.9.temperature=9", ["'9'", "list of 4"]),
        ("sweep.students.1.name=narrow-t2", ["'narrow-t2'", "every name once"]),
        ("sweep.students.1.name=wide-t2-int8", ["'wide-t2-int8'", "compressed file of another"]),
        ("cache.rows=10", ["cache.rows is 10", "raise cache.rows, or leave it out"]),
        ("cache.rows=most", ["cache.rows", "'most'"]),
        ("cache.scheme={kind: topq}", ["cache.scheme", "topq", "'topk', 'sampled', 'dense', nearest is 'topk'"]),
        ("cache.scheme={kind: topk, draws: 3}", ["cache.scheme.draws: unknown field"]),
        ("cache.scheme={kind: sampled, draws: 0}", ["cache.scheme.draws: found 0"]),
        ("data.test_fraction=0.95", ["validation_fraction + test_fraction", "less than 1"]),
        ("compress={kind: gguf}", ["compress.kind is 'gguf'", "needs 'onnx'"]),
        ("name=Has Spaces", ["name", "pattern"]),
        ("serve.max_replicas=0", ["serve.max_replicas", "1"]),
        ("train.steps", ["expected a.b=value"]),
        ("name.x=1", ["name holds 'digits'"]),
        (
            "gate.candidate=wide-t2-q8",
            ["gate.candidate: found 'wide-t2-q8'; expected one of ", "'wide-t2-int8'"],
        ),
        ("data.kind=image_clasification", ["data.kind: found 'image_clas", "nearest is 'image_classification'"]),
        ("gate.rules=-0.1", ["gate.rules: found -0.1; expected a list"]),
        (
            "gate.rules=[-0.1]",
            ["gate.rules.0: found -0.1; expected a section whose kind is 'regression' or 'improvement'"],
        ),
        ("gate.rules.0={at_most: 1}", ["gate.rules.0.kind: missing; expected 'regression' or"]),
        ("gate.rules.-0.1=3", ["'-0' is no place in gate.rules", "from 0 to "]),
        (
            "gate.rules.0={kind: improvement, at_least: -0.1}",
            [
                "gate.rules.0.at_least: found -0.1; expected 0 or more",
                "{kind: regression, against: control, at_most: 0.1}",
            ],
        ),
        ("train.model=vit", ["train.model: found 'vit'; expected a section whose kind is ", "'vit'"]),
        (
            "sweep.students.0=small",
            ["sweep.students.0: found 'small'; expected a section with fields such as name, model"],
        ),
        ("train.model={kind:", ["cannot be read as YAML", "in single quotes: --set 'train.model={kind: ...}'"]),
        ('name="digits', ["cannot be read as YAML", "in single quotes: --set 'name=\"digits ...\"'"]),
        ("name=a: b: c", ["cannot be read as YAML: mapping values are not allowed", "--set 'name=a: b: c'"]),
    ],
)
def test_a_bad_field_is_named_with_what_was_found_and_expected(override: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load_recipe(DIGITS, (override,))
    for word in words:
        assert word in str(error.value)


def test_a_list_of_bad_parts_is_not_called_short_beside() -> None:
    with pytest.raises(InputError) as error:
        load_recipe(DIGITS, ("gate.rules=[-0.1]",))
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(InputError, match=r"gate.rules: found \[\]; .*at least 1"):
        load_recipe(DIGITS, ("gate.rules=[]",))


@pytest.mark.parametrize(
    ("given", "changes", "dropped"),
    [
        ("data.source={kind: folder, path: x, pattern: a}", ["data.source.kind=jsonl", "data.source.field=body"],
         "data.source.pattern"),
        ("data.source={kind: folder, path: x}", ["data.source.kind=stdlib"], "data.source.path"),
        ("cache.scheme={kind: sampled, k: 3, draws: 4}", ["cache.scheme.kind=topk"], "cache.scheme.draws"),
        ("sweep.students.0.model={kind: llama, hidden_size: 8, intermediate_size: 8, layers: 1, heads: 2, kv_heads: 2}",
         ["sweep.students.0.model.path=x", "sweep.students.0.model.kind=pretrained"], "sweep.students.0.model.layers"),
        ("tune={search: {kind: tpe, trials: 2, startup_trials: 1}}", ["tune.search.kind=random"], "startup_trials"),
    ],
)  # fmt: skip
def test_a_changed_kind_takes_the_fields_of_the_old_one_with_it(
    given: str, changes: list[str], dropped: str, caplog: pytest.LogCaptureFixture
) -> None:
    load_recipe(LM, (given, *changes))
    assert dropped in caplog.text
    assert "left out" in caplog.text


def test_what_follows_from_a_bad_field_is_no_second_fault() -> None:
    with pytest.raises(InputError) as error:
        load_recipe(DIGITS, ("train.steps=abc",))
    assert str(error.value).splitlines() == [
        f"{DIGITS}: train.steps: found 'abc'; input should be a valid integer, unable to parse string as an integer"
    ]


def test_a_candidate_of_a_search_has_a_number() -> None:
    assert load_recipe(DIGITS, ("gate.candidate=wide-t2-007-int8",)).gate.candidate == "wide-t2-007-int8"


def test_an_unknown_kind_drops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match="nearest is 'topk'"):
        load_recipe(DIGITS, ("cache.scheme={kind: sampled, draws: 4}", "cache.scheme.kind=topq"))
    assert "left out" not in caplog.text


def test_validations_and_the_first_rung_follow_the_steps(tmp_path: Path) -> None:
    """Unless the recipe says how often: then that holds, whatever the steps."""
    tree = yaml.safe_load(DIGITS.read_text())
    del tree["tune"]["scheduler"]["grace_steps"]
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(tree))
    for steps in (1, 7, 400):
        recipe = load_recipe(tmp_path / "digits.yaml", (f"sweep.steps={steps}", f"train.steps={steps}"))
        assert recipe.sweep.validate_every == recipe.train.validate_every == max(1, steps // 8)
        assert first_comparison(recipe.tune.scheduler, recipe.sweep) == max(1, steps // 8)
    told = load_recipe(tmp_path / "digits.yaml", ("sweep.steps=400", "sweep.validate_every=30"))
    assert (told.sweep.validate_every, first_comparison(told.tune.scheduler, told.sweep)) == (30, 30)
    rung = load_recipe(tmp_path / "digits.yaml", ("sweep.steps=400", "tune.scheduler.grace_steps=90"))
    assert first_comparison(rung.tune.scheduler, rung.sweep) == 90


def test_the_best_checkpoint_is_told_at_each_checkpoint() -> None:
    best = ("train.result=best", "train.checkpoint={keep_best: 1, every_steps: 40}", "train.steps=130")
    assert load_recipe(DIGITS, best).train.scored_checkpoints == {40, 80, 120}
    assert load_recipe(DIGITS, best[1:]).train.scored_checkpoints == set()


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_drawn_outputs_teach_forward_kl_alone(divergence: str) -> None:
    sampled, other = "cache.scheme={kind: sampled}", f"sweep.students.1.divergence={divergence}"
    load_recipe(DIGITS, (sampled,))
    load_recipe(DIGITS, ("cache.scheme={kind: dense}", other))
    with pytest.raises(InputError, match=r"asks for reverse_kl"):
        load_recipe(DIGITS, (sampled, "tune={space: {divergence: {kind: choice, values: [forward_kl, reverse_kl]}}}"))
    with pytest.raises(InputError, match=rf"asks for {divergence}, .*probabilities of outputs that were not drawn"):
        load_recipe(DIGITS, (sampled, other))


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    for content, word in ((None, "No such file"), ("a: [", "not YAML"), ("- 1", "expected a mapping")):
        path = tmp_path / "recipe.yaml"
        if content is not None:
            path.write_text(content)
        with pytest.raises(InputError, match=word):
            load_recipe(path)


def test_overrides_reach_nested_fields_and_lists() -> None:
    recipe = load_recipe(DIGITS, ("train.steps=7", "sweep.students.0.teacher_weight=0.25", "evaluate.threads=1"))
    assert (recipe.train.steps, recipe.sweep.students[0].teacher_weight, recipe.evaluate.threads) == (7, 0.25, 1)


def test_a_recipe_survives_its_own_serialisation_and_is_frozen() -> None:
    recipe = load_recipe(DIGITS)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def _resources(section: type[Section]) -> Iterator[str]:
    """Every field at any depth that is marked as a resource."""
    for name, field in section.model_fields.items():
        if RESOURCE in field.metadata:
            yield f"{section.__name__}.{name}"
        for inner in sections_in(field.annotation):
            yield from _resources(inner)


def test_the_resources_are_pinned() -> None:
    pool = ("actors", "cpus_per_actor", "gpus_per_actor")
    worker = ("micro_batch_size", "cpus_per_worker", "gpus_per_worker", "workers")
    traffic = ("bucket_elements", "overlap_comm", "hpz_partition_size")
    assert set(_resources(Recipe)) == {
        *(f"{section}.{name}" for section in ("Generate", "Cache", "OnPolicy") for name in pool), "OnPolicy.wait_s",
        *(f"{section}.{name}" for section in ("Train", "DataParallel") for name in worker + traffic),
        "Train.checkpoint", "Train.max_failures", "Sweep.concurrent_trials", "Sweep.cpus_per_trial",
        "Sweep.gpus_per_trial", "Evaluate.concurrent_tasks", "Evaluate.gpus_per_task",
    }  # fmt: skip


def test_only_a_marked_field_is_left_out_whatever_others_are_called() -> None:
    class Inner(Section):
        workers: int
        checkpoint: str

    class Outer(Section):
        workers: Annotated[int, RESOURCE]
        gpus: float = 0
        inner: Annotated[Inner, RESOURCE]
        inners: tuple[Inner, ...]
        labels: dict[str, int]

    inner = {"workers": 1, "checkpoint": "folder"}
    found = Outer.parse({"workers": 2, "inner": inner, "inners": [inner], "labels": {"workers": 3}})
    expected = {"gpus": 0.0, "inners": [inner], "labels": {"workers": 3}}
    assert found.without_resources() == expected
    assert json.dumps(found.without_resources()) == json.dumps(expected)  # a default is as if it were written


def test_help_names_every_field_once_with_its_meaning() -> None:
    text = schema_docs.describe_fields("train")
    assert "train.steps " in text
    assert "0 keeps the starting weights" in text
    assert "sweep" not in text.split()[0]
    assert len(schema_docs.describe_fields().splitlines()) > 100
