"""A GGUF file's metadata that the engine does not give: the bytes of each token, its chat template, its context.

A byte-level vocabulary spells each byte as one printable character (GPT-2's table, openai/gpt-2 `encoder.py`), one of
SentencePiece a space as U+2581 and a single byte as, for example, ``<0x0A>``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from overproof.data.tokenization import BYTE_BY_CHARACTER
from overproof.engines.base import PromptReading, PromptScore
from overproof.errors import InputError

CHAT_TEMPLATE = "tokenizer.chat_template"
BYTE_LEVEL, SENTENCEPIECE, UNIGRAM = "gpt2", "llama", "t5"
SPACE = "\u2581"
SILENT = (gguf.TokenType.CONTROL, gguf.TokenType.UNUSED, gguf.TokenType.UNKNOWN)
MAX_UNKNOWN_BYTES = 64  # of a text that no token stands for, in a row


@dataclass(frozen=True)
class GgufHeader:
    """Metadata of a language model. Models of equal ``vocabulary_sha256`` have the same tokens by id."""

    context_length: int
    pieces: tuple[bytes, ...]  # the bytes that each token adds to a text
    silent_names: Mapping[int, str]  # by id, of the tokens that add none
    start_ids: tuple[int, ...]  # put before every prompt that is a text
    bos_token: str  # name of the token that chat templates call so
    space_prefix: bool  # whether a text is read as if a space stood before it
    eos_token: str  # name of the token after a text
    chat_template: str | None  # Jinja template that makes a prompt of messages
    max_token_characters: int  # of the longest token's name; no token stands for more of a text
    vocabulary_sha256: str  # of the tokens' names and types

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids; broken characters are replaced."""
        text = b"".join(self.pieces[id_] for id_ in ids).decode(errors="replace")
        return text.removeprefix(" ") if self.space_prefix else text

    def text_pieces(self, text: str, ids: Sequence[int]) -> list[bytes]:
        """The bytes of a text that each of the tokens into which it was split stands for. They join to the text.

        A token that adds no text stands for its name where the text has it there (it was read as that token), else for
        nothing: it was put before the text.
        """
        data, starts, end = text.encode(), list[int](), 0
        for id_ in ids:
            piece = self.pieces[id_] or self.silent_names[id_].encode()
            start, found = end, b""
            for spelled in (piece, piece.removeprefix(b" ")):  # SentencePiece may read a space that is not there
                if data.startswith(spelled, end):
                    found = spelled
                    break
            else:
                if self.pieces[id_]:  # an unknown character before it, whose token has no text
                    at = data.find(piece, end, end + MAX_UNKNOWN_BYTES + len(piece))
                    start, found = (end, b"") if at < 0 else (at, piece)
            starts.append(start)
            end = start + len(found)
        return [data[start:stop] for start, stop in zip(starts, [*starts[1:], len(data)], strict=True)]

    def reading(self, prompt: str | Sequence[int], ids: list[int], scores: list[PromptScore] | None) -> PromptReading:
        """A prompt that is read as these ids."""
        if isinstance(prompt, str):
            return PromptReading(prompt, ids, self.text_pieces(prompt, ids), scores)
        pieces = [self.pieces[id_] for id_ in ids]
        first = next((i for i, piece in enumerate(pieces) if piece), None)
        if self.space_prefix and first is not None:
            pieces[first] = pieces[first].removeprefix(b" ")
        return PromptReading(self.text(ids), ids, pieces, scores)

    def require_chat_template(self) -> str:
        """The chat template.

        Raises:
            InputError: there is none.
        """
        if self.chat_template is None:
            raise InputError("messages: this model has no chat template; ask it at POST /v1/completions")
        return self.chat_template


