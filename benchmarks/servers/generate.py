"""Hugging Face's `generate` on padded batches, fp32, with no server in front of it.

    python generate.py MODEL THREADS BATCH

Prints ``{"url": ""}`` when it is ready, and an answer to each line of its standard input, which is a plan as
``clients.py`` takes it: BATCH prompts make a batch, which ends when its last text does.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, (threads, size) = sys.argv[1], map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def batch(bodies: list[dict[str, Any]]) -> int:
        inputs = tokenizer([body["prompt"] for body in bodies], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        tokens = max(body["max_tokens"] for body in bodies)
        made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        return int((made.shape[1] - inputs["input_ids"].shape[1]) * len(bodies))

    def run(plan: dict[str, Any]) -> dict[str, Any]:
        began_s, tokens, each_s = time.perf_counter(), 0, []
        for start in range(0, len(plan["bodies"]), size):
            batch_s = time.perf_counter()
            tokens += batch(plan["bodies"][start : start + size])
            each_s.append(time.perf_counter() - batch_s)
        wall_s = time.perf_counter() - began_s
        return {"wall_s": wall_s, "cpu_s": 0.0, "tokens": tokens, "first_s": each_s, "whole_s": each_s}

    print(json.dumps({"url": ""}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
