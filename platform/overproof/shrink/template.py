"""A task's template: how its models are sized, and the text of its recipe; and changes of that text, comments kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

import yaml
from pydantic import Field

from overproof.config.base import Count, Section
from overproof.config.overrides import set_override

FEWEST_STEPS = 10  # however short the time is
RECIPE_BEGINS = "\n---\n"


class BytesANumber(Section):
    """What a number takes in a file."""

    matrix: float = Field(gt=0)
    table: float = Field(gt=0)  # of the matrices with one row for each output
    vector: float = Field(gt=0)


class Schedule(Section):
    """How long is trained."""

    epochs: float = Field(gt=0)
    least: Count  # steps
    most: Count
    batch_size: Count

    def steps(self, rows: int, share: float) -> int:
        """For so many train rows; or a share of that."""
        whole = min(max(round(self.epochs * rows / self.batch_size), self.least), self.most)
        return max(round(share * whole), min(FEWEST_STEPS, whole))


class Rates(Section):
    """Peak learning rates."""

    teacher: float = Field(gt=0)
    students: float = Field(gt=0)


class TemplateSettings(Section):
    """The first part of a template."""

    teacher: dict[str, Any] | None = None  # where none is given
    students: dict[str, dict[str, Any]] = Field({})  # of that one, by name, the largest first
    shares: tuple[float, ...]  # of a given teacher's layers
    keep: Count
    bytes: dict[str, BytesANumber]  # by variant; the last is the unquantised one
    file_bytes: int = Field(ge=0)
    layer_bytes: int = Field(0, ge=0)  # of each layer's part of a graph
    vocabulary_in_file: bool = False  # a given teacher's tokenizer, too
    least_times_smaller: float = Field(gt=0)
    teacher_steps: Schedule
    student_steps: Schedule
    learning_rates: Rates | None = None  # of weights that start fresh
    given_learning_rates: Rates


@cache
def _text(name: str) -> str:
    return (files("overproof.tasks") / "templates" / name).read_text(encoding="utf-8")


def read_settings(name: str, values: Mapping[str, Any]) -> TemplateSettings:
    """How a template's models are sized."""
    text = Template(_text(name).partition(RECIPE_BEGINS)[0])
    # The names of the first line's comment are no values.
    return TemplateSettings.parse(yaml.safe_load(text.safe_substitute(values)), name)


def render(name: str, values: Mapping[str, Any]) -> str:
    """The recipe's text."""
    return Template(_text(name).partition(RECIPE_BEGINS)[2]).substitute(values)


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1 << 20, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def comment(text: str) -> str:
    """Text that may stand behind a #: names of columns and classes may hold ends of lines, and what YAML refuses."""
    return "".join(character if character.isprintable() else " " for character in text)


def block(fields: Mapping[str, Any], indent: int) -> str:
    """Fields of a section, a line each."""
    return "\n".join(f"{' ' * indent}{name}: {flow(value)}" for name, value in fields.items())


def change(text: str, override: str) -> str:
    """A recipe's text with one field set, as ``a.b=value`` says; all other lines and comments stay.

    Raises:
        InputError: the override is no assignment, or leads through a value.
    """
    tree: dict[str, Any] = yaml.safe_load(text)
    set_override(tree, override)
    parts = override.partition("=")[0].split(".")
    node: Any = yaml.compose(text)
    for depth, part in enumerate(parts):
        value = _at(tree, parts[: depth + 1])
        key, child = _child(node, part)
        if child is None:
            start = node.start_mark
            return f"{text[: start.index]}{part}: {flow(value)}\n{' ' * start.column}{text[start.index :]}"
        if depth == len(parts) - 1 or isinstance(child, yaml.ScalarNode) or child.flow_style:
            start_index = child.start_mark.index if key is None else key.end_mark.index + 1
            old = text[start_index : child.end_mark.index]
            tail = old[len(old.rstrip()) :]  # a section ends where the next one begins
            return f"{text[:start_index]}{'' if key is None else ' '}{flow(value)}{tail}{text[child.end_mark.index :]}"
        node = child
    raise AssertionError(override)  # the last part is replaced or put in


def _at(tree: Any, parts: list[str]) -> Any:
    for part in parts:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def _child(node: Any, part: str) -> tuple[Any, Any]:
    """The nodes of a key (None in a list) and of its value; None where there is no such key."""
    if isinstance(node, yaml.SequenceNode):
        return None, node.value[int(part)]
    return next(((key, value) for key, value in node.value if key.value == part), (None, None))
