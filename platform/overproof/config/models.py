"""Models: from their configuration, from a directory, or behind an endpoint. See also ``student_models``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from overproof.config.base import RESOURCE, Count, OneOf, Section
from overproof.errors import InputError
from overproof.registry import FAMILIES


class ModelSection(Section):
    """What every description of a model has; ``kind`` names its family, or where its weights come from."""

    kind: str
    experimental: ClassVar[str | None] = None  # what of it is not as one would expect, where it is for study


class LayeredModel(ModelSection):
    """The shape of a model made of equal layers, with fresh weights."""

    hidden_size: Count = Field(description="Width of the residual stream.")
    layers: Count = Field(description="Layers.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")


class StagedModel(ModelSection):
    """The shape of a model made of stages of convolutional blocks, with fresh weights."""

    hidden_sizes: tuple[Count, ...] = Field(min_length=1, description="Channels of each stage.")
    depths: tuple[Count, ...] = Field(min_length=1, description="Blocks of each stage.")

    def narrowed(self, hidden_sizes: tuple[int, ...]) -> Self:
        """The section of what is left where stages keep so many channels.

        Raises:
            InputError: it has other stages, or fewer channels.
        """
        wanted, there = list(hidden_sizes), list(self.hidden_sizes)
        if len(wanted) != len(there) or any(more > most for more, most in zip(wanted, there, strict=True)):
            raise InputError(
                f"hidden_sizes {wanted}: the teacher has {there}; expected {len(there)} numbers, each at most that"
            )
        return type(self).parse(self.model_dump() | {"hidden_sizes": wanted}, "what is left of the teacher")


class Pretrained(ModelSection):
    """A Hugging Face directory with safetensors and, for text, the tokenizer.json of the data."""

    kind: Literal["pretrained"] = "pretrained"
    path: str = Field(description="Folder or URI: hf://ORG/NAME or hf://ORG/NAME@REVISION, s3://, gs://, ...")


class Served(ModelSection):
    """A teacher that runs elsewhere, behind an OpenAI-compatible endpoint that tells what its model says of the tokens
    of a prompt: vLLM's, or that of ``overproof serve``. Its weights are never here.
    """

    kind: Literal["served"] = "served"
    url: Annotated[str, RESOURCE] = Field(description="Up to the version, such as http://HOST:8000/v1.")
    model: str = Field(description="Its name there, as GET /models lists it.")
    revision: str | None = Field(
        None, description="Of its weights, where the endpoint tells none: another one makes the cache anew."
    )
    key_env: Annotated[str | None, RESOURCE] = Field(
        None, description="Environment variable that holds the API key, on every node; null sends none."
    )
    rows_per_request: Annotated[Count, RESOURCE] = Field(4, description="Rows in a request.")
    concurrent_requests: Annotated[Count, RESOURCE] = Field(8, description="Requests in flight, of each actor.")
    timeout_s: Annotated[float, RESOURCE] = Field(300.0, gt=0, description="Seconds that an answer may take.")
    retry_s: Annotated[float, RESOURCE] = Field(
        600.0, ge=0, description="Seconds after which an endpoint that is busy or away is given up."
    )

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.port == 0
            or parts.query
            or "@" in parts.netloc
        ):
            raise ValueError("expected http://HOST:PORT/v1 or https://..., with the key in the variable of key_env")
        return url.rstrip("/")


Model = Annotated[ModelSection, OneOf(FAMILIES, Pretrained, Served)]
