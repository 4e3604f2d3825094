"""What ``--set a.b=value`` does to a tree of sections before it is validated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import yaml

from overproof.config.base import Section, sections_in
from overproof.errors import InputError

LOG = logging.getLogger(__name__)


def parse_overrides(overrides: Sequence[str], section: str) -> dict[str, Any]:
    """Overrides of one section, with its name before them or not, as a mapping.

    Raises:
        InputError: one is no assignment.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        set_override(tree, override.removeprefix(f"{section}."))
    return tree


def set_override(tree: dict[str, Any], override: str, schema: type[Section] | None = None) -> None:
    """Put the value of ``a.b=value`` into a tree of sections.

    Where it changes a section's kind, the fields that the new kind lacks go with the old one, which a warning tells:
    ``schema`` says which those are, and without it nothing goes.

    Raises:
        InputError: it is no assignment, or leads through something that is no section.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set {override}: expected a.b=value, such as train.steps=200")
    *parents, last = path.split(".")
    node: Any = tree
    for i, part in enumerate([*parents, last]):
        key: Any = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                expected = f"a place from 0 to {len(node) - 1}" if node else "none, for it is empty"
                raise InputError(f"--set {override}: {part!r} is no place in {'.'.join(parents[:i])}; found a list of "
                                 f"{len(node)}, expected {expected}")  # fmt: skip
            key = int(part)
        elif not isinstance(node, dict):
            raise InputError(f"--set {override}: {'.'.join(path.split('.')[:i])} holds {node!r}, not a section")
        if i < len(parents):
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
    value = _value(override, path, text)
    if last == "kind" and isinstance(node, dict) and schema is not None and node.get("kind") != value:
        _drop_fields(node, parents, value, schema)
    node[key] = value


def _value(override: str, path: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or str(error).replace("\n", " ")
        ends = {"{": "}", "[": "]", '"': '"', "'": "'"}.get(text[:1])
        given = text if ends is None or (len(text) > 1 and text.endswith(ends)) else f"{text} ...{ends}"
        raise InputError(
            f"--set {override}: the value cannot be read as YAML: {why}; a shell splits words at blanks and takes "
            f"braces and quotes for its own, so expected the whole in single quotes: --set '{path}={given}'"
        ) from None


def _drop_fields(node: dict[str, Any], path: Sequence[str], kind: Any, schema: type[Section]) -> None:
    """Take the fields out of a section that its new kind does not have."""
    kinds = [schema]
    for part in path:
        if not part.isdigit():
            fields = [section.model_fields[part] for section in kinds if part in section.model_fields]
            kinds = [inner for field in fields for inner in sections_in(field.annotation, field.metadata)]
    chosen = [section for section in kinds if "kind" in section.model_fields]
    chosen = [section for section in chosen if section.model_fields["kind"].default == kind]
    kept = {name for section in chosen for name in section.model_fields}
    dropped = [name for name in node if name not in kept and name != "kind"]
    if not chosen or not dropped:
        return
    for name in dropped:
        del node[name]
    where = ".".join(path)
    were = ", ".join(f"{where}.{name}" for name in dropped)
    LOG.warning("%s.kind: %r is now %r, which has no %s: left out", where, node.get("kind"), kind, were)
