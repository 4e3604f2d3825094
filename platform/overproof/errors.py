"""The two ways a run ends early, with the exit code of each; and the nearest name to one that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(Exception):
    """What was given cannot be used. The message says where, what was found, what was expected, what to do.

    The command line prints the message alone and exits with 2. ``code`` is what OpenAI's API calls the error, where
    clients go by it.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class GateRefused(Exception):
    """No candidate passed the gate. The message lists the reasons; the command line exits with 1."""


def suggest_name(name: str, names: Iterable[str], similarity: float = 0.6) -> str:
    """``, nearest is 'steps'`` for a message about an unknown name; nothing where no name is as similar (0 to 1)."""
    spelled = {each.lower(): each for each in names}
    near = get_close_matches(name.lower(), list(spelled), n=1, cutoff=similarity)
    return f", nearest is {spelled[near[0]]!r}" if near else ""
