"""Following a training: what happened is read from events, whatever their words."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from overproof.cli.fault_injection import PausedProgress, ProgressLog, RunningTraining, StepLimit
from overproof.stage_context import Notice, StepTrained, TaskProgress, TrainingResumed, no_progress


def step(done: int, workers: int = 2) -> StepTrained:
    return StepTrained("train", done, 100, "any words at all", 1.0, workers)


def test_a_step_is_found_by_its_number_and_its_workers() -> None:
    log = ProgressLog(no_progress)
    misleading = TaskProgress("train", 9, 100, "loss 1.00 · 3 workers")  # no step, though it reads like one
    for event in (misleading, Notice("loss; going on from step 5"), step(3), step(7), step(8, workers=3)):
        log(event)
    assert [log.wait_step(at_least=n, timeout_s=0)[1].done for n in (0, 4, 8)] == [3, 7, 8]  # type: ignore[index]
    assert log.wait_step(workers=3, timeout_s=0)[1].done == 8  # type: ignore[index]
    assert log.wait_step(workers=4, timeout_s=0) is None
    assert log.wait_step(since_s=time.monotonic(), timeout_s=0) is None


def test_a_recovery_has_the_step_it_resumed_from(tmp_path: Path) -> None:
    log = ProgressLog(no_progress)
    training = RunningTraining(log, StepLimit(tmp_path / "limit"), None)
    log(TrainingResumed.after("an earlier fault", 2))
    began_s = time.monotonic()
    log(Notice("going on from step 99"))
    log(TrainingResumed("in words of another kind", 20))
    log(TrainingResumed.after("checkpoint 00000020-x: rank0.pt is missing", 10))
    log(step(11))
    found = training.recovery("kill", 24, began_s)
    assert found
    assert (found.resumed_from, found.lost) == (10, 14)


def test_who_waits_is_woken_by_a_step_and_by_the_end() -> None:
    log = ProgressLog(no_progress)
    found: list[int | None] = []

    def wait() -> None:
        for at_least in (1, 2):
            reached = log.wait_step(at_least=at_least)
            found.append(reached[1].done if reached else None)

    thread = threading.Thread(target=wait)
    thread.start()
    log(step(1))
    log.finish()
    thread.join()
    assert found == [1, None]


def test_a_training_is_held_at_a_step_alone(tmp_path: Path) -> None:
    limit, told = StepLimit(tmp_path / "limit"), list[object]()
    limit.set(5)
    paused = PausedProgress(told.append, limit)
    paused(step(4))
    paused(TaskProgress("train", 50, 100))  # no step
    thread = threading.Thread(target=paused, args=(step(5),))
    thread.start()
    while len(told) < 3:
        thread.join(0.01)
    assert thread.is_alive()
    limit.set()
    thread.join()
