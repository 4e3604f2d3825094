"""Tokens a second of a teacher whose likeliest tokens are kept: the product's worker against transformers in a loop.

    .venv/bin/python benchmarks/capture.py PREPARED TRAINED [--k 32] [--batch 8] [--rows 24] [--repeats 5] [--threads 1]
    .venv/bin/python benchmarks/capture.py --preset tiny|1b [...]

PREPARED and TRAINED are artifacts of the stages `prepare` and `train`: folders of a store. A preset makes rows and
weights of its own, at random. Without Ray, on the GPU where there is one. Prints one Markdown table. Both have the
model loaded, in one process, and take the same rows in turn, the same batch in every forward pass. Ours
is what an actor of the stage `cache` runs: rows read from the shards, the top k, the mass that is left and the label's
log-probability in half precision, packed into Parquet, flushed and hashed. The peer's rows lie in memory; it takes
log_softmax, topk and the label's log-probability, in half precision, and writes one .npz at the end. Every repeat has
rows of its own. That both say the same of them is checked. On a GPU, and with --bf16, the worker takes them in bf16,
too, and how far its targets are from those in fp32 is told. `tiny` takes seconds on a CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import interleaved, machine, spread, table
from rows import SHARDS, write_rows
from transformers import AutoModelForCausalLM

from overproof.artifacts import Artifact, Store, read_record
from overproof.config import Cache, TopK
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards, table_to_numpy
from overproof.data.row_files import open_shard
from overproof.distill.row_cache import CachedFile, cache_key_fields
from overproof.distill.target_cache import TargetIndex, TargetKey
from overproof.distill.teacher_worker import CaptureJob, TargetWorker
from overproof.files import filesystem
from overproof.models.compute import start_compute
from overproof.models.hf_directory import build_model, save_model
from overproof.models.llama import Llama

SEED = 0
GPUS = int(torch.cuda.is_available())
DEVICE = start_compute(GPUS, "fp32").device
STAGES = ("prepare", "train")
ROWS_PER_GROUP = 8
PRESETS = {  # a Llama, the tokens of a row, the vocabulary
    "tiny": (Llama(hidden_size=64, intermediate_size=160, layers=2, heads=4, kv_heads=2), 64, 512),
    "1b": (Llama(hidden_size=2048, intermediate_size=5632, layers=22, heads=32, kv_heads=4), 2048, 32_000),
}


def opened(folder: Path) -> Artifact:
    record = read_record(str(folder.absolute()))
    assert record is not None, f"{folder}: no artifact"
    return Artifact(str(folder.absolute()), record)


def random_parents(preset: str, rows: int, store: Path) -> tuple[Artifact, Artifact]:
    """What the stages `prepare` and `train` would give, of random rows and a model that nobody trained."""
    llama, sequence, vocabulary = PRESETS[preset]
    drafts = [Store(str(store)).new_writer("capture", stage, str(n) * 64, {}, {}) for n, stage in enumerate(STAGES, 1)]
    with drafts[0].directory() as folder:
        manifest = write_rows(folder, SHARDS * rows, sequence, ROWS_PER_GROUP, vocabulary)
    with drafts[1].directory() as folder:
        model = build_model(llama, manifest, SEED)
        save_model(model, model.config, folder / "model")
    prepared, trained = (draft.commit({}, 0.0) for draft in drafts)
    return prepared, trained


def worker(
    prepared: Artifact, trained: Artifact, settings: Cache, files: int, groups: int, store: Path
) -> TargetWorker:
    """As an actor has it, for so many files of so many row groups each."""
    scheme: Any = settings.scheme
    fields = cache_key_fields(SEED, prepared, trained)
    key = TargetKey(**fields, scheme=scheme, temperatures=(1.0,), precision=settings.precision)
    planned = tuple(
        CachedFile(path=f"{n:05d}.parquet", groups=tuple(range(n * groups, (n + 1) * groups))) for n in range(files)
    )
    index = TargetIndex(identity=key, rows=files * groups * key.rows_per_group, files=planned)
    draft = Store(str(store)).new_writer("capture", "cache", "0" * 64, {}, {})
    return TargetWorker(CaptureJob(settings, index, prepared, trained, draft))


class Loop:
    """What one writes with transformers at hand."""

    def __init__(self, model: Path, tokens: list[np.ndarray], batch: int, k: int, out: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(DEVICE)
        self.tokens, self.batch, self.k, self.out = tokens, batch, k, out

    @torch.inference_mode()
    def __call__(self, number: int) -> None:
        start_compute(GPUS, "fp32")
        kept: dict[str, list[np.ndarray]] = {"logprobs": [], "indices": [], "label_logprob": []}
        rows = torch.from_numpy(self.tokens[number].astype(np.int64)).to(DEVICE)
        for ids_BS in rows.split(self.batch):
            logprobs_BPV = self.model(input_ids=ids_BS[:, :-1], use_cache=False).logits.log_softmax(-1)
            top_BPK, indices_BPK = logprobs_BPV.topk(self.k)
            labels_BP = logprobs_BPV.gather(-1, ids_BS[:, 1:, None])[..., 0]
            kept["logprobs"].append(top_BPK.half().cpu().numpy())
            kept["indices"].append(indices_BPK.to(torch.int32).cpu().numpy())
            kept["label_logprob"].append(labels_BP.half().cpu().numpy())
        np.savez(self.out / f"{number}.npz", **{name: np.concatenate(parts) for name, parts in kept.items()})


def capture(ours: TargetWorker, number: int) -> None:
    start_compute(GPUS, ours.job.settings.precision)
    for _ in ours({"file": np.array([number])}):
        pass


def timed(run: Callable[[int], None], numbers: list[int], tokens: int) -> dict[str, Any]:
    """One more file."""
    number = numbers.pop(0)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    run(number)
    return {"wall": tokens / (time.perf_counter() - wall_s), "cpu": tokens / (time.process_time() - cpu_s)}


def written(ours: TargetWorker, file: int) -> dict[str, np.ndarray]:
    """The columns of a file that a worker wrote, as they lie there."""
    _, root = filesystem(ours.job.draft.uri)
    return table_to_numpy(open_shard(Path(root) / ours.index.files[file].path).read())


def check_same(ours: TargetWorker, out: Path, file: int) -> None:
    """Hold what both wrote of a file's rows against each other."""
    found, theirs, layout = written(ours, file), np.load(out / f"{file}.npz"), ours.index.identity.layout
    for name in ("logprobs", "label_logprob"):
        own = layout.decode(name, found[name])
        np.testing.assert_allclose(own, theirs[name].astype(np.float32).reshape(own.shape), rtol=2e-3, atol=2e-3)
    own = layout.decode("indices", found["indices"])
    assert (own == theirs["indices"].reshape(own.shape)).mean() > 0.99, "other outputs"  # ties may swap


