"""A tokenizer as a model's directory has it: where its texts begin and end, and whether it can write every text back.

Any tokenizer of the `tokenizers` library will do that gives back what it is given: byte-level BPE with any split and
any special tokens, SentencePiece-style BPE with byte fallback, and the like.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import Unigram

from overproof import hub
from overproof.config import TokenizerFile
from overproof.data.chat_template_files import read_object
from overproof.data.manifest import TOKENIZER
from overproof.data.sources import CONVERTIBLE, NAMING_TOKENS, tokenizer_files
from overproof.data.tokenization import BYTE_BY_CHARACTER, END, boundary_of
from overproof.data.tokenizer_json import BYTE_NAMES, entries, iter_steps
from overproof.errors import InputError

MODEL_FILES = ("tokenizer.model", "spiece.model")
SENTENCEPIECE = "sentencepiece"  # the package
NO_BYTES = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})  # of UTF-8
# Real vocabularies lack some of these (SmolLM2's eight), as texts hardly have them: control characters, and what begins
# a character of the planes 4 to 11 and 16. A text that has one is counted and told of, see ``how_it_comes_back``.
RARE_BYTES = frozenset({*range(0x20), 0x7F, 0xF1, 0xF2, 0xF4} - set(b"\t\n\r"))
MOST_ENTRIES = 1 << 24  # far above any vocabulary
PARTS = {"normalizer", "pre_tokenizer", "post_processor", "decoder"}
DRAWN = ("dropout", "alpha", "nbest_size")  # settings of models by which tokens are a matter of chance
FOR_ENCODERS = ("WordPiece", "WordLevel")
# Each is normal under NFC. What NFC changes may be lost, and a space that begins a text: models were trained like that.
MUST_COME_BACK = (
    "The 1st line, isn't it?  Two spaces.\n\n\tindented = {'a': [1, 23, 4567]}  # \\ ~ ^ | < > & @\r\n",
    " leading and trailing ",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f600",
    "\u00a0\u3000\u200d\ufffd\ufb01",
)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the ids that documents of it need."""

    json: str  # tokenizer.json
    start_id: int  # before every document: what the tokenizer puts before a text, or else the end of the one before
    end_id: int  # after every document
    bos_id: int | None  # of the token that is called bos
    outputs: int  # entries of the vocabulary; models of one tokenizer have more, some these and some those, as padding

    @property
    def boundary(self) -> tuple[int, ...]:
        """See ``boundary_of``."""
        return boundary_of(self.start_id, self.end_id)

    def config(self) -> str:
        """The content of the ``tokenizer_config.json`` that lies beside it, by which transformers knows its tokens."""
        return tokenizer_config(self.json, self.bos_id, self.end_id)


def tokenizer_config(text: str, bos_id: int | None, end_id: int | None, **further: Any) -> str:
    """The content of a ``tokenizer_config.json`` that lies beside the ``tokenizer.json`` with this text."""
    named = {name: id_ for name, id_ in (("bos_token", bos_id), ("eos_token", end_id)) if id_ is not None}
    tokenizer = Tokenizer.from_str(text) if named else None
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.id_to_token(id_) for name, id_ in named.items() if tokenizer is not None},
        **further,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(described, indent=1) + "\n"


def trained(text: str) -> TextTokenizer:
    """A tokenizer that ``train_bpe`` made."""
    tokenizer = Tokenizer.from_str(text)
    end = tokenizer.token_to_id(END)
    assert end is not None
    return TextTokenizer(text, start_id=end, end_id=end, bos_id=end, outputs=_entries(tokenizer))


def read_tokenizer(settings: TokenizerFile) -> TextTokenizer:
    """An existing tokenizer: its ``tokenizer.json``, or what transformers makes of the files of a directory.

    What of it cuts texts to a length, fills them up or is drawn is switched off (see ``without_training_settings``).

    Raises:
        InputError: there is none, it cannot write every text back, it puts tokens around a text that it has not, or
            nothing says by which token a text ends.
    """
    files, where = tokenizer_files(settings), settings.path
    text = without_training_settings(tokenizer_text(files, where), where)
    tokenizer = load_tokenizer(text, where)
    with naming_faults_of_tokenizers(where):
        _require_bytes(json.loads(text), where)
        _check_writes_back(tokenizer, where)
    named = _Named.of(files)
    end = _end_id(tokenizer, settings, named)
    before, after = added_tokens(tokenizer)
    if len(before) > 1 or after not in ([], [end]):
        raise InputError(
            f"{where}: puts {_names(tokenizer, before)} before each text and {_names(tokenizer, after)} after it; "
            f"expected one token at most before, and none or {tokenizer.id_to_token(end)!r} after: give the tokenizer "
            "of a language model"
        )
    bos = before[0] if before else named.token(tokenizer, "bos_token")
    start = before[0] if before else end
    return TextTokenizer(text, start_id=start, end_id=end, bos_id=bos, outputs=_entries(tokenizer))


