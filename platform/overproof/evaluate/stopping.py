"""How many test units are scored: all, or as many as it takes until every interval that a rule looks at is narrow.

Units are taken in the order of ``Task.units``, which the content alone decides, in rounds that each double their
number. After a round only the widths of intervals are looked at, never where they lie, and against a limit that the
recipe fixed before (fixed-width sequential intervals: Chow and Robbins, 1965, doi 10.1214/aoms/1177700156). So nothing
stops because a candidate does well. A width may be small by chance: hence few looks, and none before ``FEWEST`` units.
Time may end it at any unit: each file has its share, and what all of them have scored counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf

from overproof.config import Agreement, Evaluate, Improvement, Keep, Quality, Regression, Rule
from overproof.evaluate.gate import reference_name
from overproof.evaluate.metrics import Comparison
from overproof.export.stage import Export
from overproof.tasks.base import UNITS_TOGETHER, Metric

FEWEST = UNITS_TOGETHER  # units before the first look at a width


def next_count(done: int, available: int, settings: Evaluate, spent_s: float) -> int:
    """How many units shall have been scored after the next round; ``done`` where the time allows no further round."""
    if settings.narrow is None and settings.score_s is None:
        return available
    if done == 0:
        return min(FEWEST, available)
    doubled = min(2 * done, available)
    if settings.score_s is None:
        return doubled
    return max(done, min(doubled, int(done * settings.score_s / spent_s)))


def time_limits(settings: Evaluate, seconds: Mapping[str, float], spent_s: float) -> dict[str, float | None]:
    """How long each file may be scored in a round that begins after ``spent_s`` seconds, of which each took so many: so
    that all of them together, ``concurrent_tasks`` at a time, end with ``score_s``. At first all files get as much.
    """
    if settings.score_s is None:
        return dict.fromkeys(seconds, None)
    if not any(seconds.values()):
        each_s = settings.score_s * min(settings.concurrent_tasks, len(seconds)) / len(seconds)
        return dict.fromkeys(seconds, each_s)
    left_s = settings.score_s - spent_s
    return {name: left_s * took_s / spent_s for name, took_s in seconds.items()}


def widest(
    rules: Iterable[Rule], candidates: Sequence[Export], metrics: Mapping[str, Mapping[str, Metric]],
    comparisons: Iterable[Comparison],
) -> float | None:  # fmt: skip
    """The half-width of the widest interval that a rule looks at, as a share of what the rule allows.

    A regression allows ``at_most``, an improvement ``at_least``, agreement and what is kept, both of which are shares,
    what is left to 1. Where that is 0 the share is infinite, and for a limit of the quality itself, of which no width
    is known to be enough; and where there is no interval yet, or one without width: that two files did not differ on
    few units says only that they differ rarely. None: no rule looks at an interval.
    """
    compared = {(c.name, c.against): c for c in comparisons}
    shares = []
    for rule in rules:
        for export in candidates:
            match rule:
                case Regression() | Improvement():
                    found = compared[export.name, reference_name(rule, export.student)]
                    low, high = found.low, found.high
                    allowed = rule.at_most if isinstance(rule, Regression) else rule.at_least
                case Keep():
                    found = compared[export.name, reference_name(rule, export.student)]
                    low, high, allowed = found.kept_low, found.kept_high, 1 - rule.at_least
                case Agreement():
                    agreed = metrics[export.name]["agreement"]
                    low, high, allowed = agreed.low, agreed.high, 1 - rule.at_least
                case Quality():
                    shares.append(inf)
                    continue
                case _:
                    continue
            width = 0.0 if low is None or high is None else high - low
            shares.append(width / 2 / allowed if width > 0 and allowed > 0 else inf)
    return max(shares, default=None)
