"""The vocabulary of a GGUF file, from ``tokenizer.json``: what llama.cpp splits texts with, and writes tokens by.

llama.cpp has a tokenizer for each kind: ``gpt2`` merges bytes within words, ``llama`` merges characters by the score
of what they become, with bytes for those that it does not know, ``t5`` takes the pieces whose scores have the highest
sum (Kudo, arXiv 1804.10959). Where it does otherwise than ``tokenizers`` on the user's own texts, the parity probe
counts it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import gguf
from gguf import TokenType
from tokenizers import Tokenizer

from overproof.data.text_tokenizer import added_tokens
from overproof.data.tokenizer_json import BYTE_NAMES, entries, iter_steps
from overproof.errors import InputError
from overproof.export.gguf_splits import SPLITS, split_name

SPACE = "\u2581"  # SentencePiece writes a space so
UNREACHED = -1e6  # the score of what no merge makes
UNKNOWN_PENALTY = 10.0  # below the lowest score, what `tokenizers` gives a character that it does not know


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokenizer, beside the special tokens."""

    model: str  # llama.cpp's name of the kind of tokenizer
    split: str  # and of its split
    types: dict[int, TokenType]  # where they are not normal
    scores: dict[int, float] | None = None
    merges: list[str] | None = None
    unknown_id: int | None = None
    space_prefix: bool = False  # whether a text is read as if a space stood before it
    charsmap: bytes | None = None  # what becomes of characters before anything else, as SentencePiece compiles it
    names: Mapping[int, str] = field(default_factory=dict)  # where they are not those of ``tokenizer.json``
    left_out: tuple[str, ...] = ()  # what llama.cpp does not do of it, in words


def read_vocabulary(text: str, where: object) -> Vocabulary:
    """What llama.cpp has to know of a ``tokenizer.json``.

    Raises:
        InputError: it has no such tokenizer.
    """
    spec = json.loads(text)
    kind, steps = spec["model"]["type"], [step["type"] for step in iter_steps(spec["pre_tokenizer"])]
    if kind == "BPE" and "ByteLevel" in steps:
        return _byte_level(spec, where)
    if kind == "BPE" and spec["model"].get("byte_fallback"):
        return _with_byte_fallback(spec, where)
    if kind == "Unigram":
        return _unigram(spec, where)
    raise InputError(
        f"{where}: a {kind} tokenizer; the GGUF export covers byte-level BPE, SentencePiece's BPE with byte fallback, "
        "and unigram"
    )


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Path, config: Any) -> None:
    """Write the tokenizer of a model into its file; the rows that the model has beyond its tokens are unused ones.

    ``config`` is the model's: its size, and which tokens it calls the beginning and the end of a text.

    Raises:
        InputError: llama.cpp has no such tokenizer, or it has more tokens than the model.
    """
    text = tokenizer.read_text(encoding="utf-8")
    ids = entries(json.loads(text))
    rows = range(config.vocab_size)
    if max(ids) >= config.vocab_size:
        raise InputError(f"{tokenizer}: {1 + max(ids)} tokens; expected at most the model's {config.vocab_size}")
    found = read_vocabulary(text, tokenizer)
    before, after = added_tokens(Tokenizer.from_str(text))
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    if end is None:
        raise InputError(f"{tokenizer}: its model's config.json has no eos_token_id; expected the end of a text")
    bos = before[0] if before else end if config.bos_token_id is None else config.bos_token_id
    unused = {row: TokenType.UNUSED for row in rows if row not in ids}
    types = found.types | unused
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.split)
    names = {**ids, **found.names}
    writer.add_token_list([names.get(row) or unused_token(row) for row in rows])
    writer.add_token_types([types.get(row, TokenType.NORMAL) for row in rows])
    if found.scores is not None:
        writer.add_token_scores([found.scores.get(row, UNREACHED) for row in rows])
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    if found.unknown_id is not None:
        writer.add_unk_token_id(found.unknown_id)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    writer.add_add_space_prefix(found.space_prefix)
    if found.charsmap is not None:
        writer.add_precompiled_charsmap(found.charsmap)


def unused_token(row: int) -> str:
    """The name of a row that a model has beyond its tokens."""
    return f"<|unused-{row}|>"


