"""How many test units are scored: all, or as many as it takes until every interval that a rule looks at is narrow.

Units are taken in the order of ``Task.units``, which the content alone decides, in rounds that each double their
number. After a round only the widths of intervals are looked at, never where they lie, and against a limit that the
recipe fixed before (fixed-width sequential intervals: Chow and Robbins, 1965, doi 10.1214/aoms/1177700156). So nothing
stops because a candidate does well. A width may be small by chance: hence few looks, and none before ``FEWEST`` units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf

from overproof.config import Agreement, Evaluate, Improvement, Keep, Quality, Regression, Rule
from overproof.evaluate.gate import reference_name
from overproof.evaluate.metrics import Comparison
from overproof.export.stage import Export
from overproof.tasks.base import Metric

FEWEST = 32  # units before the first look


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


def widest(
    rules: Iterable[Rule], candidates: Sequence[Export], metrics: Mapping[str, Mapping[str, Metric]],
    comparisons: Iterable[Comparison],
) -> float | None:  # fmt: skip
    """The half-width of the widest interval that a rule looks at, as a share of what the rule allows.

    A regression allows ``at_most``, an improvement ``at_least``, agreement and what is kept what is left to 1. Where
    that is 0 the share is infinite, and for a limit of the quality itself, of which no width is known to be enough;
    and where there is no interval yet, or one without width: that two files did not differ on few units says only that
    they differ rarely. None: no rule looks at an interval.
    """
    compared = {(c.name, c.against): c for c in comparisons}
    shares = []
    for rule in rules:
        for export in candidates:
            match rule:
                case Regression() | Improvement():
                    found: Metric | Comparison = compared[export.name, reference_name(rule, export.student)]
                    allowed = rule.at_most if isinstance(rule, Regression) else rule.at_least
                case Keep():
                    found, allowed = compared[export.name, reference_name(rule, export.student)], 1 - rule.at_least
                case Agreement():
                    found, allowed = metrics[export.name]["agreement"], 1 - rule.at_least
                case Quality():
                    shares.append(inf)
                    continue
                case _:
                    continue
            width = 0.0 if found.low is None or found.high is None else found.high - found.low
            shares.append(width / 2 / allowed if width > 0 and allowed > 0 else inf)
    return max(shares, default=None)
