"""How a stage says how far it is. A stage calls it; who draws the bar is not the stage's business."""

from typing import Protocol

NOTICE = "notice"  # a task whose words are events: each is shown, on a line that stays


class Progress(Protocol):
    """Picklable, cheap and safe to call from any process."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Say that ``done`` of ``total`` units of a task are over; ``note`` stands beside the bar."""


def quiet(task: str, done: int, total: int, note: str = "") -> None:
    """Show nothing."""
