"""Whether a model's directory speaks the tokenizer of the data: before the data are prepared as far as that is known
then, and to the letter afterwards.
"""

from __future__ import annotations

import json
from pathlib import Path

from overproof.artifacts import Artifact
from overproof.config import BpeTokenizer, TokenizerFile
from overproof.config.base import Section
from overproof.data.manifest import TOKENIZER, Manifest
from overproof.data.sources import tokenizer_files
from overproof.data.text_tokenizer import tokenizer_text, without_training_settings
from overproof.data.tokenizer_json import entries, tokenizer_difference
from overproof.errors import InputError
from overproof.files import file_sha256


def require_possible_tokenizer(tokenizer: Section, directory: str) -> None:
    """Refuse a model's directory whose tokenizer cannot be the one that ``data.tokenizer`` describes.

    A byte-level BPE that is still to be made of the data may turn out as the directory's, where an earlier run made
    that of the same data.

    Raises:
        InputError: there is no tokenizer, or it is another one.
    """
    own = _read(directory, directory)
    if isinstance(tokenizer, BpeTokenizer):
        found = json.loads(own)
        kind, size = found["model"]["type"], len(entries(found))
        if kind == "BPE" and size <= tokenizer.vocab_size:
            return
        raise InputError(
            f"data.tokenizer: kind 'bpe' makes {tokenizer.vocab_size:,} entries of the data; {directory} has a "
            f"tokenizer of its own ({kind}, {size:,} entries); expected one tokenizer for both: set data.tokenizer to "
            f"{{kind: file, path: {directory}}}"
        )
    path = str(getattr(tokenizer, "path", directory))
    if path != directory:
        _require_equal(directory, own, _read(path, path), path)


def require_tokenizer(directory: Path, prepared: Path | Artifact) -> None:
    """Refuse a text model that speaks another tokenizer than the data that is ``prepared``.

    Raises:
        InputError: there is no tokenizer, or it splits texts otherwise than the one the data was tokenised with.
    """
    manifest = Manifest.read(prepared)
    own = manifest.tokenizer(prepared)
    if own is None:
        return
    file = directory / TOKENIZER
    if file.is_file() and file_sha256(file) == manifest.tokenizer_sha256:
        return
    _require_equal(directory, _read(str(directory), file), own.read_text(encoding="utf-8"), own)


def _read(path: str, where: object) -> str:
    return without_training_settings(tokenizer_text(tokenizer_files(TokenizerFile(path=path), ""), path), where)


def _require_equal(directory: object, found: str, data: str, where: object) -> None:
    try:
        difference = tokenizer_difference(data, found)
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"{directory}: not a tokenizer.json: {error}") from None
    if difference is not None:
        raise InputError(
            f"{directory}: is not the tokenizer of the data ({where}): {difference}; expected one tokenizer for both: "
            "set data.tokenizer to {kind: file, path: the model's directory}"
        )