@contextmanager
def naming_faults_of_tokenizers(where: object) -> Iterator[None]:
    """Whatever the library raises over a ``tokenizer.json``, as one error that names it.

    Raises:
        InputError: in place of it.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # The library raises nothing more precise than Exception, and what it panics with is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{where}: not a tokenizer.json: {error}") from None


def load_tokenizer(text: str, where: object) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json`` with this content.

    Raises:
        InputError: it is none, or an id of its vocabulary, or of the tokens that it puts around texts, is beyond it.
    """
    with naming_faults_of_tokenizers(where):
        tokenizer = Tokenizer.from_str(text)
        around = [*chain.from_iterable(added_tokens(tokenizer))]
    count = _entries(tokenizer)
    if count > MOST_ENTRIES:
        raise InputError(f"{where}: has a token of id {count - 1}; expected ids below {MOST_ENTRIES:,}")
    for id_ in around:
        if tokenizer.id_to_token(id_) is None:
            raise InputError(
                f"{where}: puts a token of id {id_} beside each text (post_processor), and no token of its vocabulary "
                "has that id; expected one that it has"
            )
    return tokenizer


def without_training_settings(text: str, where: object) -> str:
    """A ``tokenizer.json`` without what a training left in it: a length that texts are cut to or filled up to, merges
    that are left out at random (BPE-dropout, arXiv 1910.13267), pieces that are drawn (arXiv 1804.10959).

    Raises:
        InputError: it is no JSON object with a model.
    """
    with naming_faults_of_tokenizers(where):
        spec = json.loads(text)
        if not _names_every_part(spec):
            spec = json.loads(Tokenizer.from_str(text).to_str())
            text = json.dumps(spec, ensure_ascii=False)
    lengths = {"truncation": None, "padding": None}
    model = {name: value for name, value in spec["model"].items() if name not in DRAWN or not value}
    if model == spec["model"] and not any(spec.get(name) for name in lengths):
        return text
    return json.dumps({**spec, **lengths, "model": model}, ensure_ascii=False)


def _names_every_part(spec: Any) -> bool:
    """Whether a ``tokenizer.json`` has what the library writes, and not only as much as it needs to read one."""
    parts = [spec["model"], *(spec.get(part) or {"type": "None"} for part in PARTS)]
    steps = [step for part in ("normalizer", "pre_tokenizer") for step in _opened(spec.get(part))]
    return spec.keys() >= {*PARTS, "added_tokens"} and all("type" in part for part in (*parts, *steps))


def _opened(part: Any) -> Iterator[Any]:
    if part:
        yield part
        for step in part.get("normalizers") or part.get("pretokenizers") or ():
            yield from _opened(step)


def tokenizer_text(files: Mapping[str, bytes], where: str) -> str:
    """The tokenizer.json of a directory's files (see ``tokenizer_files``), or what transformers makes of the others.

    Raises:
        InputError: it makes nothing of them.
    """
    return files[TOKENIZER].decode(errors="replace") if TOKENIZER in files else _converted(where)


def _entries(tokenizer: Tokenizer) -> int:
    """Entries of a vocabulary, unused ids below the last among them."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def added_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of special tokens that a tokenizer puts before and after a text."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _names(tokenizer: Tokenizer, ids: list[int]) -> str:
    return " ".join(repr(tokenizer.id_to_token(id_)) for id_ in ids) or "nothing"


def _require_bytes(spec: Mapping[str, Any], where: str) -> None:
    """Raises InputError where a vocabulary of bytes lacks one that texts have: the library drops it without a word.

    Only bytes that any text may have are asked for, see ``RARE_BYTES``.
    """
    model = spec["model"]
    vocabulary = entries(spec).values() if model["type"] in ("BPE", "Unigram") else ()
    steps = [step["type"] for part in ("normalizer", "pre_tokenizer") for step in iter_steps(spec.get(part))]
    if "ByteLevel" in steps:
        names: Mapping[int, str] = {byte: character for character, byte in BYTE_BY_CHARACTER.items()}
    elif model.get("byte_fallback"):
        names = dict(enumerate(BYTE_NAMES))
    else:
        return
    there = set(vocabulary)
    missing = [byte for byte, name in names.items() if name not in there and byte not in NO_BYTES | RARE_BYTES]
    if missing:
        raise InputError(
            f"{where}: its vocabulary lacks {len(missing)} of the bytes that texts are made of, such as "
            f"0x{missing[0]:02X}: characters that have them would be lost; expected all 256, as trainers put them in "
            "that are given an initial alphabet"
        )


def _check_writes_back(tokenizer: Tokenizer, where: str) -> None:
    kind = type(tokenizer.model).__name__
    if kind in FOR_ENCODERS:
        raise InputError(
            f"{where}: a {kind} tokenizer, which encoders have and which cannot write every text back; expected "
            "byte-level BPE, or BPE or unigram with byte fallback"
        )
    tokenizer.encode_special_tokens = True
    for text in MUST_COME_BACK:
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # unigram without a token for the unknown raises nothing more precise
            raise InputError(f"{where}: a {kind} tokenizer that cannot read {text!r}: {error}") from None
        found = tokenizer.decode(ids, skip_special_tokens=False)
        if found not in (text, text.removeprefix(" ")):
            raise InputError(
                f"{where}: a {kind} tokenizer that writes {text!r} back as {found!r}; expected every text as it was: "
                "byte-level BPE, or BPE or unigram with byte fallback, which neither strips nor folds"
            )


# --- which token ends a text ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """What the files beside tokenizer.json say: by name first, as transformers' tokenizers do, then by id."""

    by_name: tuple[Mapping[str, Any], ...]  # tokenizer_config.json, special_tokens_map.json
    by_id: tuple[Mapping[str, Any], ...]  # generation_config.json, config.json, its text_config

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> _Named:
        def read(name: str) -> Mapping[str, Any]:
            return read_object(files.get(name, b"{}"), name)

        config = read("config.json")
        inner = config.get("text_config")
        return cls(
            (read("tokenizer_config.json"), read("special_tokens_map.json")),
            (read("generation_config.json"), config, inner if isinstance(inner, dict) else {}),
        )

    def token(self, tokenizer: Tokenizer, name: str) -> int | None:
        """The id of ``eos_token`` or ``bos_token``, where one is named that the vocabulary has."""
        for mapping in self.by_name:
            found = mapping.get(name)
            content = found.get("content") if isinstance(found, dict) else found
            if isinstance(content, str) and (id_ := tokenizer.token_to_id(content)) is not None:
                return int(id_)
        for mapping in self.by_id:
            found = mapping.get(f"{name}_id")
            first = found[0] if isinstance(found, list) and found else found
            if isinstance(first, int) and tokenizer.id_to_token(first) is not None:
                return first
        return None


