"""Reads files by every function of the product that reads their kind: a line ``KIND<tab>PATH`` in, a line of JSON out.

Run as a process of its own, which ends where a file ends it, or takes more than ``LONGEST_S`` of CPU.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM  # imported before anything is timed

from overproof.config import JsonlSource, ParquetSource, TokenizerFile
from overproof.data.document_parts import Reader, Reading
from overproof.data.documents import FileSpan
from overproof.data.row_files import open_shard
from overproof.data.text_tokenizer import read_tokenizer
from overproof.data.tokenizer_json import continuing, tokenizer_difference
from overproof.engines.gguf_tokens import read_gguf_header
from overproof.errors import InputError
from overproof.export.gguf_file import read_gguf
from overproof.models.hf_directory import load_model
from overproof.models.sizes import _tensor_shapes
from overproof.registry import FORMATS
from overproof.tasks.chat import JsonlConversations, ParquetConversations
from overproof.tasks.conversations import read_conversations
from overproof.tasks.recognition import look_at
from overproof.tasks.texts import truncating_tokenizer

LONGEST_S = 10.0
MEMORY_BYTES = 24 << 30  # of addresses: torch maps several


def documents(source: Any, path: Path) -> None:
    """As a worker of ``prepare`` reads them, which hands an error on as text."""
    reading = Reading([])
    for _ in Reader("", source, None, 1).tables([FileSpan(path.name)], reading):
        pass
    for error, _ in reading.failed.values():
        raise InputError(error)


def tokenizer(path: Path) -> None:
    found = read_tokenizer(TokenizerFile(path=str(path)))
    continuing(found.json)
    tokenizer_difference(found.json, found.json)
    FORMATS["gguf"].check_tokenizer(found.json, path)


Read = Callable[[Path], object]
READS: dict[str, tuple[Read, ...]] = {
    "gguf": (read_gguf_header, read_gguf),
    "parquet": (
        lambda path: documents(ParquetSource(path=str(path.parent)), path),
        lambda path: look_at(str(path)),
        lambda path: list(read_conversations(ParquetConversations(path=str(path)))),
        open_shard,
    ),
    "jsonl": (
        lambda path: documents(JsonlSource(path=str(path.parent)), path),
        lambda path: look_at(str(path)),
        lambda path: list(read_conversations(JsonlConversations(path=str(path)))),
    ),
    "safetensors": (lambda path: _tensor_shapes(str(path.parent)), lambda path: load_model(path.parent)),
    "tokenizer": (tokenizer, lambda path: truncating_tokenizer(path.read_bytes(), path, 16)),
}


def outcome(kind: str, path: Path) -> dict[str, str]:
    """The worst of what reading a file comes to."""
    found = {"outcome": "read", "error": ""}
    for read in READS[kind]:
        try:
            read(path)
        except InputError as error:
            found = {"outcome": "refused", "error": str(error)}
            if not str(error).strip():
                return {"outcome": "traceback", "error": "an error without words"}
        except BaseException:
            return {"outcome": "traceback", "error": traceback.format_exc()}
    return found


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print(f"ready for {LlamaForCausalLM.__name__} and others", flush=True)
    for line in sys.stdin:
        kind, _, name = line.rstrip("\n").partition("\t")
        signal.setitimer(signal.ITIMER_PROF, LONGEST_S)  # SIGPROF ends the process
        found = outcome(kind, Path(name))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(found), flush=True)
