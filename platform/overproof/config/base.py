"""What every section of a recipe is: frozen, closed, and able to say what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Self, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overproof.errors import InputError
from overproof.registry import Registry

Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Cpus = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A frozen part of a recipe that refuses unknown fields. Its schema is built when it is first used."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

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
            raise InputError("\n".join(prefix + _explain(e) for e in error.errors())) from None


class OneOf:
    """Marks a field whose sections come from a registry: a union that ``kind`` tells apart.

    ``Annotated[ModelSection, OneOf(FAMILIES, Pretrained)]`` takes the section of every family, and further ones.
    """

    def __init__(self, registry: Registry[Any], *further: type[Section]) -> None:
        self.registry, self.further = registry, further

    @property
    def sections(self) -> tuple[type[Section], ...]:
        """Every section that may stand there."""
        return (*(implementation.section for implementation in self.registry.values()), *self.further)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        del source
        return handler.generate_schema(Annotated[Union[self.sections], Field(discriminator="kind")])  # noqa: UP007


def _explain(error: Any) -> str:
    tags = set(_tags(Section))
    path = ".".join(str(part) for part in error["loc"] if part not in tags) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown field; `overproof schema --text` lists the fields there are"
    if error["type"] == "missing":
        return f"{path}: missing; expected a value"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if error["loc"] else message
    return f"{path}: found {error['input']!r}; {message[0].lower()}{message[1:]}"


def _tags(section: type[Section]) -> Iterator[str]:
    """Every ``kind`` there is: pydantic puts the one that was chosen into the path of an error."""
    for each in section.__subclasses__():
        if "kind" in each.model_fields:
            yield each.model_fields["kind"].default
        yield from _tags(each)
