"""Progress of other processes: it comes through an actor, which nobody starts who has no need of one."""

from __future__ import annotations

import time

import ray

from overproof.cluster.ray_cluster import relay_progress
from overproof.cluster.ray_private import living_actors
from overproof.stage_context import Progress, ProgressEvent, TaskProgress

HERE = TaskProgress("here", 1, 2, "")
THERE = [TaskProgress(f"there {number}", 2, 2, "") for number in range(2)]
WAIT_S = 30


def queues() -> set[int]:
    return {actor.pid for actor in living_actors("_ProgressQueue")}


def test_only_progress_of_another_process_needs_a_queue(ray_cluster: str) -> None:
    seen: list[ProgressEvent] = []

    def report(progress: Progress, event: ProgressEvent) -> None:
        progress(event)

    before = queues()
    with relay_progress(seen.append) as progress:
        progress(HERE)
        assert seen == [HERE]
        assert queues() <= before
        ray.get([ray.remote(num_cpus=0)(report).remote(progress, event) for event in THERE])
        deadline = time.monotonic() + WAIT_S
        while len(seen) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)  # a new actor is not known as alive before it has answered
        assert len(queues() - before) == 1  # however often it is sent
    assert seen[0] == HERE
    assert set(seen[1:]) == set(THERE)
