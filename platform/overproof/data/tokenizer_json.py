"""The content of a ``tokenizer.json``, as text: its steps and entries, the same tokenizer for another use, and what
differs between two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

BYTE_NAMES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # as SentencePiece has them


def continuing(text: str) -> str:
    """The same tokenizer for the rest of a text that has begun: it puts no space before what it is given."""
    spec = json.loads(text)
    for part in ("normalizer", "pre_tokenizer"):
        steps = [_without_prefix(step) for step in iter_steps(spec[part])]
        kept = [step for step in steps if step is not None]
        key = "normalizers" if part == "normalizer" else "pretokenizers"
        spec[part] = {"type": "Sequence", key: kept} if kept else None
    return json.dumps(spec, ensure_ascii=False)


def special_names_as_text(text: str) -> str:
    """The same tokenizer for texts in which the name of a special token is text.

    A unigram's pieces are also its special tokens and those of bytes, whose names it would take for them: they are cut
    after their first character. Other models have them apart.
    """
    spec = json.loads(text)
    if spec["model"]["type"] != "Unigram":
        return text
    pieces = {piece for piece, _ in spec["model"]["vocab"]}
    names = [token["content"] for token in spec["added_tokens"] if token["special"]] + list(BYTE_NAMES)
    cuts = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if name in pieces and len(name) > 1]
    if cuts:
        cut = {"type": "Split", "pattern": {"Regex": "|".join(cuts)}, "behavior": "Isolated", "invert": False}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*iter_steps(spec["pre_tokenizer"]), cut]}
    return json.dumps(spec, ensure_ascii=False)


def _without_prefix(step: Mapping[str, Any]) -> dict[str, Any] | None:
    match step["type"]:
        case "Prepend":
            return None
        case "Replace" if step["pattern"].get("Regex", "").startswith(r"\A"):  # of a text's beginning
            return None
        case "Metaspace":
            kept = {key: value for key, value in step.items() if key not in ("add_prefix_space", "prepend_scheme")}
            return {**kept, "prepend_scheme": "never"}
        case "ByteLevel":
            return {**step, "add_prefix_space": False}
        case _:
            return dict(step)


def iter_steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, sequences opened."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for step in part.get("normalizers") or part.get("pretokenizers") or ():
        yield from iter_steps(step)


def tokenizer_difference(one: str, other: str) -> str | None:
    """What first differs between two tokenizers that should split every text alike; None where nothing does.

    ``one`` and ``other`` are the content of two ``tokenizer.json``; how they are laid out makes no difference, nor what
    they put around a text or how they write one.
    """
    first, second = (json.loads(Tokenizer.from_str(text).to_str()) for text in (one, other))
    kinds = first["model"]["type"], second["model"]["type"]
    if kinds[0] != kinds[1]:
        return f"model: {kinds[0]} there, {kinds[1]} here"
    names, further = entries(first), entries(second)
    for id_ in sorted(names.keys() | further.keys()):
        if names.get(id_) != further.get(id_):
            return f"vocabulary entry {id_}: {names.get(id_)!r} there, {further.get(id_)!r} here"
    if kinds[0] == "Unigram":
        scored = zip(first["model"]["vocab"], second["model"]["vocab"], strict=True)
        for own, others in scored:
            if own != others:
                return f"score of {own[0]!r}: {own[1]:g} there, {others[1]:g} here"
    merges = [spec["model"].get("merges") or [] for spec in (first, second)]
    for number in range(max(map(len, merges))):
        pairs = [found[number] if number < len(found) else None for found in merges]
        if pairs[0] != pairs[1]:
            return f"merge {number}: {pairs[0]} there, {pairs[1]} here"
    for part, called in (("normalizer", "normaliser"), ("pre_tokenizer", "split"), ("added_tokens", "special tokens")):
        if first[part] != second[part]:
            return f"{called}: {_short(first[part])} there, {_short(second[part])} here"
    rest = [{k: v for k, v in spec["model"].items() if k not in ("vocab", "merges")} for spec in (first, second)]
    return next(
        (f"model.{k}: {v} there, {rest[1].get(k)} here" for k, v in rest[0].items() if v != rest[1].get(k)), None
    )


def entries(spec: Mapping[str, Any]) -> dict[int, str]:
    """The tokens of a ``tokenizer.json`` by id."""
    found = spec["model"]["vocab"]
    own = dict(enumerate(token for token, _ in found)) if isinstance(found, list) else {i: t for t, i in found.items()}
    return own | {token["id"]: token["content"] for token in spec["added_tokens"]}


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:120]}…"
