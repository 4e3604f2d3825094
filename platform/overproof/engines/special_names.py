"""Names of special tokens that stand in what people write: text there, and no tokens.

A chat template writes `<|im_end|>` where a message ends; who writes it in a message would end that message. So it is
marked there, by two characters that Unicode keeps for such purposes and no text has, and a marked name is tokenised as
the text that it is: as in training, where content never becomes a control token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

BEGIN, END = "\ufdd0", "\ufdd1"
UNMARKED = str.maketrans("", "", BEGIN + END)


@dataclass(frozen=True)
class SpecialNames:
    """The names of a model's control tokens, by id."""

    names: Mapping[int, str]

    def marked(self, value: Any) -> Any:
        """What people wrote, as JSON has it, with the names in its texts marked."""
        if isinstance(value, str):
            return self._pattern.sub(rf"{BEGIN}\g<0>{END}", value.translate(UNMARKED))
        if isinstance(value, Mapping):
            return {key: self.marked(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(each) for each in value]
        return value

    def parts(self, text: str) -> list[str | int]:
        """A text with marked names, in parts: ids of control tokens, and text in which no name is one."""
        found, plain = list[str | int](), ""
        for piece in self._pieces.split(text):
            if piece in self._ids:
                found += [plain, self._ids[piece]] if plain else [self._ids[piece]]
                plain = ""
            else:
                plain += piece.translate(UNMARKED)
        return [*found, plain] if plain else found

    def tokens(self, text: str, split: Callable[[str], list[int]]) -> list[int]:
        """The ids of a text with marked names; ``split`` gives those of text in which no name is a token."""
        return [id_ for part in self.parts(text) for id_ in ([part] if isinstance(part, int) else split(part))]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: id_ for id_, name in self.names.items() if name}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _pieces(self) -> re.Pattern[str]:
        return re.compile(f"({BEGIN}[^{END}]*{END}|{self._pattern.pattern})")


def is_marked(text: str) -> bool:
    """Whether names are marked in a text."""
    return BEGIN in text


def unmarked(text: str) -> str:
    """The text as people see it."""
    return text.translate(UNMARKED)
