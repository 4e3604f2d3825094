"""What is open by kind: every line of the registries holds, and reading a recipe loads nothing heavy."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from overproof.config import Pretrained, Recipe, load_recipe
from overproof.engines.base import EngineLoader
from overproof.errors import InputError
from overproof.export.base import Format
from overproof.models.base import ArrayFamily, GgufFamily, ModelFamily
from overproof.registry import ENGINES, FAMILIES, FORMATS, TASKS, Registry
from overproof.tasks.base import Task

RECIPES = sorted((Path(__file__).parents[1] / "jobs/recipes").glob("*.yaml"))
REGISTRIES: dict[str, Registry[Any]] = {
    "task": TASKS,
    "model family": FAMILIES,
    "export format": FORMATS,
    "engine": ENGINES,
}


@pytest.mark.parametrize(
    ("registry", "kind", "words"),
    [
        (TASKS, "image_clasification", "task 'image_clasification': there is none, nearest is 'image_classification';"),
        (FAMILIES, "lama", "model family 'lama': there is none, nearest is 'llama';"),
        (FORMATS, "gguff", "export format 'gguff': there is none, nearest is 'gguf';"),
        (ENGINES, "llamacpp", "engine 'llamacpp': there is none, nearest is 'llama.cpp';"),
        (TASKS, "zzz", "task 'zzz': there is none; expected one of "),
    ],
)
def test_an_unknown_kind_is_refused_with_the_nearest(registry: Registry[Any], kind: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        registry[kind]
    assert words in str(refused.value)
    assert kind not in registry
    assert str(refused.value).endswith(f"expected one of {', '.join(registry)}")


@pytest.mark.parametrize("what", REGISTRIES)
def test_kinds_are_told_without_importing(what: str) -> None:
    registry = REGISTRIES[what]
    assert registry.what == what
    lazy: Registry[Any] = Registry(what, {"absent": "no.such.module:OBJECT"})
    assert (list(lazy), len(lazy), "absent" in lazy, "present" in lazy) == (["absent"], 1, True, False)
    with pytest.raises(ModuleNotFoundError):
        lazy["absent"]
    assert len(registry) == len(list(registry)) > 0


@pytest.mark.parametrize("registry", [TASKS, FAMILIES, FORMATS], ids=lambda r: r.what)
def test_every_section_is_marked_with_its_kind(registry: Registry[Any]) -> None:
    for kind, implementation in registry.items():
        if implementation.section is None:  # a family whose models come from directories alone
            continue
        assert implementation.section.model_fields["kind"].default == kind


def test_what_a_kind_names_is_there() -> None:
    for kind, family in FAMILIES.items():
        assert set(family.tasks) <= set(TASKS), kind
        if family.section is not None:
            assert family.architectures[0] == family.model_class().__name__
    for kind, format in FORMATS.items():
        assert format.families
        assert set(format.families) <= set(FAMILIES), kind
        assert format.engines
        assert set(format.engines) <= set(ENGINES), kind
        assert all(format.engines.values()), kind
        assert format.drafting_engine in (None, *format.engines)
        assert format.unquantised not in format.section.model_fields["formats"].default
    assert {engine for format in FORMATS.values() for engine in format.engines} == set(ENGINES)
    for kind, task in TASKS.items():
        assert any(kind in family.tasks for family in FAMILIES.values()), kind
        assert task.quality.name != task.speed


def test_arrays_alone_are_exported_as_onnx() -> None:
    format: Format = FORMATS["onnx"]
    for kind, family in FAMILIES.items():
        assert isinstance(family, ArrayFamily) == (kind in format.families)


def test_decoders_that_llama_cpp_runs_are_exported_as_gguf() -> None:
    format: Format = FORMATS["gguf"]
    for kind, family in FAMILIES.items():
        assert isinstance(family, GgufFamily) == (kind in format.families)
    assert {"llama", "qwen3", "gemma3", "gpt2", "falcon"} <= set(format.families)
    assert "causal_lm" not in format.families


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipes_sections_are_its_kinds(path: Path) -> None:
    recipe = load_recipe(path)
    assert type(recipe.data) is TASKS[recipe.data.kind].section
    assert type(recipe.compress) is FORMATS[recipe.compress.kind].section
    if not isinstance(recipe.train.model, Pretrained):
        assert type(recipe.train.model) is FAMILIES[recipe.train.model.kind].section
    assert recipe.engine == next(iter(FORMATS[recipe.compress.kind].engines))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.kind=digits", "'language_modeling'"),
        ("compress={kind: onx}", "'onnx'"),
        ("train.model={kind: brt}", "'vit'"),
        ("evaluate.engine=llama.cpp", "compress.kind 'onnx' is served by 'onnxruntime'"),
        ("data={kind: language_modeling}", "train.model.kind is 'vit'; data.kind 'language_modeling' needs 'llama'"),
        ("speculate={}", "compress.kind 'onnx' holds models that write no text"),
    ],
)
def test_kinds_that_do_not_go_together_are_refused(override: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        load_recipe(RECIPES[0].with_name("digits.yaml"), (override,))
    assert words in str(refused.value)


def test_reading_a_recipe_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'onnxruntime', 'xllamacpp', 'sklearn'}\n"
        "import overproof.config\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "for path in sys.argv[1:]: overproof.config.load_recipe(path)\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, RECIPES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("protocol", "registry"), [(ModelFamily, FAMILIES), (Task, TASKS), (Format, FORMATS), (EngineLoader, ENGINES)]
)
def test_implementations_have_all_of_their_protocol(protocol: type, registry: Registry[Any]) -> None:
    """mypy cannot see it: a registry names them by strings."""
    methods = {name: value for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"}
    for kind, implementation in registry.items():
        for name in (*inspect.get_annotations(protocol), *methods):
            assert hasattr(implementation, name), f"{kind}.{name}"
        for name, method in methods.items():
            expected = list(inspect.signature(method).parameters)[1:]
            assert list(inspect.signature(getattr(implementation, name)).parameters) == expected, f"{kind}.{name}"
