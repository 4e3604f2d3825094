"""Tokenizers of every kind, trained in a moment as real models have them, and texts that trip tokenizers up."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from overproof.export import gguf_splits

SPACE = "\u2581"
WORDS = (
    "for name in names: print(name, 12, 345, 6789)\n\tif name isn't None and they'll WE'RE it's:\n"
    "        return CamelCase\n\nna\u00efve caf\u00e9 \u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439, "
    "(a+b)*[c]; x != y -- \u201cquoted\u201d\n"
)
TRAINED_ON = [WORDS.replace("name", name) for name in ("name", "file", "value", "result", "token")] * 3

ODD_TEXTS = (
    "", "for name in names: print(name)",
    " leading", "  two leading", "trailing ", "trailing  ", " ", "   ", "\n", "\n\n", " \n ", "a\n\n\nb",
    "tab\tin\t\tside", "\tindented\n\t\tdeeper", "line\r\nline\r\n\r\nend", "a    b     c", "x \n\n  y",
    "0", "12", "123", "1234", "12345678901234567890", "3.14159, 1,000,000 and 2nd",
    "\u0663\u0664\u0665 \u00b2\u00bd \u2167",
    "don't DON'T they'll We'Ve it's I'm 'tis ''s", "CamelCaseAndHTTPServer snake_case ALLCAPS mixedCASE",
    "!!! ??? ... -- -> == != <= >= && || @#$%^&*()_+{}[]|\\:;\"'<>,.?/~`", "a.b.c/d/e\\f", "(x)[y]{z}", "x+y=z^2~|",
    "caf\u00e9 na\u00efve \u00c9T\u00c9 Stra\u00dfe",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0422\u0415\u041a\u0421\u0422",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u4e2d\u6587\uff0c\u6c49\u5b57",
    "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8", "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1e9\U0001f1ea",
    "a\u0300\u0301 o\u0308 x\u0323", "\u00a0nbsp\u00a0\u3000wide\u3000", "zero\u200bwidth\u200d\ufeff",
    "nul\x00inside \x01\x02\x7f", "\u2028line\u2029sep", "ends with \u0130\u0131\ufb01",
)  # fmt: skip
SPELLED = ("a<|endoftext|>b", "<s>", "x</s> y", "<unk>", "<|im_start|>user\nhi<|im_end|>\n", "<0x0A>", "<|extra|> z")

SPLITS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "falcon": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    ),
} | {
    split.name: pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(step), "isolated") for step in split.steps),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for split in gguf_splits.SPLITS
    if split.name not in ("gpt-2", "smollm", "falcon")
}


def byte_level(split: str = "gpt-2", bos: bool = False, nfc: bool = False) -> str:
    """Byte-level BPE whose end is not its first token, with special and user-defined tokens among the others."""
    whole_words = next(found.whole_words for found in gguf_splits.SPLITS if found.name == split)
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = SPLITS[split]
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.add_special_tokens(["<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    if bos:
        start = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[start])
    text: str = tokenizer.to_str()
    return text


def sentencepiece_bpe(prefix: str | None = "normalizer") -> str:
    """SentencePiece's BPE with byte fallback, as transformers converts it: every pair that makes a token is a merge.

    The space before a text comes from the ``normalizer`` (Llama 2), from ``metaspace`` (Mistral), where it ``doubles``
    one that is there, or not (as transformers converts Mistral's now, or did), or there is none (Gemma).
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always", split=True)
    trained.train_from_iterator(TRAINED_ON, trainers.BpeTrainer(vocab_size=260, show_progress=False))
    pieces = json.loads(trained.to_str())["model"]
    made = ["".join(pair) for pair in pieces["merges"]]
    characters = sorted(piece for piece in pieces["vocab"] if piece not in made)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made, *characters, "<|extra|>"]
    ids = {token: id_ for id_, token in enumerate(tokens)}
    pairs = [
        (piece[:at], piece[at:])
        for piece in made
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    model = models.BPE(vocab=ids, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return _as_sentencepiece(Tokenizer(model), prefix)


def _as_sentencepiece(tokenizer: Tokenizer, prefix: str | None, charsmap: bytes | None = None) -> str:
    replace = normalizers.Replace(" ", SPACE)
    if prefix == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    elif prefix == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    elif prefix == "doubles":
        first = normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2)
        tokenizer.normalizer = normalizers.Sequence([replace, first])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(SPACE, "always", split=False)])
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    if charsmap is not None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), tokenizer.normalizer])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    text: str = tokenizer.to_str()
    return text


def unigram(prefix: str | None = "normalizer", charsmap: bytes | None = None) -> str:
    """SentencePiece's unigram with byte fallback. As there, no piece holds the end of a line or a tab: both are bytes.

    ``prefix`` as that of ``sentencepiece_bpe``; ``charsmap`` as ``compiled_charsmap`` makes it.
    """
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always", split=True)
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator((" ".join(text.split()) for text in TRAINED_ON), trainer)
    pieces = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"] if piece != "<unk>"]
    own = [(token, 0.0) for token in ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))]
    model = models.Unigram([*own, *pieces, ("<|extra|>", -20.0)], unk_id=0, byte_fallback=True)
    return _as_sentencepiece(Tokenizer(model), prefix, charsmap)


def compiled_charsmap(replacements: dict[str, str]) -> bytes:
    """SentencePiece's compiled map of characters (its ``builder.cc``): a double array, and what it points at.

    A node has a block of 256 units for its children; one whose key ends there has its value in the block's first.
    """
    units, strings = np.zeros(256, np.uint32), b""
    blocks = {b"": 0}

    def block(key: bytes, at: int) -> int:
        nonlocal units
        if key not in blocks:
            blocks[key] = len(units)
            units[at] |= (at ^ len(units)) << 10 | key[-1]
            units = np.append(units, np.zeros(256, np.uint32))
        return blocks[key]

    for source, target in replacements.items():
        data, parent, at = source.encode(), 0, 0
        for end in range(1, len(data) + 1):
            at = parent ^ data[end - 1]
            parent = block(data[:end], at)
        units[at] |= 1 << 8
        units[parent] = len(strings) | 1 << 31
        strings += target.encode() + b"\0"
    return len(units.tobytes()).to_bytes(4, "little") + units.tobytes() + strings
