"""2,000 damaged files through the functions that read them: each is read, or is an error that names it."""

from __future__ import annotations

import gzip
import json
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from made_tokenizers import byte_level, sentencepiece_bpe, unigram
from overproof.export.gguf_file import export_gguf
from overproof.models.hf_directory import save_model

pytestmark = pytest.mark.trial
FILES = 400  # of each kind
WAIT_S = 300.0  # for an answer, on a machine that is busy: the reader ends itself after 10 s of CPU
READER = Path(__file__).with_name("fuzzed_reader.py")
RECORDS = [{"text": f"text {i}", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
           for i in range(30)]  # fmt: skip


class Reader:
    """A process that reads files, and is started again where one ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, kind: str, path: Path) -> tuple[str, str]:
        """What reading a file came to, and why."""
        process = self._process
        if process is None:
            process = self._process = subprocess.Popen(
                [sys.executable, str(READER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert (self._line(process) or b"").startswith(b"ready")
        assert process.stdin is not None
        process.stdin.write(f"{kind}\t{path}\n".encode())
        process.stdin.flush()
        line = self._line(process)
        if line is None or not line.endswith(b"\n"):
            ended = process.wait() if line is not None else None
            self.close()
            if ended in (None, -signal.SIGPROF):
                return "hang", f"no answer after {WAIT_S:g} s, or 10 s of CPU"
            return "crash", f"ended with {ended}"
        found = json.loads(line)
        return found["outcome"], found["error"]

    @staticmethod
    def _line(process: subprocess.Popen[bytes]) -> bytes | None:
        assert process.stdout is not None
        return process.stdout.readline() if select.select([process.stdout], [], [], WAIT_S)[0] else None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, bytes]]]:
    """Files of each kind that are as they should be."""
    folder = tmp_path_factory.mktemp("sound")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(byte_level())
    config = LlamaConfig(
        vocab_size=416, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=None, eos_token_id=394, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(LlamaForCausalLM(config), config, folder / "model", tokenizer)
    export_gguf(folder / "model", tokenizer, folder / "x.gguf", "q8_0", "tiny", chat_template="{{ messages }}")
    table = pa.Table.from_pylist(RECORDS).append_column("id", pa.array(range(len(RECORDS))))
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    stored = []
    for number, settings in enumerate(({}, {"compression": "none"}, {"compression": "zstd", "use_dictionary": False})):
        pq.write_table(table, folder / f"{number}.parquet", **settings)
        stored.append(("x.parquet", (folder / f"{number}.parquet").read_bytes()))
    return {
        "gguf": [("x.gguf", (folder / "x.gguf").read_bytes())],
        "parquet": stored,
        "jsonl": [("x.jsonl", lines), ("x.jsonl", lines), ("x.jsonl.gz", gzip.compress(lines))],
        "safetensors": [("model.safetensors", (folder / "model/model.safetensors").read_bytes())],
        "tokenizer": [("tokenizer.json", made.encode()) for made in (byte_level(), sentencepiece_bpe(), unigram())],
        "config": [("config.json", (folder / "model/config.json").read_bytes())],
    }


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """One to three changes, most of them near the beginning or the end, where formats have their structure."""
    for _ in range(random.integers(1, 4)):
        size = len(content)
        span = (0, size) if size < 64 else [(0, 512), (size - 512, size), (0, size)][random.integers(0, 3)]
        at = int(random.integers(max(span[0], 0), max(min(span[1], size), 1)))
        length = int(random.integers(1, 9) if random.integers(0, 2) else random.integers(1, 600))
        noise = random.integers(0, 256, length, np.uint8).tobytes()
        match random.integers(0, 7):
            case 0:
                content = content[:at]
            case 1:
                content = content[:at] + noise + content[at + length :]
            case 2:
                content = content[:at] + noise + content[at:]
            case 3:
                content = content[:at] + content[at + length :]
            case 4:
                content = content[:at] + bytes(length) + content[at + length :]
            case 5:
                content = content[:at] + b"\xff" * 8 + content[at + 8 :]
            case 6 if size:
                content = content[:at] + bytes([content[at] ^ 1 << int(random.integers(0, 8))]) + content[at + 1 :]
    return content


def rewritten(content: bytes, random: np.random.Generator) -> bytes:
    """A JSON value with some parts in the place of others."""
    tree = json.loads(content)
    odd = (None, -1, 2**40, 1.5, "", "\ud800", [], {}, [[None]], {"type": "ByteLevel"}, "a" * 1000, True)
    for _ in range(random.integers(1, 4)):
        place = tree
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = keys[random.integers(0, len(keys))]
            if isinstance(place[key], dict | list) and place[key] and random.integers(0, 4):
                place = place[key]
                continue
            if random.integers(0, 3):
                place[key] = odd[random.integers(0, len(odd))]
            else:
                del place[key]
            break
    return json.dumps(tree).encode()


def fuzzed(kind: str, sound: dict[str, list[tuple[str, bytes]]], folder: Path) -> Iterator[Path]:
    for number in range(FILES):
        random = np.random.default_rng([sum(kind.encode()), number])
        name, content = sound[kind][number % len(sound[kind])]
        is_json = kind == "tokenizer" and number % 4
        place = folder / f"{kind}{number}"
        place.mkdir()
        if kind == "safetensors":
            beside, text = sound["config"][0]
            (place / beside).write_bytes(rewritten(text, random) if number % 5 == 0 else text)
        if kind == "tokenizer":
            (place / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        (place / name).write_bytes((rewritten if is_json else damaged)(content, random))
        yield place / name


def test_fuzzed_files_are_read_or_refused(
    sound: dict[str, list[tuple[str, bytes]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, table, faults = Reader(), dict[str, Counter[str]](), list[str]()
    for kind in ("gguf", "parquet", "jsonl", "safetensors", "tokenizer"):
        name, content = sound[kind][0]
        whole = tmp_path / f"{kind}-whole"
        whole.mkdir()
        (whole / name).write_bytes(content)
        if kind == "safetensors":
            (whole / "config.json").write_bytes(sound["config"][0][1])
        if kind == "tokenizer":
            (whole / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        assert reader.ask(kind, whole / name) == ("read", "")
        table[kind] = Counter()
        for path in fuzzed(kind, sound, tmp_path):
            outcome, why = reader.ask(kind, path)
            table[kind][outcome] += 1
            if outcome not in ("read", "refused"):
                faults.append(f"{path}: {outcome}: {why}")
    reader.close()
    outcomes = ("read", "refused", "traceback", "hang", "crash")
    with capsys.disabled():
        print("\nkind          files " + " ".join(f"{each:>9}" for each in outcomes))
        for kind, found in table.items():
            print(f"{kind:<12} {found.total():>6} " + " ".join(f"{found[each]:>9}" for each in outcomes))
    kinds = Counter(fault.split(": ", 1)[1][-300:] for fault in faults)
    assert not faults, "\n".join(f"{count} x {fault}" for fault, count in kinds.most_common(20))
