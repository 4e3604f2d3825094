"""What requests and replies about one model have in common, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from overproof.files import is_unicode

MOST_ROWS = 1024  # in a request
MOST_NAME_CHARACTERS = 512


def check_unicode(text: Any) -> Any:
    """The text, if it can be written as UTF-8."""
    if isinstance(text, str) and not is_unicode(text):
        raise ValueError("expected valid Unicode")
    return text


UnicodeText = Annotated[str, BeforeValidator(check_unicode)]


class RequestPart(BaseModel):
    """The body of a request, or an object in it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _fields(cls, part: Any) -> Any:
        """Clients send null for what they leave out, as OpenAI's does of a reply's message that it sends back. Of many
        unknown fields one is told: to tell of all takes seconds.
        """
        if not isinstance(part, dict):
            return part
        known = {field.alias or name for name, field in cls.model_fields.items()}
        given = {name: value for name, value in part.items() if value is not None}
        unknown = [name for name in given if name not in known]
        return {name: value for name, value in given.items() if name in known or name == unknown[0]}


class ModelRequest(RequestPart):
    """The body of a request to a model."""

    model: UnicodeText | None = Field(
        None,
        max_length=MOST_NAME_CHARACTERS,
        description="Name of the model, or the package's id of one version; may be left out where there is one.",
    )
    user: UnicodeText | None = Field(
        None,
        max_length=MOST_NAME_CHARACTERS,
        description="Keeps its requests with one version, where several are tried.",
    )


class ModelReply(BaseModel):
    """What every reply about a model says: ``package`` is the id that `overproof show` takes."""

    model: str
    package: str
    system_fingerprint: str  # start of the served file's sha256


class RowReply(BaseModel):
    """What is replied for one row of a request."""

    index: int = Field(description="Of the row, from 0 on.")


class ClassReply(RowReply):
    """A row that has one class."""

    label: int = Field(description="Number of the likeliest class.")
    name: str = Field(description="Its name.")
    probabilities: list[float] = Field(description="Of each class, in the order of the model's `details.classes`.")
