"""Every variant of a GGUF file of a model that was really trained: what it means, and how near it is to the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from overproof.artifacts import Artifact
from overproof.data.parquet_reader import Shards
from overproof.engines.llamacpp_logits import LlamaCppLogits
from overproof.export.gguf_calibration import CalibrationRows
from overproof.export.gguf_file import export_gguf, read_gguf


@pytest.fixture(scope="module")
def exported(text: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A variant of a small teacher that was really trained."""
    folder, prepared = tmp_path_factory.mktemp("variants"), text["prepare"]
    model = text["train"].local() / "model"

    def write(variant: Any) -> Path:
        file = folder / f"{variant}.gguf"
        if not file.exists():
            rows = CalibrationRows(prepared, 0, 64)
            export_gguf(model, prepared.local() / "tokenizer.json", file, variant, "teacher", rows=rows)
        return file

    return write


@pytest.mark.parametrize("variant", ["q6_k", "q5_k_m", "q4_k_m", "q4_0", "q4_k_m-imatrix", "q5_k_m-gptq", "q4_0-gptq"])
def test_every_variant_opens_in_llama_cpp_and_means_what_torch_reads_from_it(
    exported: Callable[[str], Path], variant: str
) -> None:
    file = exported(variant)
    engine, tokens = LlamaCppLogits(file, 48, 1, exact_cache=True), np.arange(3, 51)
    found = torch.from_numpy(engine.logits_at(tokens, np.arange(48))).log_softmax(-1)
    engine.close()
    with torch.inference_mode():
        expected = read_gguf(file)(input_ids=torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1)
    assert (expected.exp() * (expected - found).abs()).sum(-1).mean() < 0.03


def test_calibrated_files_are_as_large_and_nearer_to_the_model(
    exported: Callable[[str], Path], text: dict[str, Artifact]
) -> None:
    """On test documents, which calibration has not seen."""
    shards = Shards(text["prepare"], "test")
    tokens = torch.from_numpy(shards.take(np.arange(min(48, shards.rows)))["tokens"].astype(np.int64))
    batches = tokens[:, :-1].split(16)
    whole = read_gguf(exported("f16"))

    def distance(variant: str) -> float:
        model, total = read_gguf(exported(variant)), 0.0
        with torch.inference_mode():
            for batch in batches:
                expected, found = (m(input_ids=batch).logits.log_softmax(-1) for m in (whole, model))
                total += float((expected.exp() * (expected - found)).sum(-1).mean())
        return total / len(batches)

    assert exported("q4_0").stat().st_size == exported("q4_0-gptq").stat().st_size
    plain, weighed, made = (distance(f"q4_0{rounding}") for rounding in ("", "-imatrix", "-gptq"))
    print(f"KL to f16: plain {plain:.4f}, imatrix {weighed:.4f}, gptq {made:.4f}")
    assert made < weighed < plain
