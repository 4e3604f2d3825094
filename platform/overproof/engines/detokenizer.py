"""Streamed text from tokens: without incomplete characters, and ended before the first stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class StopFilter:
    """Ends a streamed text before the first stop string, and holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next text; give what may be sent, and whether a stop string was found."""
        self._held += text
        cuts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if cuts:
            return self._held[: min(cuts)], True
        longest = min(len(self._held), max((len(stop) - 1 for stop in self._stops), default=0))
        keep = next((n for n in range(longest, 0, -1) if self._may_begin(self._held[-n:])), 0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def flush(self) -> str:
        """What was held back; call it when no more text follows."""
        return self._held

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


class Detokenizer:
    """Turns tokens into text as they come, and holds back a character until all its bytes are there."""

    def __init__(self, pieces: Sequence[bytes], stops: Sequence[str]) -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._filter = StopFilter(stops)
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that one more token completes; sets ``stopped`` when a stop string is found."""
        shown, self.stopped = self._filter.push(self._decode(self._pieces[token]))
        return shown

    def flush(self) -> str:
        """What was held back; call it when no more tokens follow."""
        return "" if self.stopped else self._filter.flush()
