"""Does a draft pay: is the text the teacher's own, and how much sooner does it come? Pure."""

from __future__ import annotations

from statistics import median
from typing import Self

from pydantic import model_validator

from overproof.config import Regression, Speculate
from overproof.evaluate.gate import CandidateVerdict, Reason, check_rule
from overproof.evaluate.metrics import Report
from overproof.files import FrozenModel


class SpeculationMeasurement(FrozenModel):
    """What was measured of two files, a teacher's and its draft's, known by their hashes.

    The runs took turns, each over all prompts; the speeds are of decoding, without reading the prompts.
    """

    model: str  # exports of the report
    draft: str
    model_sha256: str
    draft_sha256: str
    draft_tokens: int
    threads: int
    prompts: int
    identical: int  # of the prompts: the same token ids in every run
    new_tokens: int
    drafted: int
    accepted: int
    alone_tokens_per_s: tuple[float, ...]
    drafted_tokens_per_s: tuple[float, ...]

    @model_validator(mode="after")
    def _in_pairs(self) -> Self:
        alone = self.alone_tokens_per_s
        if len(alone) != len(self.drafted_tokens_per_s) or min(alone, default=1) <= 0:
            raise ValueError("speeds of alone and drafted runs come in pairs; expected as many of both, more than 0")
        return self

    @property
    def times(self) -> tuple[float, ...]:
        """The speed-up of each run."""
        return tuple(b / a for a, b in zip(self.alone_tokens_per_s, self.drafted_tokens_per_s, strict=True))


class SpeculationResult(FrozenModel):
    """The content of ``speculation.json``."""

    found: SpeculationMeasurement
    verdict: CandidateVerdict


def judge_draft(policy: Speculate, report: Report, found: SpeculationMeasurement) -> CandidateVerdict:
    """Hold what was measured against the policy, and the answering file against the unquantised teacher."""
    reasons = [_identical(found), _faster(policy, found)]
    measured = report.find(found.model)
    if measured is None or found.model != policy.teacher:
        reasons.append(Reason(rule="teacher", passed=False, text=f"{policy.teacher} is not what was measured"))
    elif found.model != "teacher":
        reasons.append(check_rule(Regression(against="teacher", at_most=policy.at_most), report, measured))
    return CandidateVerdict(name=found.model, passed=all(r.passed for r in reasons), reasons=tuple(reasons))


def _identical(found: SpeculationMeasurement) -> Reason:
    text = f"text identical on {found.identical} of {found.prompts} prompts, of up to {found.new_tokens} tokens each"
    return Reason(rule="identical", passed=found.identical == found.prompts > 0, text=text)


def _faster(policy: Speculate, found: SpeculationMeasurement) -> Reason:
    times, fewest = found.times, policy.repeats
    if len(times) < fewest or found.draft_tokens != policy.draft_tokens:
        text = f"{len(times)} runs with {found.draft_tokens} tokens drafted at a time; needed {fewest} with "
        return Reason(rule="faster", passed=False, text=f"{text}{policy.draft_tokens}")
    alone, drafted = median(found.alone_tokens_per_s), median(found.drafted_tokens_per_s)
    text = (
        f"{median(times):.2f} times as fast as alone (runs {min(times):.2f} to {max(times):.2f}; {alone:,.0f} and "
        f"{drafted:,.0f} tokens/s, threads {found.threads}; {found.accepted} of {found.drafted} guesses right), "
        f"needed {policy.at_least:g} times"
    )
    return Reason(rule="faster", passed=median(times) >= policy.at_least, text=text)
