"""Trains without Ray and DeepSpeed: proof that the loop runs on a bare laptop. Run by test_loop.py.

python without_ray.py PREPARED
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from engine_ranks import SEED, train
from tiny_data import settings

from overproof.data.manifest import Manifest
from overproof.models.hf_directory import build_model
from overproof.train.engine import TorchEngine


def main(root: Path) -> None:
    torch.set_num_threads(1)
    plan = settings(steps=40, validate_every=10, batch_size=16, learning_rate=1e-2)
    engine = TorchEngine(build_model(plan.model, Manifest.read(root), SEED), plan)  # type: ignore[arg-type]
    rows = train(engine, plan, root, 0, 1)
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"ray", "deepspeed"})
    print(json.dumps({"rows": rows, "loaded": loaded}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
