"""What stands beside the HTTP API of one process."""

from __future__ import annotations

from overproof.serve.keys import Key, Meter
from overproof.serve.replies import Usage
from overproof.serve.traffic import Recorder


class Beside:
    """The process alone."""

    def __init__(self, meter: Meter | None = None, recorder: Recorder | None = None) -> None:
        self._meter, self.recorder = meter or Meter(), recorder  # of traffic, where it is kept

    def admit(self, key: Key) -> float:
        """0 where a request with this key may pass, else the seconds to wait."""
        return self._meter.admit(key)

    def used(self, package: str, key: Key | None, usage: Usage) -> None:  # noqa: ARG002
        """What a request came to, however it ended."""
        if key is not None:
            self._meter.charge(key, usage.total_tokens)

    def began(self, package: str, seconds: float) -> None:
        """A stream sent its first event so long after the request."""

    async def metrics(self) -> str:
        """Figures in Prometheus' text format."""
        return ""

    def close(self) -> None:
        """Serving ends."""
        if self.recorder is not None:
            self.recorder.close()
