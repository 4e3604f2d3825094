"""Ranks of this machine that are waited for; what they train is held by test_resume.py."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from overproof.train.local_launcher import LocalWorkers, WorkersDied
from overproof.train.train_job import ResumePoint


class EndsWhileLookedAt(ForkProcess):
    """A real process that has ended, and was alive when it was first asked."""

    asked = 0

    def is_alive(self) -> bool:
        self.asked += 1
        return self.asked == 1


def test_ranks_that_end_between_two_looks_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    process = EndsWhileLookedAt(target=os._exit, args=(3,))
    process.start()
    multiprocessing.connection.wait([process.sentinel])
    (tmp_path / "ranks").mkdir()
    workers = LocalWorkers(ResumePoint(), (process,), (multiprocessing.Pipe()[0],), tmp_path / "ranks")
    raised: list[BaseException] = []

    def join() -> None:
        with pytest.raises(WorkersDied, match=r"ranks ended with \[3\]") as error:
            workers.join()
        raised.append(error.value)

    waiting = threading.Thread(target=join, daemon=True)
    waiting.start()
    waiting.join(timeout=10)
    assert raised
