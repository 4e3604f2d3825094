"""Progress of other processes: what reaches the one that shows it, and that nothing is left behind."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import ray

from overproof.cluster.progress_relay import relay_progress
from overproof.cluster.ray_private import stored_values
from overproof.stage_context import Notice, Progress, ProgressEvent, StepTrained, TaskProgress

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have the tests
HERE = TaskProgress("here", 1, 2, "")
THERE = [TaskProgress(f"there {number}", 2, 2, "") for number in range(2)]
WAIT_S = 30


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.05)


def tell(progress: Progress, *events: ProgressEvent) -> None:
    for event in events:
        progress(event)


def test_events_of_several_processes_come_here_and_none_is_left_behind(ray_cluster: str) -> None:
    seen: list[ProgressEvent] = []
    before = stored_values("overproof-progress/")
    with relay_progress(seen.append) as progress:
        progress(HERE)
        assert seen == [HERE]
        ray.get([ray.remote(num_cpus=0)(tell).remote(progress, event) for event in THERE])
        wait_until(lambda: len(seen) == 3)
        assert stored_values("overproof-progress/") == before  # each is taken once
    assert set(seen[1:]) == set(THERE)
    assert stored_values("overproof-progress/") == before


def test_what_is_relayed_are_all_notices_and_the_newest_of_each_kind(ray_cluster: str) -> None:
    seen: list[ProgressEvent] = []
    steps = [StepTrained("train", done, 999, "any words", 1.0) for done in range(1, 1000)]
    writing = TaskProgress("train", 999, 999, "writing the model")
    with relay_progress(seen.append) as progress:
        told = (TaskProgress("train", 0, 999), Notice("one"), *steps, writing, Notice("two"), Notice("two"))
        ray.get(ray.remote(num_cpus=0)(tell).remote(progress, *told))
        wait_until(lambda: writing in seen and steps[-1] in seen)
    assert [event.text for event in seen if isinstance(event, Notice)] == ["one", "two", "two"]
    newest = [event for event in seen if isinstance(event, StepTrained)]
    assert newest[-1] == steps[-1]
    assert len(newest) < len(steps)  # telling each would cost more than the step
    assert [event for event in seen if type(event) is TaskProgress][-1] == writing
