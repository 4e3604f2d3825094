"""llama.cpp splits texts as the tokenizer in the file does, and its tokens give the texts back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from made_tokenizers import ODD_TEXTS, SPELLED, SPLITS, byte_level, sentencepiece_bpe
from overproof.engines.gguf_tokens import read_gguf_header
from overproof.engines.llamacpp import LlamaCpp
from overproof.export.gguf_file import export_gguf
from overproof.models import hf_directory

PADDING = 5  # rows of the model beyond its tokenizer's entries


def export(folder: Path, text: str, end: str = "<|endoftext|>", rows: int | None = None) -> Path:
    """A tiny model with this tokenizer, as a GGUF file."""
    folder.mkdir(exist_ok=True)
    file, tokenizer = folder / "tokenizer.json", Tokenizer.from_str(text)
    file.write_text(text, encoding="utf-8")
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + PADDING if rows is None else rows,
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=None, eos_token_id=tokenizer.token_to_id(end), tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    hf_directory.save_model(LlamaForCausalLM(config), config, folder / "model", file)
    export_gguf(folder / "model", file, folder / "model.gguf", "f16", "tiny")
    return folder / "model.gguf"


@contextmanager
def engine_of(file: Path) -> Iterator[LlamaCpp]:
    engine = LlamaCpp(file)
    yield engine
    engine.close()


def as_text(engine: LlamaCpp, text: str) -> list[int]:
    """The tokens of a text in which special tokens mean nothing, as documents are tokenised."""
    body = {"content": text, "add_special": False, "parse_special": False}
    ids: list[int] = engine._http.request("POST", "/tokenize", body)["tokens"]
    return ids


def differing(file: Path, text: str, texts: tuple[str, ...] = ODD_TEXTS + SPELLED) -> list[str]:
    """Of these texts, those that llama.cpp splits otherwise, as prompts or as documents."""
    prompts, documents = Tokenizer.from_str(text), Tokenizer.from_str(text)
    documents.encode_special_tokens = True
    with engine_of(file) as engine:
        return [
            odd
            for odd in texts
            if engine.tokenize(odd) != prompts.encode(odd, add_special_tokens=False).ids
            or as_text(engine, odd) != documents.encode(odd, add_special_tokens=False).ids
        ]


def lost(file: Path, text: str) -> list[str]:
    """Of the odd texts, those whose tokens are another text by the file's own pieces."""
    tokenizer, header = Tokenizer.from_str(text), read_gguf_header(file)
    encoded = [tokenizer.encode(odd, add_special_tokens=False).ids for odd in ODD_TEXTS]
    return [odd for odd, ids in zip(ODD_TEXTS, encoded, strict=True) if header.text(ids) != odd]


def metadata(file: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(file).fields
    return {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items()}


@pytest.mark.parametrize("split", SPLITS)
def test_byte_level_splits(tmp_path: Path, split: str) -> None:
    text = byte_level(split)
    file = export(tmp_path, text)
    assert metadata(file)["pre"] == split
    assert differing(file, text) == []
    assert lost(file, text) == []


@pytest.mark.parametrize("prefix", ["normalizer", "metaspace", None])
def test_sentencepiece_bpe(tmp_path: Path, prefix: str | None) -> None:
    text = sentencepiece_bpe(prefix)
    file = export(tmp_path, text, "</s>")
    found = metadata(file)
    assert (found["model"], found["add_space_prefix"]) == ("llama", prefix is not None)
    # Here a space that begins a text is its prefix; llama.cpp puts another in front.
    taken = [odd for odd in ODD_TEXTS if odd.startswith(" ")] if prefix == "metaspace" else []
    assert differing(file, text, ODD_TEXTS) == taken
    assert lost(file, text) == taken
