"""Whether a version that is tried on live requests keeps to its limits."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from overproof.config import Canary

KEPT = 1000  # latest durations
Z = 1.96  # 95 % intervals


@dataclass
class VersionStats:
    """What was seen of a version."""

    requests: int = 0
    failed: int = 0
    compared: int = 0
    alike: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, other: VersionStats) -> None:
        self.requests += other.requests
        self.failed += other.failed
        self.compared += other.compared
        self.alike += other.alike
        self.seconds.extend(other.seconds)


def rollback_reason(limits: Canary, old: VersionStats, new: VersionStats) -> str | None:
    """Why the new version must go, None while it may stay.

    Shares are judged by the end of their 95 % interval that speaks for the new version.
    """
    if new.requests >= limits.min_requests:
        low, _ = wilson_interval(new.failed, new.requests)
        if low > limits.max_failed:
            return f"{new.failed} of {new.requests} requests failed; at most {limits.max_failed:.1%} may"
        if len(old.seconds) >= limits.min_requests and new.seconds:
            times = median(new.seconds) / median(old.seconds)
            if times > limits.max_slowdown:
                return (
                    f"a request takes {median(new.seconds) * 1e3:.1f} ms against {median(old.seconds) * 1e3:.1f} ms; "
                    f"at most {limits.max_slowdown:g} times as long is allowed"
                )
    if new.compared >= limits.min_requests:
        _, high = wilson_interval(new.alike, new.compared)
        if high < limits.min_agreement:
            return (
                f"it agrees in {new.alike} of {new.compared} comparisons; expected {limits.min_agreement:.0%} at least"
            )
    return None


def wilson_interval(count: int, of: int) -> tuple[float, float]:
    """The Wilson score interval of a share (E. B. Wilson, 1927, doi:10.2307/2276774)."""
    share, spread = count / of, Z * Z / of
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
