"""Which model answers a request: an interface for the HTTP routes, and its simplest form, one model in this process."""

from __future__ import annotations

import operator
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.exceptions import HTTPException

from overproof.serve.response_builder import ServedModel


@dataclass(frozen=True)
class TimedAnswer:
    """What one of the versions that are asked the same said, and how long it took for how many tokens or rows."""

    answer: Any
    seconds: float
    units: int


@dataclass(frozen=True)
class ShadowRequest:
    """A request that another version of its model can be asked too.

    ``replay`` asks all of it; ``compare`` asks the same small part of every version, and ``agree`` says whether two
    versions' answers do.
    """

    replay: Callable[[ServedModel], Awaitable[Any]]
    compare: Callable[[ServedModel], Awaitable[TimedAnswer]]
    agree: Callable[[Any, Any], bool] = operator.eq


class ModelRegistry(Protocol):
    """The models behind one address."""

    def models(self) -> list[ServedModel]:
        """Those that /v1/models lists."""

    async def find(self, model: str | None, session: str | None) -> ServedModel:
        """The model of a name or package id; where several versions share the traffic, a session stays with one.

        Raises:
            HTTPException: 404, there is none.
        """

    async def check(self) -> None:
        """Return when every model can answer, raise when one cannot."""

    async def check_ready(self) -> None:
        """Return when this server should be sent requests: some model can answer, and it does not stop."""

    def on_request(self, served: ServedModel, request: ShadowRequest) -> None:
        """Called when a request goes to this model."""

    def on_complete(self, served: ServedModel, failed: bool) -> None:
        """Called when a request has ended; ``failed`` where the server is to blame."""


@dataclass(frozen=True)
class SingleModel:
    """A registry of one model."""

    served: ServedModel

    def models(self) -> list[ServedModel]:
        return [self.served]

    async def find(self, model: str | None, session: str | None) -> ServedModel:  # noqa: ARG002
        names = (None, self.served.model.id, self.served.model.overproof.package)
        if model not in names:
            raise unknown_model(model, [self.served])
        return self.served

    async def check(self) -> None:
        await self.served.engine.check()

    async def check_ready(self) -> None:
        await self.check()

    def on_request(self, served: ServedModel, request: ShadowRequest) -> None:
        """There is no other version to ask."""

    def on_complete(self, served: ServedModel, failed: bool) -> None:
        """There is no other version to compare with."""


def unknown_model(model: str | None, models: list[ServedModel]) -> HTTPException:
    """The error for a model that is not served."""
    names = ", ".join(repr(each.model.id) for each in models) or "none yet"
    if model is None:
        return HTTPException(404, f"model: left out, and this server has {names}; name one")
    return HTTPException(404, f"model {model!r} is not served here; expected {names}")
