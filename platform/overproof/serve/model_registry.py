"""Which model answers a request. One process may hold one model; a gateway finds it among many."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.exceptions import HTTPException

from overproof.serve.async_engine import AsyncEngine
from overproof.serve.response_builder import ServedModel


@dataclass(frozen=True)
class ShadowRequest:
    """A request as any version of its model can answer it."""

    whole: Callable[[AsyncEngine], Awaitable[Any]]
    alike: Callable[[AsyncEngine], Awaitable[Any]]  # gives what two versions that agree have in common


class ModelRegistry(Protocol):
    """The models behind one address."""

    def models(self) -> list[ServedModel]:
        """Those that /v1/models lists."""

    async def find(self, model: str | None, session: str | None) -> ServedModel:
        """The one that was asked for; what may serve several versions keeps a session with one.

        Raises:
            HTTPException: 404, there is none.
        """

    async def check(self) -> None:
        """Return when every model can answer, raise when one cannot."""

    def asked(self, served: ServedModel, asked: ShadowRequest) -> None:
        """A request goes to this model."""

    def ended(self, served: ServedModel, seconds: float, failed: bool) -> None:
        """A request came to its end, or the server failed."""


@dataclass(frozen=True)
class SingleModel:
    """A house with one model."""

    served: ServedModel

    def models(self) -> list[ServedModel]:
        return [self.served]

    async def find(self, model: str | None, session: str | None) -> ServedModel:  # noqa: ARG002
        known = (None, self.served.model.id, self.served.model.overproof.package)
        if model not in known:
            raise unknown_model(model, [self.served])
        return self.served

    async def check(self) -> None:
        await self.served.backend.check()

    def asked(self, served: ServedModel, asked: ShadowRequest) -> None:
        """Nobody compares."""

    def ended(self, served: ServedModel, seconds: float, failed: bool) -> None:
        """Nobody counts."""


def unknown_model(model: str | None, models: list[ServedModel]) -> HTTPException:
    """The refusal of a model that is not there."""
    names = ", ".join(repr(each.model.id) for each in models) or "none yet"
    if model is None:
        return HTTPException(404, f"model: left out, and this server has {names}; name one")
    return HTTPException(404, f"model {model!r} is not served here; expected {names}")
