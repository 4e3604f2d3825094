"""Whether a candidate version keeps to its limits on live requests, and why it is rolled back where it does not."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from overproof.config import Canary
from overproof.evaluate.metrics import wilson_interval
from overproof.serve.model_registry import TimedAnswer
from overproof.units import format_count, format_latency, format_percent

MAX_PAIRS = 1000  # latest ones that are kept
CONFIDENCE = 0.95


@dataclass
class VersionStats:
    """What was measured of a version.

    Comparisons ask the stable version and this one the same, at the same time; ``agreed`` of them had one answer.
    ``pairs`` are the seconds a token (or a row) of both, the stable one's first, where both gave as many: requests of
    clients are long and short as they like, and are no measure of a version.
    """

    requests: int = 0
    failed: int = 0
    compared: int = 0
    agreed: int = 0
    pairs: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MAX_PAIRS))

    def add(self, other: VersionStats) -> None:
        self.requests += other.requests
        self.failed += other.failed
        self.compared += other.compared
        self.agreed += other.agreed
        self.pairs.extend(other.pairs)

    def compare(self, stable: TimedAnswer, candidate: TimedAnswer, agree: bool) -> None:
        """Take in what both said of the same."""
        self.compared += 1
        self.agreed += agree
        if stable.units == candidate.units > 0:
            self.pairs.append((stable.seconds / stable.units, candidate.seconds / candidate.units))


def describe_evidence(limits: Canary, tried: VersionStats) -> str:
    """What was measured of a candidate, with intervals, and what would have it taken back."""
    failed = _share(tried.failed, tried.requests)
    agreed = f"agrees in {_share(tried.agreed, tried.compared)} comparisons" if tried.compared else "not compared yet"
    speed = "no pair of times yet"
    if tried.pairs:
        stable, own = (format_latency(median(each)) for each in zip(*tried.pairs, strict=True))
        speed = f"{own} a token or row, the other {stable} ({format_count(len(tried.pairs), 'pair')})"
    taken_back = (
        f"above {100 * limits.max_failed:g} % failed, below {100 * limits.min_agreement:g} % agreement, more than "
        f"{limits.max_slowdown:g} times as slow in half of the pairs"
    )
    so_far = f"{failed} requests failed; {agreed}; {speed}"
    return f"{so_far}. Taken back once it is certain, from {limits.min_requests} of each on: {taken_back}"


def _share(count: int, of: int) -> str:
    """Such as ``3 of 60 (1.7 to 13.7 %)``."""
    if not of:
        return "0 of 0"
    low, high = wilson_interval(count, of, CONFIDENCE)
    return f"{count} of {of:,} ({100 * low:.1f} to {100 * high:.1f} %)"


def too_little(limits: Canary, tried: VersionStats, compares: bool) -> tuple[str, ...]:
    """Of what there is less than a judgement needs, in words; empty where there is enough. ``compares``: whether it is
    asked the same as the stable version at all.
    """
    found = {"requests": tried.requests} | ({"comparisons": tried.compared} if compares else {})
    return tuple(f"{count} {what}" for what, count in found.items() if count < limits.min_requests)


def rollback_reason(limits: Canary, candidate: VersionStats) -> str | None:
    """Why a candidate must be rolled back, None while it may stay.

    Shares are judged by the end of their 95 % interval that favours the candidate; so is the share of pairs in which
    it is too slow, of which the median is when that share is above a half (the sign test).
    """
    if candidate.requests >= limits.min_requests:
        low, _ = wilson_interval(candidate.failed, candidate.requests, CONFIDENCE)
        if low > limits.max_failed:
            allowed = f"at most {format_percent(limits.max_failed)} may"
            return f"{candidate.failed} of {candidate.requests} requests failed; {allowed}"
    if len(candidate.pairs) >= limits.min_requests:
        slow = sum(own_s > limits.max_slowdown * stable_s for stable_s, own_s in candidate.pairs)
        low, _ = wilson_interval(slow, len(candidate.pairs), CONFIDENCE)
        if low > 0.5:
            stable, own = (format_latency(median(each)) for each in zip(*candidate.pairs, strict=True))
            return (
                f"asked the same, it takes {own} a token or row against {stable}, and in "
                f"{slow} of {len(candidate.pairs)} pairs more than {limits.max_slowdown:g} times as long as the other"
            )
    if candidate.compared >= limits.min_requests:
        _, high = wilson_interval(candidate.agreed, candidate.compared, CONFIDENCE)
        if high < limits.min_agreement:
            return (
                f"it agrees in {candidate.agreed} of {candidate.compared} comparisons; "
                f"expected {format_percent(limits.min_agreement)} at least"
            )
    return None
