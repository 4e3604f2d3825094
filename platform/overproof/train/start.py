"""Where a group of workers begins."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from overproof.train.checkpoint import Kept


@dataclass(frozen=True)
class Start:
    """One attempt at a training; every restart of the workers is a new one."""

    checkpoint: Kept | None = None
    attempt: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.checkpoint.step if self.checkpoint else 0