@contextmanager
def naming_gguf_faults(path: Path) -> Iterator[None]:
    """Whatever the libraries raise over a damaged file, as one error that names it: they look at bytes as they come.

    Raises:
        InputError: in place of it.
    """
    if not path.is_file():
        raise InputError(f"{path}: missing; expected a GGUF file")
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the libraries raise nothing more precise
        found = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read: {found}; expected a whole GGUF file") from None


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a language model's metadata.

    Raises:
        InputError: the file is missing, not GGUF, or its vocabulary is of a kind that this cannot read.
    """
    with naming_gguf_faults(path):
        return _header(gguf.GGUFReader(path).fields, path)


def _header(fields: Mapping[str, Any], path: Path) -> GgufHeader:
    def value(key: str) -> Any:
        if key not in fields:
            raise InputError(f"{path}: lacks {key}; expected a GGUF language model with its tokenizer")
        return fields[key].contents()

    model = value("tokenizer.ggml.model")
    if model not in (BYTE_LEVEL, SENTENCEPIECE, UNIGRAM):
        raise InputError(
            f"{path}: tokenizer is {model!r}; expected {BYTE_LEVEL!r} (byte-level BPE), {SENTENCEPIECE!r} "
            f"(SentencePiece's BPE) or {UNIGRAM!r} (unigram)"
        )

    def flag(key: str, default: bool) -> bool:
        return bool(value(f"tokenizer.ggml.{key}")) if f"tokenizer.ggml.{key}" in fields else default

    names, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    length = value(f"{value('general.architecture')}.context_length")
    piece = _byte_level_piece if model == BYTE_LEVEL else _sentencepiece_piece
    pieces = tuple(piece(n, t) for n, t in zip(names, types, strict=True))
    bos_id, by_score = value("tokenizer.ggml.bos_token_id"), model == SENTENCEPIECE
    return GgufHeader(
        context_length=length,
        pieces=pieces,
        silent_names={id_: names[id_] for id_, each in enumerate(pieces) if not each},
        start_ids=(bos_id,) if flag("add_bos_token", by_score) else (),
        bos_token=names[bos_id],
        space_prefix=flag("add_space_prefix", by_score),
        eos_token=names[value("tokenizer.ggml.eos_token_id")],
        chat_template=value(CHAT_TEMPLATE) if CHAT_TEMPLATE in fields else None,
        max_token_characters=max(map(len, names)),
        vocabulary_sha256=hashlib.sha256(json.dumps([names, types]).encode()).hexdigest(),
    )


def _byte_level_piece(name: str, kind: int) -> bytes:
    if kind in SILENT:
        return b""
    if kind == gguf.TokenType.USER_DEFINED or not BYTE_BY_CHARACTER.keys() >= set(name):
        return name.encode()
    return bytes(BYTE_BY_CHARACTER[c] for c in name)


def _sentencepiece_piece(name: str, kind: int) -> bytes:
    if kind in SILENT:
        return b""
    if kind == gguf.TokenType.BYTE:
        return bytes.fromhex(name.removeprefix("<0x").removesuffix(">"))
    return (name if kind == gguf.TokenType.USER_DEFINED else name.replace(SPACE, " ")).encode()


def incomplete_utf8_tail(data: bytes) -> int:
    """How many bytes at the end the engine holds back because they may be the start of a character.

    As llama.cpp decides it: a lead byte among the last four that is not yet followed by as many bytes as it announces.
    """
    for back in range(1, min(4, len(data)) + 1):
        lead = data[-back]
        announced = 2 if lead & 0xE0 == 0xC0 else 3 if lead & 0xF0 == 0xE0 else 4 if lead & 0xF8 == 0xF0 else 0
        if back < announced:
            return back
    return 0


def align_logprobs(
    tokens: Sequence[int], reported: Sequence[dict[str, Any]], pieces: Sequence[bytes]
) -> list[dict[str, Any] | None]:
    """The engine's report of each token (``id``, ``logprob`` and so on), None where it has none.

    It has none of a token that ends inside a character, and none of the tokens of a stop string.
    """
    aligned: list[dict[str, Any] | None] = []
    tail, used = b"", 0
    for token in tokens:
        tail = (tail + pieces[token])[-4:]
        matches = not incomplete_utf8_tail(tail) and used < len(reported) and reported[used]["id"] == token
        aligned.append(reported[used] if matches else None)
        used += matches
    if used != len(reported):
        reported_ids = [entry["id"] for entry in reported]
        raise RuntimeError(f"the engine reported log-probabilities of {reported_ids} for tokens {list(tokens)}")
    return aligned
