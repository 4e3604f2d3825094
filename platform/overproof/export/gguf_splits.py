"""How byte-level tokenizers cut a text into words, and what llama.cpp calls each way.

A GGUF file names the split (``tokenizer.ggml.pre``), and llama.cpp has the regular expressions of each name. They are
found here by the expressions in ``tokenizer.json``, not by the model's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from overproof.data.tokenizer_json import iter_steps
from overproof.errors import InputError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
CASED = (f"{BEFORE_WORD}{UPPER}*{LOWER}+", f"{BEFORE_WORD}{UPPER}+{LOWER}*")
SYMBOLS = r" ?[^\s\p{L}\p{N}]+"

GPT_2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{SYMBOLS}|\s+(?!\S)|\s+"
LLAMA_3 = rf"{CONTRACTIONS}|{BEFORE_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{SYMBOLS}[\r\n]*|{LINES_AND_SPACES}"
QWEN_2 = rf"{CONTRACTIONS}|{BEFORE_WORD}\p{{L}}+|\p{{N}}|{SYMBOLS}[\r\n]*|{LINES_AND_SPACES}"
QWEN_3_5 = (
    rf"{CONTRACTIONS}|{BEFORE_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{LINES_AND_SPACES}"
)
GPT_4O = rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}|{SYMBOLS}[\r\n/]*|{LINES_AND_SPACES}"
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{SYMBOLS}[\r\n/]*|{LINES_AND_SPACES}"
DEEPSEEK_3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + LINES_AND_SPACES
)
BLOOM = " ?[^(\\s|[.,!?…。\uff0c、।\u06d4،])]+"
DIGIT, DIGITS = r"\p{N}", r"\p{N}+"
PUNCTUATION = "runs of punctuation"
LONGEST = 60  # characters of a step that an error shows


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut a text: each step cuts further what the one before gave."""

    name: str  # to llama.cpp
    steps: tuple[str, ...]
    whole_words: bool = False  # whether a word that is an entry is that entry, whatever its merges (``ignore_merges``)


SPLITS = (
    PreTokenizer("gpt-2", (GPT_2,)),
    PreTokenizer("llama-bpe", (LLAMA_3,), whole_words=True),
    PreTokenizer("dbrx", (LLAMA_3,)),
    PreTokenizer("qwen2", (QWEN_2,)),
    PreTokenizer("qwen35", (QWEN_3_5,)),
    PreTokenizer("smollm", (DIGIT, GPT_2)),
    PreTokenizer("falcon", (PUNCTUATION, GPT_2, DIGITS, "[0-9][0-9][0-9]")),
    PreTokenizer("gpt-4o", (GPT_4O,)),
    PreTokenizer("tekken", (TEKKEN,), whole_words=True),
    PreTokenizer("deepseek-v3", (r"\p{N}{1,3}", "[一-龥\u3040-ゟ\u30a0-ヿ]+", DEEPSEEK_3)),
    PreTokenizer("bloom", (BLOOM,)),
)


def split_name(spec: Mapping[str, Any], where: object) -> str:
    """llama.cpp's name of the split of a byte-level ``tokenizer.json``.

    Raises:
        InputError: llama.cpp has none for it.
    """
    steps = tuple(_steps(spec["pre_tokenizer"]))
    found = [split for split in SPLITS if split.steps == steps]
    if not found:
        known = ", ".join(split.name for split in SPLITS)
        shown = " then ".join(repr(step if len(step) < LONGEST else f"{step[:LONGEST]}…") for step in steps)
        raise InputError(
            f"{where}: splits texts by {shown or 'nothing'}; the GGUF export covers the "
            f"splits that llama.cpp calls {known}"
        )
    whole_words = bool(spec["model"].get("ignore_merges"))
    return next((split for split in found if split.whole_words == whole_words), found[0]).name


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    for step in iter_steps(pre_tokenizer):
        match step["type"]:
            case "ByteLevel":
                if step.get("add_prefix_space"):
                    yield "a space before the text"
                if step.get("use_regex", True):
                    yield GPT_2
            case "Split" if _keeps_all(step):
                pattern = step["pattern"]
                # Some write the line ends of a pattern as they are, and some escape them.
                yield pattern.get("Regex", str(pattern)).replace("\r", "\\r").replace("\n", "\\n")
            case "Digits":
                yield DIGIT if step["individual_digits"] else DIGITS
            case "Punctuation" if step.get("behavior") == "Contiguous":
                yield PUNCTUATION
            case _:
                yield str(dict(step))


def _keeps_all(step: Mapping[str, Any]) -> bool:
    """Whether what matches stands alone: it is isolated, or all between is removed by a pattern that leaves nothing."""
    return (step["behavior"], bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
