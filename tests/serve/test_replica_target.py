"""How many replicas the load asks for: steps, noise, and no load, on a clock that the test moves."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import pairwise

from overproof.config import Serve
from overproof.serve.autoscaler import ReplicaTarget

SETTINGS = Serve(min_replicas=1, max_replicas=4, slots=4, upscale_delay_s=1.0, downscale_delay_s=60.0)
TICK_S = 0.5


def follow(scale: ReplicaTarget, loads: Iterable[float], begin_s: float = 0.0) -> list[int]:
    return [scale.observe(load, begin_s + TICK_S * tick) for tick, load in enumerate(loads)]


def test_a_step_in_load_has_replicas_added_after_its_delay_and_no_more_than_are_allowed() -> None:
    counts = follow(ReplicaTarget(SETTINGS, 1), [0] * 10 + [12] * 20)
    assert counts[:11] == [1] * 11
    added_s = next(i for i, count in enumerate(counts) if count > 1) * TICK_S - 5.0
    assert 1.0 <= added_s <= 2.0
    assert counts[-1] == 3
    assert follow(ReplicaTarget(SETTINGS, 1), [100] * 20)[-1] == 4


def test_replicas_go_after_their_delay_to_the_most_that_was_wanted_meanwhile() -> None:
    scale = ReplicaTarget(SETTINGS, 4)
    counts = follow(scale, [1] * 60 + [7] * 10 + [1] * 61)  # 65 s with a wave of two replicas' worth
    removed = next(i for i, count in enumerate(counts) if count < 4)
    assert removed * TICK_S >= 60
    assert counts[removed] == 2
    assert follow(scale, [0] * 300, begin_s=1000)[-1] == 1


def test_steady_load_moves_nothing() -> None:
    """An hour of noise around what two replicas are for, and right at the border between two and three."""
    draw = random.Random(0)
    for mean in (6.0, 8.0):
        scale = ReplicaTarget(SETTINGS, 2)
        counts = follow(scale, (max(0.0, draw.gauss(mean, 0.3)) for _ in range(7200)))
        assert set(counts) == {2}


def test_noise_of_single_requests_does_not_flap() -> None:
    """Requests that come and go one by one, four replicas' worth at most: after it has grown it stays."""
    draw = random.Random(1)
    scale = ReplicaTarget(SETTINGS, 1)
    counts = follow(scale, (sum(draw.random() < 0.5 for _ in range(16)) for _ in range(7200)))
    changes = sum(a != b for a, b in pairwise(counts))
    assert changes <= 8
    assert counts[-1] >= 2


def test_from_none_the_first_request_has_one_at_once_and_silence_has_none_again() -> None:
    scale = ReplicaTarget(SETTINGS.model_copy(update={"min_replicas": 0, "downscale_delay_s": 2.0}), 0)
    assert follow(scale, [0] * 5) == [0] * 5
    assert scale.observe(1, 3.0) == 1
    counts = follow(scale, [0] * 20, begin_s=3.5)
    gone_s = counts.index(0) * TICK_S
    assert 2.0 <= gone_s <= 2.0 + 2.5
    assert set(counts[counts.index(0) :]) == {0}


def test_a_count_out_of_its_limits_is_brought_into_them() -> None:
    assert ReplicaTarget(SETTINGS, 9).replicas == 4
    assert ReplicaTarget(SETTINGS, 0).replicas == 1
