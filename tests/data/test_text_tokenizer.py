"""Tokenizers of any kind are read as they are: where their texts begin and end, and what they cannot write back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from made_tokenizers import SPACE, TRAINED_ON, byte_level, sentencepiece_bpe, unigram
from overproof.config import TokenizerFile
from overproof.data import documents, text_tokenizer, tokenization
from overproof.data.altered_texts import ALTERED, COMPOSED, SAME, count_altered, tell_altered
from overproof.data.text_tokenizer import TextTokenizer, read_tokenizer, trained
from overproof.data.token_parts import Piece, encode_pieces
from overproof.data.tokenizer_json import continuing
from overproof.errors import InputError
from overproof.tasks.texts import truncating_tokenizer


def piece_of(text: str, place: int = 0, document: int = 0) -> Piece:
    """A piece of a document."""
    return Piece(text.encode(), f"{document}.txt", document, "train", is_first=place == 0, is_last=True)


def directory(folder: Path, text: str, **files: Any) -> TokenizerFile:
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return TokenizerFile(path=str(folder))


def test_the_end_is_found_as_transformers_finds_it(tmp_path: Path) -> None:
    text = byte_level()
    ids = Tokenizer.from_str(text).get_vocab()
    end, turn, start = ids["<|endoftext|>"], ids["<|im_end|>"], ids["<s>"]
    for files, expected in (
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}, "config": {"eos_token_id": end}}, turn),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, turn),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<|endoftext|>"}}, end),
        ({"generation_config": {"eos_token_id": [turn, end]}, "config": {"eos_token_id": end}}, turn),
        ({"config": {"eos_token_id": end, "bos_token_id": start}}, end),
        ({"config": {"text_config": {"eos_token_id": end}}}, end),
    ):
        found = read_tokenizer(directory(tmp_path / "model", text, **files))
        assert (found.start_id, found.end_id, found.boundary) == (expected, expected, (expected,)), files
        assert found.bos_id == (start if "bos_token_id" in files.get("config", {}) else None)
        assert json.loads(found.config())["eos_token"] == Tokenizer.from_str(text).id_to_token(expected)
    by_file = TokenizerFile(path=str(tmp_path / "model/tokenizer.json"))
    assert read_tokenizer(by_file) == found
    assert read_tokenizer(by_file.model_copy(update={"end_token": "<|im_end|>"})).end_id == turn


def test_without_an_end_there_is_none(tmp_path: Path) -> None:
    alone = directory(tmp_path / "model", byte_level(), config={"eos_token_id": 10**6})
    with pytest.raises(InputError, match=r"by which token a text ends.*data\.tokenizer\.end_token"):
        read_tokenizer(alone)
    with pytest.raises(InputError, match=r"data\.tokenizer\.end_token: '</nothing>' is no token of"):
        read_tokenizer(alone.model_copy(update={"end_token": "</nothing>"}))


def test_a_start_of_its_own_stands_before_each_document(tmp_path: Path) -> None:
    ends = {"config": {"eos_token_id": 2, "vocab_size": 9999}}
    found = read_tokenizer(directory(tmp_path / "model", sentencepiece_bpe(), **ends))
    assert (found.start_id, found.end_id, found.bos_id, found.boundary) == (1, 2, 1, (2, 1))
    assert found.outputs == Tokenizer.from_str(found.json).get_vocab_size()  # a model has more as padding
    own = read_tokenizer(directory(tmp_path / "model", byte_level(bos=True), tokenizer_config={"eos_token": "<s>"}))
    assert own.boundary == (own.bos_id,) == (own.end_id,)
    made = tokenization.train_bpe(TRAINED_ON, 300)
    assert trained(made.to_str()).boundary == (made.token_to_id(tokenization.END),)


@pytest.mark.parametrize(
    "made",
    [byte_level, *(partial(made, p) for made in (sentencepiece_bpe, unigram) for p in ("metaspace", "doubles", None))],
)
def test_later_pieces_have_the_tokens_of_the_whole(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    tokenizer = TextTokenizer(made(), start_id=1, end_id=2, bos_id=None, outputs=999)
    spaceless = ["\u65e5\u672c" * 200] if made is not byte_level else []  # cut anywhere, where it may have merged
    for text in ("\n".join(TRAINED_ON), *spaceless):
        pieces = [piece.decode() for piece in documents.iter_pieces([text.encode()])]
        assert len(pieces) > 5
        tokens = encode_pieces([piece_of(text, place) for place, text in enumerate(pieces)], tokenizer, {})
        (whole,) = tokenization.encode(Tokenizer.from_str(tokenizer.json), [text])
        assert np.array_equal(np.concatenate(tokens), whole)
    assert continuing(continuing(tokenizer.json)) == continuing(tokenizer.json)


@pytest.mark.parametrize("made", [byte_level, sentencepiece_bpe, unigram])
def test_a_document_that_spells_a_special_token_does_not_end(made: Any) -> None:
    end, text = ("<|endoftext|>" if made is byte_level else "</s>"), "name {} value"
    tokenizer = TextTokenizer(made(), start_id=1, end_id=2, bos_id=None, outputs=999)
    special = Tokenizer.from_str(tokenizer.json).token_to_id(end)
    (ids,) = encode_pieces([piece_of(text.format(end))], tokenizer, {})
    assert special not in ids
    decoded = Tokenizer.from_str(tokenizer.json).decode(ids.tolist(), skip_special_tokens=False)
    assert decoded == text.format(end)


def trained_as(model: Any, trainer: Any, **parts: Any) -> str:
    tokenizer = Tokenizer(model)
    for name, part in ({"pre_tokenizer": pre_tokenizers.Whitespace()} | parts).items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    text: str = tokenizer.to_str()
    return text


def panics() -> str:
    """A tokenizer.json that the library loads, and that ends what encodes by it."""
    made = Tokenizer.from_str(byte_level())
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 393)])
    spec = json.loads(made.to_str())
    spec["post_processor"]["special_tokens"] = {}
    return json.dumps(spec)


def test_what_cannot_write_every_text_back_is_refused(tmp_path: Path) -> None:
    wordpiece = trained_as(models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=200))
    plain = trained_as(models.BPE(), trainers.BpeTrainer(vocab_size=200))
    byte = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}
    alphabet = trainers.BpeTrainer(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    no_unknown = json.loads(unigram())
    no_unknown["model"] |= {"unk_id": None}
    merges_spaces = json.loads(unigram())
    merges_spaces["normalizer"]["normalizers"].append(
        {"type": "Replace", "pattern": {"Regex": f"{SPACE}+"}, "content": SPACE}
    )
    lower = trained_as(models.BPE(), alphabet, normalizer=normalizers.Lowercase(), **byte)
    folded = trained_as(models.BPE(), alphabet, normalizer=normalizers.NFKC(), **byte)
    for text, message in (
        (wordpiece, "a WordPiece tokenizer, which encoders have"),
        (plain, "a BPE tokenizer that writes"),
        (lower, "writes .*The 1st line.* back as .*the 1st line"),
        (folded, r"writes .*\ufb01.* back as .*fi"),
        (json.dumps(no_unknown), "a Unigram tokenizer that cannot read"),
        (json.dumps(merges_spaces), r"a Unigram tokenizer that writes .* Two spaces.* back as .* Two spaces"),
        ("{}", r"not a tokenizer\.json"),
        (panics(), r"not a tokenizer\.json: no entry found for key"),
    ):
        with pytest.raises(InputError, match=message):
            read_tokenizer(directory(tmp_path / "model", text, config={"eos_token_id": 1}))
    nfc = trained_as(models.BPE(), alphabet, normalizer=normalizers.NFC(), **byte)
    assert read_tokenizer(directory(tmp_path / "model", nfc, config={"eos_token_id": 1})).end_id == 1


def test_older_files_are_converted(tmp_path: Path) -> None:
    """GPT-2's first release had a vocabulary and merges, and no tokenizer.json."""
    spec = json.loads(byte_level())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 3}))
    with pytest.raises(InputError, match=r"no such file in it as tokenizer\.json"):
        read_tokenizer(TokenizerFile(path=str(folder)))
    (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = (" ".join(merge) for merge in spec["model"]["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    found = Tokenizer.from_str(read_tokenizer(TokenizerFile(path=str(folder))).json)
    text = TRAINED_ON[0]
    assert found.encode(text).ids == Tokenizer.from_str(byte_level()).encode(text).ids


@pytest.mark.parametrize(
    ("content", "package"), [(b"\n\x0e\n\x05<unk>", "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")]
)
def test_what_reads_older_files_is_named_where_it_is_missing(
    content: bytes, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_tokenizer, "find_spec", lambda name: None if name == package else find_spec(name))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(
        InputError, match=rf"reads tokenizer\.model with the package {package}, .*: pip install {package}"
    ):
        read_tokenizer(TokenizerFile(path=str(tmp_path)))


def test_lengths_that_a_training_left_in_the_file_are_left_out(tmp_path: Path) -> None:
    """Trainers save a tokenizer that cuts texts to their longest row, and fills a batch up to it."""
    made = Tokenizer.from_str(byte_level())
    made.enable_truncation(4)
    made.enable_padding()
    saved = directory(tmp_path / "model", made.to_str(), tokenizer_config={"eos_token": "<|endoftext|>"})
    texts = [TRAINED_ON[0], "name"]
    found, whole = (
        [ids.tolist() for ids in tokenization.encode(Tokenizer.from_str(text), texts)]
        for text in (read_tokenizer(saved).json, byte_level())
    )
    assert found == whole
    assert len(whole[0]) > 4


def test_what_is_drawn_at_random_is_switched_off(tmp_path: Path) -> None:
    for name, text, drawn in (
        ("bpe", byte_level(), {"dropout": 0.9}),
        ("unigram", unigram(), {"alpha": 0.1, "nbest_size": -1}),
    ):
        spec = json.loads(text)
        spec["model"] |= drawn
        end = "</s>" if name == "unigram" else "<|endoftext|>"
        found = read_tokenizer(directory(tmp_path / name, json.dumps(spec), tokenizer_config={"eos_token": end}))
        own, drawing = Tokenizer.from_str(found.json), Tokenizer.from_str(json.dumps(spec))
        expected = Tokenizer.from_str(text).encode(TRAINED_ON[0]).ids
        assert all(own.encode(TRAINED_ON[0]).ids == expected for _ in range(5)), name
        if name == "bpe":
            assert any(drawing.encode(TRAINED_ON[0]).ids != expected for _ in range(5))
    labelled = truncating_tokenizer(json.dumps(spec).encode(), "there", 64)
    assert len({tuple(labelled.encode(TRAINED_ON[0]).ids) for _ in range(5)}) == 1


def test_a_vocabulary_without_every_byte_is_refused(tmp_path: Path) -> None:
    """The library leaves a byte out that has no entry, and says nothing."""
    spec = json.loads(byte_level())
    del spec["model"]["vocab"]["\u00f3"]  # 0xF3, with which a flag's letters begin
    message = r"its vocabulary lacks 1 of the bytes that texts are made of, such as 0xF3: characters .* would be lost"
    config = {"eos_token_id": 394}
    with pytest.raises(InputError, match=message):
        read_tokenizer(directory(tmp_path / "model", json.dumps(spec), config=config))
    spec = json.loads(sentencepiece_bpe())
    for name in ("<0x9D>", "<0x09>"):
        spec["model"]["vocab"]["no" + name] = spec["model"]["vocab"].pop(name)
    with pytest.raises(InputError, match=r"lacks 2 of the bytes .* such as 0x09"):
        read_tokenizer(directory(tmp_path / "model", json.dumps(spec), config={"eos_token_id": 2}))
    spec = json.loads(byte_level())
    spec["model"]["vocab"]["never"] = spec["model"]["vocab"].pop("\u00ff")  # 0xFF, which UTF-8 never has
    assert read_tokenizer(directory(tmp_path / "model", json.dumps(spec), config=config)).end_id == 394


SMOLLM2_LACKS = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


@pytest.mark.parametrize("lacking", [SMOLLM2_LACKS, text_tokenizer.RARE_BYTES], ids=["SmolLM2", "every rare byte"])
def test_bytes_that_texts_hardly_have_may_be_lacking_and_their_loss_is_told(
    lacking: Iterable[int], tmp_path: Path
) -> None:
    spec = json.loads(byte_level())
    by_byte = {byte: character for character, byte in tokenization.BYTE_BY_CHARACTER.items()}
    for byte in lacking:
        spec["model"]["vocab"]["never" + by_byte[byte]] = spec["model"]["vocab"].pop(by_byte[byte])
    found = read_tokenizer(directory(tmp_path / "model", json.dumps(spec), config={"eos_token_id": 394}))
    texts = ["plain", "the end\x04 of a tape", "\U00012345 is cuneiform", "\U00040000 is nothing yet"]
    altered = dict[int, tuple[str, int]]()
    encode_pieces([piece_of(text, document=number) for number, text in enumerate(texts)], found, altered)
    assert altered == {1: ("1.txt", ALTERED), 3: ("3.txt", ALTERED)}


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    made = Tokenizer.from_str(byte_level())
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 99_999)])
    with pytest.raises(InputError, match=r"puts a token of id 99999 beside each text .*; expected one that it has"):
        read_tokenizer(directory(tmp_path / "model", made.to_str(), config={"eos_token_id": 394}))
    with pytest.raises(InputError, match="puts a token of id 99999"):
        truncating_tokenizer(made.to_str().encode(), "there", 64)
    spec = json.loads(byte_level())
    spec["added_tokens"][-1]["id"] = 2000  # behind a gap: as many entries as the highest id says, not as are there
    spec["added_tokens"][-1]["content"] = "<|far|>"
    found = read_tokenizer(directory(tmp_path / "model", json.dumps(spec), config={"eos_token_id": 394}))
    highest = max(Tokenizer.from_str(found.json).get_vocab().values())
    assert found.outputs == highest + 1
    spec["model"]["vocab"]["x" * 40] = 1 << 31
    with pytest.raises(InputError, match="has a token of id 2147483648; expected ids below 16,777,216"):
        read_tokenizer(directory(tmp_path / "model", json.dumps(spec), config={"eos_token_id": 394}))


def test_how_texts_come_back_is_told() -> None:
    spec = json.loads(byte_level(nfc=True))
    spec["normalizer"] = {"type": "Sequence", "normalizers": [
        spec["normalizer"], {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
    ]}  # fmt: skip
    texts = ["plain", "cafe\u0301", "``quoted''", " led by a space"]
    made = TextTokenizer(json.dumps(spec), 0, 0, None, 400)
    altered = dict[int, tuple[str, int]]()
    pieces = [piece_of(text, document=number) for number, text in enumerate(texts)]
    assert len(encode_pieces(pieces, made, altered)) == 4
    assert altered == {1: ("1.txt", COMPOSED), 2: ("2.txt", ALTERED)}
    assert tell_altered(count_altered([("a", SAME), *altered.values()]), 4, "documents") == [
        "the tokenizer writes 1 of 4 documents back as Unicode's NFC of them, first 1.txt: models learn what it "
        "writes, and figures count the bytes that were given",
        "the tokenizer writes 1 of 4 documents back otherwise than they are, first 2.txt: models learn what it writes, "
        "and figures count the bytes that were given",
    ]
