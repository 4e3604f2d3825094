"""What every section of a recipe is: frozen, closed, and able to say what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_jsonable_python

from overproof.errors import InputError, suggest_name
from overproof.registry import Registry

Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Cpus = Annotated[float, Field(gt=0)]
KvCache = Literal["f16", "q8_0"]  # of keys and values, while a text is generated
Precision = Annotated[
    Literal["fp32", "tf32", "bf16"],
    Field(
        description="Number format in which matrices are multiplied. tf32: GPUs may round what they multiply. bf16: "
        "for all but the output layer; on CPUs without avx512_bf16 or amx_bf16 it takes many times as long."
    ),
]


NO_SECTION = ("model_type", "model_attributes_type", "dict_type")  # pydantic's names of errors


class Resource:
    """Marks a field of a section as part of no result: it says which machines share the work, and how they share it."""


RESOURCE = Resource()


class Section(BaseModel):
    """A frozen part of a recipe that refuses unknown fields. Its schema is built when it is first used."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, defer_build=True)

    @classmethod
    def parse(cls, tree: Any, where: str = "") -> Self:
        """Validate a plain mapping.

        Raises:
            InputError: naming each field that does not fit, what was found and what was expected.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            prefix = f"{where or cls.__name__.lower()}: "
            found = error.errors()
            # A list with bad parts is reported as too short beside, for pydantic counts the good ones.
            around = {each["loc"][:i] for each in found for i in range(len(each["loc"]))}
            told = [each for each in found if each["type"] != "too_short" or each["loc"] not in around]
            # What follows from a bad field is not bad itself.
            told = [each for each in told if each["type"] != "default_factory_not_called"] or told
            raise InputError("\n".join(prefix + _explain(cls, each) for each in told)) from None

    def without_resources(self) -> dict[str, Any]:
        """The fields that results follow from, as JSON: those marked RESOURCE are left out, at any depth."""
        fields = type(self).model_fields.items()
        return {name: _result_part(getattr(self, name)) for name, field in fields if RESOURCE not in field.metadata}


class OneOf:
    """Marks a field whose sections come from a registry: a union that ``kind`` tells apart.

    ``Annotated[ModelSection, OneOf(FAMILIES, Pretrained)]`` takes the section of every family, and further ones.
    """

    def __init__(self, registry: Registry[Any], *further: type[Section]) -> None:
        self.registry, self.further = registry, further

    @property
    def sections(self) -> tuple[type[Section], ...]:
        """Every section that may stand there."""
        found = (implementation.section for implementation in self.registry.values())
        return (*(section for section in found if section is not None), *self.further)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        del source
        return handler.generate_schema(Annotated[Union[self.sections], Field(discriminator="kind")])  # noqa: UP007


def _result_part(value: Any) -> Any:
    if isinstance(value, Section):
        return value.without_resources()
    if isinstance(value, list | tuple):
        return [_result_part(each) for each in value]
    return to_jsonable_python(value)


def sections_in(annotation: Any, marks: Sequence[Any] = ()) -> Iterator[type[Section]]:
    """The sections that a field's type names: several where it is a union of kinds. ``marks`` are its metadata."""
    kinds = next((mark for mark in marks if isinstance(mark, OneOf)), None)
    if kinds:
        yield from kinds.sections
    elif get_origin(annotation) is Annotated:
        yield from sections_in(annotation.__origin__, annotation.__metadata__)
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    else:
        for inner in get_args(annotation):
            yield from sections_in(inner)


def _explain(section: type[Section], error: Any) -> str:
    path, fields, sections = _field_path(section, error["loc"])
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        return (
            f"{path}: unknown field{suggest_name(name, fields)}; `overproof schema --text` lists the fields there are"
        )
    if error["type"] == "missing":
        return f"{path}: missing; expected a value"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if error["loc"] else message
    if error["type"] == "union_tag_invalid":
        kinds = [kind.strip(" '") for kind in error["ctx"]["expected_tags"].split(",")]
        return (
            f"{path}.kind: found {error['ctx']['tag']!r}; expected one of {error['ctx']['expected_tags']}"
            f"{suggest_name(error['ctx']['tag'], kinds)}"
        )
    if error["type"] in NO_SECTION and sections:
        return f"{path}: found {error['input']!r}; expected a section {_described(sections)}"
    if error["type"] == "union_tag_not_found":
        return f"{path}.kind: missing; expected {_described(sections).removeprefix('whose kind is ')}"
    if error["type"] == "tuple_type":
        return f"{path}: found {error['input']!r}; expected a list"
    return f"{path}: found {error['input']!r}; {message[0].lower()}{message[1:]}"


def _described(sections: Sequence[type[Section]]) -> str:
    if len(sections) == 1:
        return f"with fields such as {', '.join(list(sections[0].model_fields)[:4])}"
    return f"whose kind is {' or '.join(repr(section.model_fields['kind'].default) for section in sections)}"


def _field_path(section: type[Section], loc: Sequence[str | int]) -> tuple[str, list[str], list[type[Section]]]:
    """A dotted path to where an error lies, the fields of the section around it, and the sections that may stand there.

    Pydantic also names which kind or type of a union was chosen: that is no part of the path.
    """
    path: list[str] = []
    choices, around, mapping = [section], section, False
    for part in loc:
        kinds = {choice.model_fields["kind"].default: choice for choice in choices} if len(choices) > 1 else {}
        if part in kinds:
            choices = [kinds[part]]
        elif isinstance(part, int) or mapping:
            path.append(str(part))
        elif choices:
            path.append(part)
            around = choices[0]
            field = around.model_fields.get(part)
            choices = list(sections_in(field.annotation, field.metadata)) if field else []
            mapping = field is not None and get_origin(field.annotation) is dict
    return ".".join(path) or "recipe", list(around.model_fields), choices
