"""Progress of other processes: it comes through an actor, which nobody starts who has no need of one."""

from __future__ import annotations

import time

import ray

from overproof.cluster.ray_cluster import relay_progress
from overproof.cluster.ray_private import living_actors
from overproof.stage_context import Progress, ProgressEvent, TaskProgress

HERE, THERE = TaskProgress("here", 1, 2, ""), TaskProgress("there", 2, 2, "")
WAIT_S = 30


def queues() -> set[int]:
    return {actor.pid for actor in living_actors("_ProgressQueue")}


def test_only_progress_of_another_process_needs_a_queue(ray_cluster: str) -> None:
    seen: list[ProgressEvent] = []

    def report(progress: Progress) -> None:
        progress(THERE)

    before = queues()
    with relay_progress(seen.append) as progress:
        progress(HERE)
        assert seen == [HERE]
        assert queues() <= before
        ray.get([ray.remote(num_cpus=0)(report).remote(progress) for _ in range(2)])
        assert len(queues() - before) == 1  # however often it is sent
        deadline = time.monotonic() + WAIT_S
        while THERE not in seen and time.monotonic() < deadline:
            time.sleep(0.05)
    assert THERE in seen
    assert set(seen) == {HERE, THERE}
