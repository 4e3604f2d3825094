"""A text classifier eager in torch, its files of a finished run, and int8 files of the same model by other tools.

    .venv/bin/python benchmarks/encoder.py STORE [--run minilm-topics] [--peers PYTHON] [--texts 200] [--repeats 5]

Prints one Markdown table. STORE holds a finished run of a text classification whose compress.teacher is true.
Contenders answer the same test texts one at a time, in turn, in one process and on one thread: p50 is the median of the
repeats' medians. Accuracy is of --judged test texts, beside the share of them that get the eager model's class;
resident memory is that of a process of each that has answered. PYTHON has optimum and Olive (see encoder_peers.py).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import torch
from measuring import HERE, machine, median, say, spread, table
from numpy.typing import NDArray

from overproof.artifacts import Store
from overproof.data.parquet_reader import Shards
from overproof.engines.base import EngineSettings
from overproof.engines.probe import probe_arrays
from overproof.engines.probe_messages import ArrayRequest
from overproof.export.stage import export_folder, read_exports
from overproof.models.encoder import PADDING
from overproof.models.hf_directory import load_model
from overproof.registry import ENGINES
from overproof.tasks.base import spread_units

EAGER = "torch, eager"
Answer = Callable[[NDArray[np.float32]], int]  # of a row (D), the class


def eager(model: Path) -> Answer:
    loaded = load_model(model)

    def answer(row_D: NDArray[np.float32]) -> int:
        ids = torch.from_numpy(row_D[row_D != PADDING].astype(np.int64))[None]
        with torch.inference_mode():
            return int(loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.argmax())

    return answer


def exported(file: Path) -> Answer:
    engine: Any = ENGINES["onnxruntime"].load(file, EngineSettings(threads=1))
    return lambda row_D: int(engine.logprobs(row_D[None]).argmax())


def by_others(file: Path) -> Answer:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def answer(row_D: NDArray[np.float32]) -> int:
        ids = row_D[row_D != PADDING].astype(np.int64)[None]
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        return int(session.run(None, {name: given[name] for name in names})[0].argmax())

    return answer


RESIDENT = """
import sys, numpy, onnxruntime, psutil
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
ids = numpy.array([sys.argv[2].split(",")], numpy.int64)
given = {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "token_type_ids": numpy.zeros_like(ids)}
session.run(None, {each.name: given[each.name] for each in session.get_inputs()})
print(psutil.Process().memory_info().rss / 1e6)
"""


def resident_of(answer: str, file: Path, row_D: NDArray[np.float32]) -> float:
    """MB of a process that answers with nothing else loaded but what it needs."""
    if answer == "by_others":
        ids = ",".join(str(int(each)) for each in row_D if each != PADDING)
        done = subprocess.run([sys.executable, "-c", RESIDENT, file, ids], check=True, capture_output=True, text=True)
        return float(done.stdout)
    if answer == "exported":
        request = ArrayRequest(
            engine="onnxruntime",
            file=str(file),
            threads=1,
            rows=[row_D.tolist()],
            timed_rows=[row_D.tolist()],
            timed_requests=20,
            probe_s=60.0,
        )
        return probe_arrays(request, lambda _: None).resident_mb
    command = [sys.executable, __file__, "--resident", file, ",".join(map(str, row_D.tolist()))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    if sys.argv[1] == "--resident":
        _, _, file, row = sys.argv
        eager(Path(file))(np.array(row.split(","), np.float32))
        print(psutil.Process().memory_info().rss / 1e6)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--run", default="minilm-topics")
    parser.add_argument("--peers", help="Python of an environment with optimum and Olive")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--judged", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {stage: Store(given.store).get(f"{given.run}/{stage}") for stage in ("prepare", "train", "compress")}
    model, shards = found["train"].local("model/") / "model", Shards(found["prepare"], "test")
    columns = shards.take(spread_units(np.arange(shards.rows), given.judged))
    rows, labels = columns["tokens"].astype(np.float32), columns["label"]
    timed = rows[spread_units(np.arange(len(rows)), given.texts)]
    with tempfile.TemporaryDirectory() as scratch:
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        contenders: dict[str, tuple[str, Path, int]] = {EAGER: ("eager", model, weights)}
        for export in read_exports(found["compress"].local("exports.json")):
            file = export_folder(found["compress"], export.file) / export.file
            contenders[export.name] = ("exported", file, export.size_bytes)
        if given.peers:
            subprocess.run([given.peers, HERE / "encoder_peers.py", model, scratch], check=True, capture_output=True)
            for file in sorted(Path(scratch).glob("*.onnx")):
                contenders[f"{file.stem} int8"] = ("by_others", file, file.stat().st_size)
        makers = {"eager": eager, "exported": exported, "by_others": by_others}
        answers = {name: makers[kind](file) for name, (kind, file, _) in contenders.items()}
        chosen, measured = {}, {name: list[dict[str, float]]() for name in contenders}
        for name, answer in answers.items():
            chosen[name] = np.array([answer(row) for row in rows])
            say(f"{name}: accuracy {(chosen[name] == labels).mean():.4f}")
        for repeat in range(given.repeats):
            for name in np.random.default_rng(repeat).permutation([*answers]).tolist():
                seconds, cpu_s = list[float](), time.process_time()
                for row in timed:
                    began_s = time.perf_counter()
                    answers[name](row)
                    seconds.append(time.perf_counter() - began_s)
                cpu_s = time.process_time() - cpu_s
                measured[name].append({"p50_ms": 1e3 * float(np.median(seconds)), "cpu_ms": 1e3 * cpu_s / len(timed)})
            say(f"repeat {repeat + 1} of {given.repeats}")
        resident = {name: resident_of(kind, file, rows[0]) for name, (kind, file, _) in contenders.items()}
    print(f"{len(timed)} texts timed, {len(rows):,} judged, {given.repeats} repeats; {machine(1)}\n")
    first_ms = [each["p50_ms"] for each in measured[EAGER]]
    for each in measured.values():
        for figures, first in zip(each, first_ms, strict=True):
            figures["faster"] = first / figures["p50_ms"]
    table(
        ("", "MB", "of eager, times smaller", "p50, ms", "times faster", "CPU ms a text", "accuracy, %",
         "as eager, %", "resident MB"),
        [
            (
                name, f"{size / 1e6:.2f}", f"{weights / size:.2f}", spread(measured[name], "p50_ms", 2),
                spread(measured[name], "faster", 2), f"{median(measured[name], 'cpu_ms'):.2f}",
                f"{100 * (chosen[name] == labels).mean():.2f}", f"{100 * (chosen[name] == chosen[EAGER]).mean():.2f}",
                f"{resident[name]:.0f}",
            )
            for name, (_, _, size) in contenders.items()
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
