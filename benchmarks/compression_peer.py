"""llm-compressor's GPTQ of a model, in a Python of its own, which ``compression.py --peer`` starts: W4A16 in groups of
64 (its 128 does not divide SmolLM2's width), the output layer whole, scored by ``transformers``.

    PYTHON benchmarks/compression_peer.py MODEL ROWS.npz RESULT.json

ROWS has ``calibration`` (rows of one length) and, for each text, arrays of token ids. RESULT gets the nats a token of
each text, and MB by the bytes of what was written.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM

GROUP = 64


def loss(model: torch.nn.Module, rows: list[np.ndarray]) -> float:
    """Nats a token."""
    nats, tokens = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            ids = torch.from_numpy(row.astype(np.int64))[None]
            found = model(input_ids=ids[:, :-1]).logits[0].float().log_softmax(-1)
            nats -= float(found.gather(-1, ids[0, 1:, None]).sum())
            tokens += ids.shape[1] - 1
    return nats / tokens


def main(model: str, rows: str, result: str) -> None:
    given = np.load(rows)
    calibration = given["calibration"].astype(np.int64)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": calibration.tolist(), "attention_mask": np.ones_like(calibration).tolist()})
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    oneshot(
        model=loaded, dataset=data, recipe=recipe, num_calibration_samples=len(calibration),
        max_seq_length=calibration.shape[1],
    )  # fmt: skip
    texts = sorted({name.rpartition(".")[0] for name in given.files if name != "calibration"})
    found = {text: loss(loaded, [given[name] for name in given.files if name.startswith(f"{text}.")]) for text in texts}
    with tempfile.TemporaryDirectory() as folder:
        loaded.half().save_pretrained(folder, save_compressed=True)
        found["mb"] = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
