"""llama.cpp splits texts as the tokenizer in the file does, and its tokens give the texts back."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from made_tokenizers import (
    ODD_TEXTS,
    SPACE,
    SPELLED,
    SPLITS,
    byte_level,
    compiled_charsmap,
    phi3,
    sentencepiece_bpe,
    unigram,
)
from overproof.data.tokenizer_json import BYTE_NAMES, special_names_as_text
from overproof.engines.base import Sampling
from overproof.engines.gguf_tokens import read_gguf_header
from overproof.engines.llamacpp import LlamaCpp
from overproof.errors import InputError
from overproof.export.gguf_file import export_gguf
from overproof.models import hf_directory
from overproof.registry import FORMATS
from overproof.tasks.text_evaluation import split_otherwise

PADDING = 5  # rows of the model beyond its tokenizer's entries


def export(folder: Path, text: str, end: str = "<|endoftext|>", rows: int | None = None, name: str = "tiny") -> Path:
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
    export_gguf(folder / "model", file, folder / "model.gguf", "f16", name)
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
    prompts, documents = Tokenizer.from_str(text), Tokenizer.from_str(special_names_as_text(text))
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


def test_a_merge_whose_token_has_no_id_of_its_own_is_refused() -> None:
    """The library reads it: of two tokens of one id, texts come back with one of them."""
    spec = json.loads(sentencepiece_bpe(None))
    left, right = spec["model"]["merges"][-1]
    spec["model"]["vocab"][left + right] = 0
    with pytest.raises(InputError) as refused:
        FORMATS["gguf"].check_tokenizer(json.dumps(spec), "data.tokenizer")
    assert f"data.tokenizer: joins {left!r} and {right!r}, which make no token" in str(refused.value)


@pytest.mark.parametrize("prefix", ["normalizer", "metaspace", "doubles", None])
def test_sentencepiece_bpe(tmp_path: Path, prefix: str | None) -> None:
    text = sentencepiece_bpe(prefix)
    file = export(tmp_path, text, "</s>")
    found = metadata(file)
    assert (found["model"], found["add_space_prefix"]) == ("llama", prefix is not None)
    # Here a space that begins a text is its prefix; llama.cpp puts another in front.
    taken = [odd for odd in ODD_TEXTS if odd.startswith(" ")] if prefix == "metaspace" else []
    assert differing(file, text, ODD_TEXTS) == taken
    assert lost(file, text) == taken


@pytest.mark.parametrize("prefix", ["normalizer", "metaspace", None])
def test_unigram(tmp_path: Path, prefix: str | None) -> None:
    charsmap = compiled_charsmap({"\u2167": "VIII", "\uff0c": ","}) if prefix is None else None
    text = unigram(prefix, charsmap)
    file = export(tmp_path, text, "</s>")
    found, tokenizer = metadata(file), Tokenizer.from_str(text)
    assert (found["model"], found["add_space_prefix"]) == ("t5", prefix is not None)
    assert bytes(found.get("precompiled_charsmap", b"")) == (charsmap or b"")
    # llama.cpp has bytes to fall back on for ASCII alone, NUL left out.
    no_bytes = {tokenizer.token_to_id(name) for name in (BYTE_NAMES[0], *BYTE_NAMES[0x80:])}
    unknown = [odd for odd in ODD_TEXTS if no_bytes & set(tokenizer.encode(odd).ids)]
    assert 0 < len(unknown) < len(ODD_TEXTS) / 2
    # It puts no prefix before spaces alone; a prefix that is "first" stands before no space that begins a text.
    spaces = {"normalizer": [" ", "   "], "metaspace": [" leading", "  two leading", " \n "], None: []}[prefix]
    assert set(differing(file, text, ODD_TEXTS)) == {*unknown, *spaces}
    changed = [odd for odd in ODD_TEXTS if charsmap and ("\u2167" in odd or "\uff0c" in odd)]
    lost_spaces = [odd for odd in ODD_TEXTS if odd.startswith(" ")] if prefix == "metaspace" else []
    assert lost(file, text) == changed + lost_spaces
    with engine_of(file) as engine:
        splits = [engine.tokenize(odd) for odd in ODD_TEXTS]
        lines = engine.complete("one\ntwo\n", Sampling(1, logit_bias={tokenizer.token_to_id("<0x0A>"): 1e4}))
    assert split_otherwise(tokenizer, ODD_TEXTS, splits).value == len({*unknown, *spaces}) / len(ODD_TEXTS)
    assert lines.text == "\n"
    held = FORMATS["gguf"].difference(tmp_path / "model", file)
    assert held.nats < held.explained_nats


def test_the_file_says_what_the_tokenizer_does(tmp_path: Path) -> None:
    text = byte_level(bos=True)
    ids = Tokenizer.from_str(text).get_vocab()
    file = export(tmp_path / "bos", text)
    found = metadata(file)
    assert (found["bos_token_id"], found["eos_token_id"]) == (ids["<s>"], ids["<|endoftext|>"])
    assert (found["add_bos_token"], found["add_eos_token"], found["add_space_prefix"]) == (True, False, False)
    types = dict(enumerate(found["token_type"]))
    assert types[ids["<|im_start|>"]] == gguf.TokenType.CONTROL
    assert types[ids["<|extra|>"]] == gguf.TokenType.USER_DEFINED
    assert [types[len(ids) + i] for i in range(PADDING)] == [gguf.TokenType.UNUSED] * PADDING
    with engine_of(file) as engine:
        assert engine.complete("for name", Sampling(1)).prompt_tokens == len(engine.tokenize("for name")) + 1
    header = read_gguf_header(export(tmp_path / "none", byte_level()))
    assert (header.start_ids, header.bos_token, header.eos_token) == ((), "<|endoftext|>", "<|endoftext|>")


def test_a_piece_is_what_the_engine_writes(tmp_path: Path) -> None:
    """Every token of a SentencePiece vocabulary, forced one after the other."""
    file = export(tmp_path, sentencepiece_bpe(), "</s>")
    header, types = read_gguf_header(file), metadata(file)["token_type"]
    kinds = {kind: types.index(kind) for kind in set(types)} | {gguf.TokenType.BYTE: 3 + ord("A")}
    normal = [id_ for id_, piece in enumerate(header.pieces) if piece.startswith(b" ") or piece == b"\n"]
    with engine_of(file) as engine:
        for id_ in (*kinds.values(), *normal[:5]):
            done = engine.complete([1, 300], Sampling(1, logit_bias={id_: 1e4}, logprobs=0))
            assert (done.tokens, done.text.encode()) == ([id_], header.pieces[id_])


def test_what_llama_cpp_leaves_out_is_counted(tmp_path: Path) -> None:
    """It does not normalise, as Qwen's tokenizers do."""
    text = byte_level("qwen2", nfc=True)
    changed = [odd for odd in ODD_TEXTS if unicodedata.normalize("NFC", odd) != odd]
    with engine_of(export(tmp_path, text)) as engine:
        splits = [engine.tokenize(odd) for odd in ODD_TEXTS]
    found = split_otherwise(Tokenizer.from_str(text), ODD_TEXTS, splits)
    assert found.value == len(changed) / len(ODD_TEXTS) > 0


