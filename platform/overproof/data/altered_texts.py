"""Texts that their tokens write back otherwise than they were: which, how many, and what is said of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping

SAME, COMPOSED, ALTERED = 0, 1, 2  # how a text comes back


def how_it_comes_back(text: str, found: str) -> int:
    """How a text is written back by its tokens: as it was but for a space before it, as Unicode's NFC of it, or not."""
    if found in (text, text.removeprefix(" ")):
        return SAME
    composed = unicodedata.normalize("NFC", text)
    return COMPOSED if unicodedata.normalize("NFC", found) in (composed, composed.removeprefix(" ")) else ALTERED


AlteredTexts = Mapping[int, tuple[int, str]]  # by the way in which texts come back: how many, and the first's name


def count_altered(ways: Iterable[tuple[str, int]]) -> AlteredTexts:
    """From the name of each text and how it comes back."""
    return join_altered({way: (1, name)} for name, way in ways if way != SAME)


def join_altered(counted: Iterable[AlteredTexts]) -> AlteredTexts:
    """What is counted of several texts after each other."""
    joined = dict[int, tuple[int, str]]()
    for each in counted:
        for way, (count, name) in each.items():
            before, first = joined.get(way, (0, name))
            joined[way] = (before + count, first)
    return joined


def tell_altered(found: AlteredTexts, count: int, what: str) -> list[str]:
    """A line for each way in which some of so many texts do not come back, with the first by name."""
    return [
        f"the tokenizer writes {found[way][0]:,} of {count:,} {what} back {how}, first {found[way][1]}: models learn "
        "what it writes, and figures count the bytes that were given"
        for way, how in ((COMPOSED, "as Unicode's NFC of them"), (ALTERED, "otherwise than they are"))
        if way in found
    ]
