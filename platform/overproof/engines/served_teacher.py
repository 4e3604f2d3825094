"""A teacher behind an endpoint: what its weights are known by, and that it reads texts as the data's tokenizer does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from overproof.config import Served
from overproof.data.manifest import TEST_TEXTS, Manifest
from overproof.engines.endpoint import Endpoint
from overproof.errors import InputError
from overproof.files import FrozenModel, read_json

PROBE_TEXTS, PROBE_CHARACTERS = 4, 400
SAME_NATS = 0.1  # mean difference of the probe's tokens that rounding and other batches explain


class ServedTeacher(FrozenModel):
    """The content of ``teacher.json``, which a teacher that is served has in place of weights."""

    FILE: ClassVar[str] = "teacher.json"
    model: str
    revision: str | None
    weights: str  # what the endpoint says of them: the served file's sha256, the folder or repository, or nothing
    tokenizer_sha256: str
    probe_nats: tuple[float, ...]  # of the tokens of a few test texts: to know the model by

    @classmethod
    def read(cls, root: Path) -> Self:
        """Of an artifact's folder.

        Raises:
            InputError: it is missing, or not of this format.
        """
        return read_json(cls, root / cls.FILE)

    @property
    def sha256(self) -> str:
        """Of all but the probe, which rounds otherwise from time to time."""
        return hashlib.sha256(self.model_dump_json(exclude={"probe_nats"}).encode()).hexdigest()


def ask_teacher(endpoint: Endpoint, prepared: Path, top: int) -> ServedTeacher:
    """Who answers at an endpoint, asked for ``top`` likeliest tokens.

    Raises:
        InputError: it cannot be asked, does not tell so many, or splits texts into other tokens than the data's.
    """
    manifest, served = Manifest.read(prepared), endpoint.served
    file = manifest.tokenizer(prepared)
    assert file is not None
    assert manifest.tokenizer_sha256 is not None
    tokenizer, nats = Tokenizer.from_file(str(file)), list[float]()
    entry, texts = endpoint.model_entry(), _probe_texts(prepared, manifest.positions)
    for text, told in zip(texts, endpoint.read(texts, top), strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids not in (told.ids, told.ids[1:], told.ids[:-1], told.ids[1:-1]):  # a token may begin and end every text
            raise InputError(
                f"{served.url}: {served.model} reads {text[:40]!r} as tokens {told.ids[:8]}…, and the data's tokenizer "
                f"({file}) as {ids[:8]}…; expected the tokenizer of the served model: set data.tokenizer to {{kind: "
                "file, path: its directory}"
            )
        told.likeliest(top, manifest.outputs)
        nats += (-told.logprobs_P).tolist()
    return ServedTeacher(
        model=served.model,
        revision=served.revision,
        weights=_weights(entry),
        tokenizer_sha256=manifest.tokenizer_sha256,
        probe_nats=tuple(nats),
    )


def require_same(recorded: ServedTeacher, found: ServedTeacher) -> None:
    """Refuse an endpoint that answers otherwise than the teacher that the train stage found there.

    Raises:
        InputError: its weights are others by what it says, or by its answers.
    """
    advice = "; name the weights that are served now as train.model.revision, which makes what follows anew"
    if found.sha256 != recorded.sha256:
        raise InputError(
            f"train.model: {recorded.model} had weights {recorded.weights or 'without a name'!r} when the train stage "
            f"asked, and has {found.weights!r} now{advice}"
        )
    difference = np.abs(np.subtract(found.probe_nats, recorded.probe_nats)).mean()
    if not difference <= SAME_NATS:
        raise InputError(
            f"train.model: what {recorded.model} says of {len(found.probe_nats)} tokens is {difference:.2g} nats a "
            "token from what it said when the train stage asked, and rounding explains "
            f"{SAME_NATS:g}: other weights{advice}"
        )


def open_teacher(served: Served, recorded: Path, prepared: Path, top: int = 1) -> Endpoint:
    """The endpoint of a teacher whose ``teacher.json`` lies in a folder.

    Raises:
        InputError: as ``ask_teacher`` and ``require_same``.
    """
    endpoint = Endpoint(served)
    require_same(ServedTeacher.read(recorded), ask_teacher(endpoint, prepared, top))
    return endpoint


def _weights(entry: dict[str, Any]) -> str:
    """What GET /models says of them: overproof serve has the file's sha256, vLLM the folder or repository."""
    proof = entry.get("overproof")
    return str(proof["sha256"] if isinstance(proof, dict) else entry.get("root") or "")


def _probe_texts(prepared: Path, positions: int) -> list[str]:
    """The beginnings of some test texts, which fit a context of so many tokens."""
    texts = pq.read_table(prepared / TEST_TEXTS, columns=["text"])["text"].to_pylist()
    length = min(PROBE_CHARACTERS, max(8, positions // 4))
    return [text[:length] for text in texts if text.strip()][:PROBE_TEXTS]
