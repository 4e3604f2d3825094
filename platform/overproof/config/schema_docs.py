"""The recipe schema as people and editors read it: field lists for help texts, and JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from overproof.config import Recipe, Section
from overproof.config.base import sections_in


def json_schema() -> str:
    """JSON Schema of a recipe, for editors."""
    return json.dumps(Recipe.model_json_schema(), indent=1) + "\n"


def describe_fields(path: str = "") -> str:
    """One line for each field below a dotted path: name, type, default, meaning."""
    rows = [row for row in _walk(Recipe, "") if not path or row[0] == path or row[0].startswith(f"{path}.")]
    width = max(len(name) for name, *_ in rows)
    return "\n".join(
        f"  {name:<{width}}  {kind}{f' = {default}' if default else ''}{f'  {doc}' if doc else ''}"
        for name, kind, default, doc in rows
    )


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        if name == "kind":
            continue
        path = f"{prefix}{name}"
        nested = list(sections_in(field.annotation, field.metadata))
        if nested:
            several = "[]" if get_origin(field.annotation) is tuple else ""
            for inner in nested:
                kind = f"<{_kind(inner)}>" if len(nested) > 1 else ""
                yield path, f"{several or 'section'}{kind}", "", (inner.__doc__ or "").split("\n")[0]
                yield from _walk(inner, f"{path}{several}{kind}.")
        else:
            yield path, _type(field.annotation), _default(field), field.description or ""


def _kind(section: type[Section]) -> str:
    return str(section.model_fields["kind"].default)


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is Annotated:
        return _type(args[0])
    if origin in (Union, UnionType):
        return " | ".join(_type(a) for a in args)
    if origin is tuple:
        return f"[{_type(args[0])}]"
    return {type(None): "null"}.get(annotation) or str(annotation.__name__)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return ""
    return json.dumps(field.default)
