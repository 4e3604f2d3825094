"""After a refusal: which file came nearest, and what would have to give."""

from __future__ import annotations

import math
from dataclasses import dataclass

from overproof.config import Gate, Keep, Latency, Size
from overproof.evaluate.gate import Verdict, kept_share, reference_name
from overproof.evaluate.metrics import MeasuredFile, Report

OTHER_RULE = 1.0  # how far off a file counts that breaks a rule which no flag loosens


@dataclass(frozen=True)
class Nearest:
    """A file that was refused."""

    name: str
    reasons: tuple[str, ...]  # of the rules that it broke
    flags: tuple[str, ...]  # that would let it pass; empty where no flag would

    def __str__(self) -> str:
        text = f"the nearest is {self.name}: {'; '.join(self.reasons)}"
        return f"{text}. It would pass with {' '.join(self.flags)}" if self.flags else text


def nearest(gate: Gate, report: Report, verdict: Verdict) -> Nearest | None:
    """The refused file that misses its rules by least; None where nothing was judged."""
    judged = [(_missed(gate, report, candidate.name, verdict), candidate.name) for candidate in verdict.candidates]
    return min(judged, key=lambda found: (found[0][0], found[1]))[0][1] if judged else None


def _missed(gate: Gate, report: Report, name: str, verdict: Verdict) -> tuple[float, Nearest]:
    """By which share of their bounds a file misses its rules, in all; and what it says of itself."""
    candidate = report.find(name)
    assert candidate is not None
    reasons = next(c.reasons for c in verdict.candidates if c.name == name)
    broken = [(rule, reason.text) for rule, reason in zip(gate.rules, reasons, strict=True) if not reason.passed]
    missed, flags = 0.0, []
    for rule, _ in broken:
        share, flag = _loosened(rule, report, candidate)
        missed += share
        flags.append(flag)
    enough = tuple(flag for flag in flags if flag is not None) if None not in flags else ()
    return missed, Nearest(name, tuple(text for _, text in broken), enough)


def _loosened(rule: object, report: Report, candidate: MeasuredFile) -> tuple[float, str | None]:
    """By which share of its bound a file misses a rule, and the flag by which it would not."""
    if isinstance(rule, Keep):
        kept = kept_share(report, candidate, reference_name(rule, candidate.student))
        if kept is not None and kept[1] > 0:
            flag = f"--keep {math.floor(1000 * kept[1]) / 1000:g}" if rule.against == "teacher" else None
            return 1 - kept[1] / rule.at_least, flag
    if isinstance(rule, Size):
        found = candidate.size_bytes / 1e6
        return found / rule.at_most_mb - 1, f"--max-mb {_up(found)}"
    if isinstance(rule, Latency):
        metric = candidate.metrics.get(f"latency_p{rule.percentile}_s")
        if metric is not None and metric.high is not None:
            flag = f"--max-p95-ms {_up(1e3 * metric.high)}" if rule.percentile == 95 else None
            return 1e3 * metric.high / rule.at_most_ms - 1, flag
    return OTHER_RULE, None


def _up(value: float) -> str:
    """Rounded up to three digits."""
    scale = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / scale) * scale:.10g}"
