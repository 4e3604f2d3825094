"""A ResNet in ONNX Runtime, fp32 beside its int8 files: bytes, what rounding changes, and how long an answer takes.

    .venv/bin/python benchmarks/convolutions.py [--repeats 7] [--threads 1] [--edge 64] [--batches 1 8]

Prints one Markdown table. Weights are random, running statistics those of random images; files are asked in turn, and
each figure is the median of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import machine, table

from overproof.data.manifest import Manifest
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.export.onnx_file import export_onnx
from overproof.export.onnx_int8 import quantize_onnx, quantize_onnx_static
from overproof.models.hf_directory import build_model, save_model
from overproof.models.resnet import ResNet

RESNET_18 = ResNet(embedding_size=64, hidden_sizes=(64, 128, 256, 512), depths=(2, 2, 2, 2))
CALIBRATION_ROWS = 32


def write_files(folder: Path, edge: int) -> dict[str, Path]:
    details = {"channels": 3, "height": edge, "width": edge, "classes": [str(number) for number in range(10)]}
    manifest = Manifest(
        task="image_classification", columns=(), splits={}, rows_per_group=1, positions=1, outputs=10, details=details
    )
    model = build_model(RESNET_18, manifest, 0)
    for seed in range(10):
        model(torch.rand(16, 3, edge, edge, generator=torch.Generator().manual_seed(seed)))
    save_model(model, model.config, folder / "model")
    files = {name: folder / f"{name}.onnx" for name in ("fp32", "int8", "int8-static")}
    export_onnx(folder / "model", files["fp32"])
    quantize_onnx(files["fp32"], files["int8"])
    rows = np.random.default_rng(1).random((CALIBRATION_ROWS, 1, 3 * edge * edge), np.float32)
    quantize_onnx_static(files["fp32"], files["int8-static"], iter(rows), full_range=False)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--edge", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    given = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), given.edge)
        engines = {name: OnnxRuntime(path, given.threads) for name, path in files.items()}
        inputs_BD = np.random.default_rng(0).random((max(given.batches), 3 * given.edge**2), np.float32)
        answers = {name: engine.logprobs(inputs_BD) for name, engine in engines.items()}
        seconds: dict[tuple[str, int], list[float]] = {(name, b): [] for name in files for b in given.batches}
        for _ in range(given.repeats):
            for (name, rows), found in seconds.items():
                began = time.perf_counter()
                engines[name].logprobs(inputs_BD[:rows])
                found.append(time.perf_counter() - began)
        head = ["file", "MB", "nats from fp32, mean", *(f"ms of {rows}" for rows in given.batches)]
        lines = [
            [name, f"{path.stat().st_size / 1e6:.2f}", f"{np.abs(answers[name] - answers['fp32']).mean():.4f}",
             *(f"{1e3 * statistics.median(seconds[name, rows]):.1f}" for rows in given.batches)]
            for name, path in files.items()
        ]  # fmt: skip
    print(f"{machine(given.threads)}; {given.edge} x {given.edge} pixels, medians of {given.repeats}\n")
    table(head, lines)


if __name__ == "__main__":
    main()