def _end_id(tokenizer: Tokenizer, settings: TokenizerFile, named: _Named) -> int:
    if settings.end_token is not None:
        found = tokenizer.token_to_id(settings.end_token)
        if found is None:
            raise InputError(
                f"data.tokenizer.end_token: {settings.end_token!r} is no token of {settings.path}; expected one"
            )
        return int(found)
    end = named.token(tokenizer, "eos_token")
    if end is None:
        raise InputError(
            f"{settings.path}: nothing says by which token a text ends: no eos_token in tokenizer_config.json or "
            "special_tokens_map.json beside it, nor eos_token_id in generation_config.json or config.json; expected "
            "one, or its name: --set data.tokenizer.end_token=NAME"
        )
    return end


def _converted(path: str) -> str:
    if hub.is_model(path):
        there = hub.repository(path).files
        folder = hub.download(path, [n for n in (*NAMING_TOKENS, *CONVERTIBLE) if n in there], lambda far: far())
    else:
        folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{path}: no {TOKENIZER} in it; expected one: only a local directory or hf://ORG/NAME can be converted"
        )
    needed = {name: _package_for(folder / name) for name in MODEL_FILES if (folder / name).is_file()}
    for name, package in needed.items():
        if find_spec(package) is None:
            raise InputError(
                f"{path}: no {TOKENIZER} in it, and transformers reads {name} with the package {package}, which is not "
                f"installed: pip install {package}; or save a {TOKENIZER} beside it where it is: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
    from transformers import AutoTokenizer  # seconds to import, and seldom needed

    try:
        backend = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text: str = backend.backend_tokenizer.to_str()
    except Exception as error:  # whatever a model's own class raises
        raise InputError(
            f"{path}: no {TOKENIZER} in it, and transformers makes none of its files: {str(error).splitlines()[0]}; "
            f"expected a {TOKENIZER}, or {', '.join(CONVERTIBLE)} as a model's class reads them"
        ) from None
    made = type(backend.backend_tokenizer.model)
    for name, package in needed.items():
        if package == SENTENCEPIECE and _is_unigram(folder / name) != (made is Unigram):
            held = "BPE" if made is Unigram else "unigram"
            raise InputError(
                f"{path}: no {TOKENIZER} in it, and transformers makes a {made.__name__} tokenizer of {name}, which "
                f"holds a {held} one: texts would be split otherwise; expected the {TOKENIZER} that the model was "
                "trained with"
            )
    return text


def _package_for(model: Path) -> str:
    """What reads it: SentencePiece's files are protocol buffers, whose first field begins so; tiktoken's are lines."""
    with model.open("rb") as opened:
        return SENTENCEPIECE if opened.read(1) == b"\n" else "tiktoken"


def _is_unigram(model: Path) -> bool:
    """Whether SentencePiece's scores are log-probabilities: those of its BPE are the places of merges."""
    from sentencepiece import SentencePieceProcessor

    read = SentencePieceProcessor(model_file=str(model))
    return any(not read.GetScore(id_).is_integer() for id_ in range(read.GetPieceSize()))