def told_difference(fp32: TargetWorker, bf16: TargetWorker, files: int) -> str:
    """Of the targets that both wrote."""
    found: dict[str, list[np.ndarray]] = {"label_logprob": [], "likeliest": []}
    for file in range(files):
        tables = [written(each, file) for each in (fp32, bf16)]
        layout = fp32.index.identity.layout
        labels = [layout.decode("label_logprob", each["label_logprob"]).astype(np.float32) for each in tables]
        places = [layout.decode("indices", each["indices"]).reshape(-1, fp32.job.settings.scheme.k) for each in tables]
        found["label_logprob"].append(np.abs(labels[0] - labels[1]).ravel())
        found["likeliest"].append(places[0][:, 0] == places[1][:, 0])
    apart, same = (np.concatenate(parts) for parts in found.values())
    return (
        f"In bf16 the label's log-probability is {apart.mean():.4f} nats from that in fp32 in the mean, "
        f"{apart.max():.3f} at most, and the likeliest output is the same at {same.mean():.2%} of {same.size:,} places."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path, nargs="?")
    parser.add_argument("trained", type=Path, nargs="?")
    parser.add_argument("--preset", choices=PRESETS)
    for name, value in (("k", 32), ("batch", 8), ("rows", 24), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--bf16", action="store_true", help="in that, too, on a CPU: emulated, it takes many times as long"
    )
    given = parser.parse_args()
    if (given.preset is None) == (given.trained is None):
        parser.error("expected PREPARED and TRAINED, or --preset")
    files = given.repeats + 1
    settings = Cache(scheme=TopK(k=given.k), batch_size=given.batch, cpus_per_actor=given.threads, gpus_per_actor=GPUS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if given.preset is None:
            prepared, trained = opened(given.prepared), opened(given.trained)
        else:
            prepared, trained = random_parents(given.preset, files * given.rows, folder / "parents")
        manifest = Manifest.read(prepared.local())
        groups = given.rows // manifest.rows_per_group
        ours = worker(prepared, trained, settings, files, groups, folder / "store")
        rows, shards = groups * manifest.rows_per_group, Shards(prepared.local(), "train")
        tokens = [shards.take(np.arange(n * rows, (n + 1) * rows))["tokens"] for n in range(files)]
        loop = Loop(trained.local() / "model", tokens, given.batch, given.k, folder)
        workers = {"ours": ours}
        if given.bf16 or GPUS:
            half = settings.model_copy(update={"precision": "bf16"})
            workers["bf16"] = worker(prepared, trained, half, files, groups, folder / "half")
        runs: dict[str, Callable[[int], None]] = {name: partial(capture, each) for name, each in workers.items()}
        runs["loop"] = loop
        for run in runs.values():
            run(0)
        check_same(ours, folder, 0)
        numbers = {name: list(range(1, files)) for name in runs}
        count = rows * manifest.positions
        found = interleaved(
            given.repeats, {name: partial(timed, run, numbers[name], count) for name, run in runs.items()}
        )
        difference = told_difference(ours, workers["bf16"], files) if "bf16" in workers else ""
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else machine(given.threads)
    print(f"{where}; {rows} rows of {manifest.positions} tokens each time, {given.batch} in a forward")
    print(
        f"pass, the {given.k} likeliest of {manifest.outputs:,}; {given.repeats} times, medians (least to most); load"
    )
    print(f"average {os.getloadavg()[0]:.1f} at the end\n")
    names = {"ours": "ours, the worker of `cache`", "bf16": "the same in bf16", "loop": "transformers in a loop"}
    lines = []
    for name, title in ((name, names[name]) for name in found):
        ratios = [
            statistics.median(a[clock] / b[clock] for a, b in zip(found["ours"], found[name], strict=True))
            for clock in ("wall", "cpu")
        ]
        rates = (spread(found[name], clock, 0) for clock in ("wall", "cpu"))
        lines.append((title, *rates, *(f"{ratio:.3f}" for ratio in ratios)))
    table(("who", "tokens/s", "tokens a CPU second", "ours ÷ it", "ours ÷ it, CPU"), lines)
    if difference:
        print(f"\n{difference}")
    assert "ray" not in sys.modules


if __name__ == "__main__":
    main()
