"""Whether a candidate version keeps to its limits on live requests, and why it is rolled back where it does not."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from overproof.config import Canary
from overproof.evaluate.metrics import wilson_interval

MAX_DURATIONS = 1000  # latest ones that are kept
CONFIDENCE = 0.95


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
        low, _ = wilson_interval(candidate.failed, candidate.requests, CONFIDENCE)
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
        _, high = wilson_interval(candidate.agreed, candidate.compared, CONFIDENCE)
        if high < limits.min_agreement:
            return (
                f"it agrees in {candidate.agreed} of {candidate.compared} comparisons; "
                f"expected {limits.min_agreement:.0%} at least"
            )
    return None
