"""Whether a candidate version keeps to its limits on live requests, and why it is rolled back where it does not."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from overproof.config import Canary

MAX_DURATIONS = 1000  # latest ones that are kept
Z_95 = 1.96  # standard normal quantile of 95 % intervals


@dataclass
class VersionStats:
    """What was measured of a version. Comparisons ask two versions the same; ``agreed`` of them had one answer."""

    requests: int = 0
    failed: int = 0
    compared: int = 0
    agreed: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_DURATIONS))

    def add(self, other: VersionStats) -> None:
        self.requests += other.requests
        self.failed += other.failed
        self.compared += other.compared
        self.agreed += other.agreed
        self.seconds.extend(other.seconds)


def rollback_reason(limits: Canary, stable: VersionStats, candidate: VersionStats) -> str | None:
    """Why a candidate must be rolled back, None while it may stay.

    Shares are judged by the end of their 95 % interval that favours the candidate.
    """
    if candidate.requests >= limits.min_requests:
        low, _ = wilson_interval(candidate.failed, candidate.requests)
        if low > limits.max_failed:
            return f"{candidate.failed} of {candidate.requests} requests failed; at most {limits.max_failed:.1%} may"
        if len(stable.seconds) >= limits.min_requests and candidate.seconds:
            stable_s, candidate_s = median(stable.seconds), median(candidate.seconds)
            if candidate_s > limits.max_slowdown * stable_s:
                return (
                    f"a request takes {candidate_s * 1e3:.1f} ms against {stable_s * 1e3:.1f} ms; "
                    f"at most {limits.max_slowdown:g} times as long is allowed"
                )
    if candidate.compared >= limits.min_requests:
        _, high = wilson_interval(candidate.agreed, candidate.compared)
        if high < limits.min_agreement:
            return (
                f"it agrees in {candidate.agreed} of {candidate.compared} comparisons; "
                f"expected {limits.min_agreement:.0%} at least"
            )
    return None


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The Wilson score interval of a share (E. B. Wilson, 1927, doi:10.2307/2276774)."""
    share, spread = count / total, Z_95 * Z_95 / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
