"""Which model answers a request. One process may hold one model; a gateway finds it among many."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.exceptions import HTTPException

from overproof.serve.backend import Backend
from overproof.serve.shapes import Served


@dataclass(frozen=True)
class Asked:
    """A request as any version of its model can answer it."""

    whole: Callable[[Backend], Awaitable[Any]]
    alike: Callable[[Backend], Awaitable[Any]]  # gives what two versions that agree have in common


class House(Protocol):
    """The models behind one address."""

    def models(self) -> list[Served]:
        """Those that /v1/models lists."""

    async def find(self, model: str | None, session: str | None) -> Served:
        """The one that was asked for; what may serve several versions keeps a session with one.

        Raises:
            HTTPException: 404, there is none.
        """

    async def check(self) -> None:
        """Return when every model can answer, raise when one cannot."""

    def asked(self, served: Served, asked: Asked) -> None:
        """A request goes to this model."""

    def ended(self, served: Served, seconds: float, failed: bool) -> None:
        """A request came to its end, or the server failed."""


@dataclass(frozen=True)
class One:
    """A house with one model."""

    served: Served

    def models(self) -> list[Served]:
        return [self.served]

    async def find(self, model: str | None, session: str | None) -> Served:  # noqa: ARG002
        known = (None, self.served.model.id, self.served.model.overproof.package)
        if model not in known:
            raise unknown(model, [self.served])
        return self.served

    async def check(self) -> None:
        await self.served.backend.check()

    def asked(self, served: Served, asked: Asked) -> None:
        """Nobody compares."""

    def ended(self, served: Served, seconds: float, failed: bool) -> None:
        """Nobody counts."""


def unknown(model: str | None, models: list[Served]) -> HTTPException:
    """The refusal of a model that is not there."""
    names = ", ".join(repr(each.model.id) for each in models) or "none yet"
    if model is None:
        return HTTPException(404, f"model: left out, and this server has {names}; name one")
    return HTTPException(404, f"model {model!r} is not served here; expected {names}")
