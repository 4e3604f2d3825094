"""Seconds a token of LoRA fine-tuning on packed conversations: ours against TRL's SFTTrainer and LLaMA-Factory.

    .venv/bin/python benchmarks/finetune.py MODEL [--peers FOLDER] [--tokens 255] [--batch 2] [--steps 2] [--repeats 5]
        [--threads 1] [--rank 8] [--without NAME ...]

MODEL is the Hugging Face directory of a chat model. Prints one Markdown table. Conversations about the functions of the
standard library are written by the model's own template and packed, best fit, by our code; all train on those same
rows, in the same order, in fp32: AdamW, the same rate, adapters of the same rank in every linear layer, answers alone
count. Ours is the product's engine (DeepSpeed, one rank) and loop. The peers are told to do without what would make
them slower: checkpointing of activations, logging, evaluation, padding. Each is a process of its own that is loaded
once; they train in turn, --steps at a time, and wait meanwhile. The first turn of each does not count. A token is one
of a conversation, whether its loss counts or not; --tokens are those that a row predicts: it has one more.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from measuring import HERE, environment, interleaved, machine, printed, spread, table
from peers import llama_factory, trl

from overproof.config import TokenizerFile
from overproof.data.text_tokenizer import read_tokenizer
from overproof.tasks.chat_rows import best_fit, packed_rows
from overproof.tasks.chat_template import ConversationEncoder, EncodedConversation, read_chat_template
from overproof.tasks.conversations import Conversation

MODULES = ("argparse", "asyncio", "collections", "csv", "json", "logging", "os", "random", "shutil", "statistics",
           "subprocess", "tempfile", "threading", "typing", "unittest", "zipfile")  # fmt: skip
NAMES = {"ours": "ours", "sft_trainer": "TRL SFTTrainer", "llama_factory": "LLaMA-Factory"}


class Tuner:
    """A process that has a model loaded, and trains a few steps each time that it is told to."""

    def __init__(self, python: Path | str, name: str, setting: Path, threads: int) -> None:
        self.log = setting.with_name(f"{name}.log")
        self._process = subprocess.Popen(
            [str(python), str(HERE / "tuners" / f"{name}.py"), str(setting)],
            env=environment(threads, PYTHONPATH=os.pathsep.join([str(HERE.parent / "platform"), str(HERE)])),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True,
        )  # fmt: skip

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()

    def turn(self) -> dict[str, Any]:
        """Train for so many steps as the setting says."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"'):
                return printed(line)
        sys.exit(f"{self.log.stem} ended:\n{self.log.read_text()[-4000:]}")


def conversations(model: Path, most: int) -> list[EncodedConversation]:
    """What the standard library's functions say of themselves, of so many tokens at most, by the model's template."""
    settings = TokenizerFile(path=str(model))
    tokenizer = read_tokenizer(settings)
    encoder = ConversationEncoder(read_chat_template(settings, tokenizer), tokenizer)
    found = []
    for module in map(import_module, MODULES):
        for name, value in sorted(vars(module).items()):
            if not callable(value) or not (said := inspect.getdoc(value)):
                continue
            asked = {"role": "user", "content": f"What does {module.__name__}.{name} do?"}
            answer = {"role": "assistant", "content": said.split("\n\n")[0]}
            _, pieces = encoder.encode(Conversation(name, (asked, answer), (False, True), None))
            found += [piece for each in pieces if (piece := each.cut(most)) is not None]
    return found


def write_rows(folder: Path, model: Path, tokens: int, steps: int, batch: int, seed: int) -> dict[str, float]:
    """The packed rows of so many steps, as ``rows.npz``; gives what they hold."""
    rows = steps * batch
    found = conversations(model, tokens + 1)
    packed = [[found[i] for i in row] for row in best_fit([len(each.tokens_T) for each in found], tokens + 1)]
    chosen = np.random.default_rng(seed).permutation(len(packed))
    if len(chosen) < rows:
        sys.exit(f"{len(chosen)} rows; {rows} are needed: fewer steps, repeats or rows in a batch")
    taken = [packed[i] for i in chosen[:rows]]
    columns = packed_rows(taken, tokens)
    answers = columns["answer"].reshape(-1, batch, tokens).sum((1, 2))  # of each step, of which the loss is the mean
    scale = np.repeat(batch / answers, batch).astype(np.float32)
    sizes = np.zeros((rows, max(map(len, taken))), np.int32)  # tokens of each conversation of a row
    for row, each in zip(sizes, taken, strict=True):
        row[: len(each)] = [len(one.tokens_T) for one in each]
    np.savez(folder / "rows.npz", scale=scale, sizes=sizes, **columns)
    held = int(sizes.sum())
    return {"tokens": held / rows, "conversations": sum(map(len, taken)) / rows,
            "answers": float(columns["answer"].sum()) / held}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", type=Path)
    options.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "overproof-peers")
    for name, value in (("tokens", 255), ("batch", 2), ("steps", 2), ("repeats", 5), ("threads", 1), ("rank", 8)):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--without", nargs="*", default=[], choices=list(NAMES)[1:])
    given = options.parse_args()
    makers = {"ours": lambda _: sys.executable, "sft_trainer": trl, "llama_factory": llama_factory}
    pythons = {name: makers[name](given.peers.absolute()) for name in NAMES if name not in given.without}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        steps = (given.repeats + 1) * given.steps
        held = write_rows(folder, given.model, given.tokens, steps, given.batch, 0)
        setting = folder / "setting.json"
        setting.write_text(json.dumps({
            "model": str(given.model.absolute()), "rows": str(folder / "rows.npz"), "tokens": given.tokens,
            "batch": given.batch, "steps": given.steps, "turns": given.repeats + 1, "rank": given.rank,
            "threads": given.threads, "learning_rate": 1e-4,
        }))  # fmt: skip
        found: dict[str, list[dict[str, Any]]] = {}
        tuners = {name: Tuner(python, name, setting, given.threads) for name, python in pythons.items()}
        try:
            for tuner in tuners.values():
                tuner.turn()
            turns = {name: partial(tuner.turn) for name, tuner in tuners.items()}
            found = interleaved(given.repeats, turns)
        finally:
            for tuner in tuners.values():
                tuner.__exit__(None, None, None)
    share, average = f"{100 * held['answers']:.0f} % of answers", os.getloadavg()[0]
    print(f"{machine(given.threads)}; {given.batch} rows of {given.tokens + 1} tokens a step, of which")
    print(f"{held['tokens']:.1f} are of conversations ({held['conversations']:.1f} a row; {share}); rank {given.rank};")
    print(f"{given.repeats} turns of {given.steps} steps, medians (least to most); load average {average:.1f}\n")
    table(
        ("who", "ms a token", "CPU ms a token", "ours ÷ it", "ours ÷ it, CPU", "loss, mean"),
        [line(name, found) for name in found],
    )


def line(name: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    ratios = [
        statistics.median(a[key] / b[key] for a, b in zip(found["ours"], found[name], strict=True))
        for key in ("wall_ms", "cpu_ms")
    ]
    losses = statistics.mean(turn["loss"] for turn in found[name])
    own = (spread(found[name], key, 2) for key in ("wall_ms", "cpu_ms"))
    return [NAMES[name], *own, *(f"{ratio:.3f}" for ratio in ratios), f"{losses:.3f}"]


if __name__ == "__main__":
    main()