def test_texts_that_spell_special_tokens(tmp_path: Path) -> None:
    """A space stands before what follows a special token, in both. Another added token is looked for in the text with
    its prefix by `tokenizers`, and before that by llama.cpp.
    """
    text = sentencepiece_bpe()
    assert differing(export(tmp_path, text, "</s>"), text, SPELLED) == ["<|extra|> z"]


CALLED, SAFE = "My-Phi-3-Model or phi3, no modern-BERT", "My-Phi 3-Model or phi 3, no modern BERT"
TURNS = ("<|user|>\nfor name\n<|end|>\n<|assistant|>\n  x", "a</s>  b", "<|extra|> z", "<s>  a<unk>  b")


@pytest.mark.parametrize(
    ("text", "end", "name", "otherwise"),
    [
        (byte_level(), "<|endoftext|>", SAFE, []),
        (sentencepiece_bpe(), "</s>", SAFE, ["<|extra|> z"]),
        (phi3(), "</s>", f"phi-3 {SAFE}", []),
    ],
    ids=("byte-level", "llama-2", "phi-3"),
)
def test_special_tokens_strip_spaces_as_they_do_whatever_a_model_is_called(
    text: str, end: str, name: str, otherwise: list[str], tmp_path: Path
) -> None:
    """llama.cpp takes a model that is called Phi-3 for one: it then strips, or cannot load, other vocabularies."""
    file = export(tmp_path, text, end, name=CALLED)
    assert gguf.GGUFReader(file).fields["general.name"].contents() == name
    assert differing(file, text, TURNS) == otherwise


def changed(text: str, **parts: Any) -> str:
    spec = json.loads(text)
    model = spec["model"] | parts.pop("model", {})
    return json.dumps(spec | parts | {"model": model})


def test_what_llama_cpp_has_no_tokenizer_for_is_refused() -> None:
    level, piece = byte_level(), sentencepiece_bpe()
    vocabulary = json.loads(piece)["model"]["vocab"]
    no_bytes = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": True}
    precompiled = json.loads(unigram(charsmap=compiled_charsmap({"A": "a"})))["normalizer"]["normalizers"]
    merged = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE}
    odd_split = {"type": "Split", "pattern": {"Regex": "x+" * 99}, "behavior": "Isolated", "invert": False}
    level_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    for text, message in (
        (changed(level, normalizer={"type": "Lowercase"}), r"normalises texts by .*Lowercase.* NFC"),
        (
            changed(level, pre_tokenizer={"type": "Sequence", "pretokenizers": [odd_split, level_bytes]}),
            r"splits texts by 'x\+x.*…'; the GGUF export covers the splits that llama\.cpp calls gpt-2, llama-bpe",
        ),
        (changed(piece, model={"byte_fallback": False}), "a BPE tokenizer; the GGUF export covers"),
        (
            changed(piece, model={"vocab": {k: v for k, v in vocabulary.items() if k != "<0x7F>"}}),
            r"lacks <0x7F>; expected a token for each byte",
        ),
        (changed(piece, normalizer=None), "leaves spaces as they are"),
        (changed(piece, pre_tokenizer={"type": "Whitespace"}), "splits texts by .*Whitespace"),
        (changed(level, model=no_bytes, pre_tokenizer=None), r"lacks <0x00>; expected a token for each byte"),
        (changed(unigram(), normalizer=merged), r"normalises texts by .* covers unigram that changes spaces alone"),
        (
            changed(unigram(), normalizer={"type": "Sequence", "normalizers": precompiled[::-1]}),
            "normalises texts by .*Precompiled",
        ),
        (changed(level, model={"type": "WordPiece"}), "a WordPiece tokenizer; the GGUF export covers byte-level BPE"),
    ):
        with pytest.raises(InputError, match=f"^data.tokenizer: {message}"):
            FORMATS["gguf"].check_tokenizer(text, "data.tokenizer")