def _merges(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in spec["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _refuse_normaliser(spec: Mapping[str, Any], where: object, known: str) -> NoReturn:
    raise InputError(f"{where}: normalises texts by {spec['normalizer']}; the GGUF export covers {known}")


# --- byte-level BPE -------------------------------------------------------------------------------


def _byte_level(spec: Mapping[str, Any], where: object) -> Vocabulary:
    if any(step["type"] != "NFC" for step in iter_steps(spec["normalizer"])):
        _refuse_normaliser(spec, where, "byte-level BPE with none, or with NFC, which llama.cpp leaves out")
    special = {token["id"]: token["special"] for token in spec["added_tokens"]}
    split, left_out = split_name(spec, where), list[str]()
    if spec["normalizer"]:
        left_out.append(
            "llama.cpp does not compose characters (the normaliser NFC): texts that are not so are split "
            "otherwise there"
        )
    whole_words = bool(spec["model"].get("ignore_merges"))
    if whole_words != next(each.whole_words for each in SPLITS if each.name == split):
        how = "by their merges" if whole_words else "as a whole"
        left_out.append(f"llama.cpp reads words that are an entry {how} with this split ({split})")
    return Vocabulary(
        model="gpt2",
        split=split,
        left_out=tuple(left_out),
        types={id_: TokenType.CONTROL if own else TokenType.USER_DEFINED for id_, own in special.items()},
        merges=[f"{left} {right}" for left, right in _merges(spec)],
    )


# --- SentencePiece's BPE --------------------------------------------------------------------------


def _with_byte_fallback(spec: Mapping[str, Any], where: object) -> Vocabulary:
    """llama.cpp joins any two neighbours that are a token together, the best score first; ``tokenizers`` joins listed
    pairs, the first of the list first. A token's score is the place of the first pair that makes it.
    """
    ids = _ids_with_bytes(spec, where)
    prefix = _space_prefix(list(iter_steps(spec["normalizer"])), spec, where, "SentencePiece's BPE")
    merges = _merges(spec)
    scores: dict[int, float] = {}
    for rank, (left, right) in enumerate(merges):
        if left + right not in ids:
            raise InputError(
                f"{where}: joins {left!r} and {right!r}, which make no token that has an id of its own; expected one: "
                "two tokens of its vocabulary may have one id"
            )
        scores.setdefault(ids[left + right], -float(rank))
    unknown = ids.get(spec["model"].get("unk_token"))
    return Vocabulary(
        model="llama", split="default", types=_types(spec, ids, set(spec["model"]["vocab"]), unknown), scores=scores,
        unknown_id=unknown, space_prefix=prefix,
    )  # fmt: skip


def _ids_with_bytes(spec: Mapping[str, Any], where: object) -> dict[str, int]:
    """The ids of tokens by their names, those of all bytes among them."""
    ids = {token: id_ for id_, token in entries(spec).items()}
    missing = [name for name in BYTE_NAMES if name not in ids]
    if missing:
        raise InputError(f"{where}: lacks {missing[0]}; expected a token for each byte, to fall back on")
    return ids


def _types(
    spec: Mapping[str, Any], ids: Mapping[str, int], vocabulary: Set[str], unknown: int | None
) -> dict[int, TokenType]:
    types = dict.fromkeys((ids[name] for name in BYTE_NAMES), TokenType.BYTE)
    for token in spec["added_tokens"]:
        if token["special"]:
            types[token["id"]] = TokenType.CONTROL
        elif SPACE not in token["content"] or token["content"] not in vocabulary:
            types[token["id"]] = TokenType.USER_DEFINED  # others stand for spaces, which llama.cpp reads in normal ones
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return types


def _space_prefix(normaliser: Sequence[Mapping[str, Any]], spec: Mapping[str, Any], where: object, kind: str) -> bool:
    """Whether a text is read as if a space stood before it. Spaces must become ``SPACE``, and nothing else change."""
    prefix = spaces = False
    for step in normaliser:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                spaces = True
            case {"type": "Replace", "pattern": {"Regex": "\\A\u2581"}, "content": "\u2581\u2581"}:
                pass  # so that Metaspace puts its prefix before a space, too
            case _:
                _refuse_normaliser(spec, where, f"{kind} that changes spaces alone")
    for step in iter_steps(spec["pre_tokenizer"]):
        match step:
            case {"type": "Metaspace", "replacement": "\u2581"}:
                spaces = True
                scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
                prefix |= scheme != "never"
            case {"type": "Split", "pattern": {"String": " "}} if spaces:
                pass  # there is none left
            case _:
                raise InputError(
                    f"{where}: splits texts by {dict(step)}; the GGUF export covers {kind} "
                    "that splits at spaces or not at all"
                )
    if not spaces:
        raise InputError(f"{where}: leaves spaces as they are; expected them as {SPACE!r}, as SentencePiece has them")
    return prefix


# --- unigram --------------------------------------------------------------------------------------


def _unigram(spec: Mapping[str, Any], where: object) -> Vocabulary:
    """llama.cpp knows no bytes to fall back on here: it reads a character outside the vocabulary as the unknown token.

    Those of ASCII, such as the end of a line, are told it as pieces that score what `tokenizers` gives the unknown, so
    that it reads them as their bytes all the same. Of the others the parity probe counts the texts.
    """
    ids, model = _ids_with_bytes(spec, where), spec["model"]
    normaliser = list(iter_steps(spec["normalizer"]))
    charsmap = None
    if normaliser and normaliser[0]["type"] == "Precompiled":
        charsmap = base64.b64decode(normaliser.pop(0)["precompiled_charsmap"])
    prefix = _space_prefix(normaliser, spec, where, "unigram")
    scores = {id_: float(score) for id_, (_, score) in enumerate(model["vocab"])}
    types = _types(spec, ids, {token for token, _ in model["vocab"]}, model["unk_id"])
    letters = {ids[BYTE_NAMES[byte]]: chr(byte) for byte in range(1, 0x80) if chr(byte) not in ids and chr(byte) != " "}
    return Vocabulary(
        model="t5", split="default", types=types | dict.fromkeys(letters, TokenType.NORMAL),
        scores=scores | dict.fromkeys(letters, min(scores.values()) - UNKNOWN_PENALTY),
        unknown_id=model["unk_id"], space_prefix=prefix, charsmap=charsmap, names=letters,
    )  # fmt: skip
