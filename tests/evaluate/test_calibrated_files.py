"""Every variant of a GGUF file of a model that was really trained: what it means, and how near it is to the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from overproof.artifacts import Artifact
from overproof.data.parquet_reader import Shards
from overproof.engines.llamacpp_logits import LlamaCppLogits
from overproof.errors import InputError
from overproof.export.base import ExportContext
from overproof.export.gguf import FORMAT, Gguf
from overproof.export.gguf_file import read_gguf
from overproof.export.gguf_weights import require_same_weights


@pytest.fixture(scope="module")
def exported(text: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A variant of a small teacher that was really trained."""
    folder, prepared = tmp_path_factory.mktemp("variants"), text["prepare"]
    model = text["train"].local() / "model"

    def write(variant: Any, size: int | str = "") -> Path:
        unquantised, file = folder / "f16.gguf", folder / f"{variant}{size}.gguf"
        if variant != "f16":
            write("f16")
        if not file.exists():
            mixed = {"at_most_mb": size / 1e6} if isinstance(size, int) else {"as_large_as": size} if size else None
            settings = {"formats": [variant], "mixed": mixed}
            context = ExportContext(
                Gguf.model_validate({**settings, "calibration": {"rows": 64}} if variant != "f16" else {}), "teacher",
                model, prepared.local() / "tokenizer.json", prepared,
            )  # fmt: skip
            FORMAT.write(model, file, variant, context, unquantised)
        return file

    return write


@pytest.mark.parametrize("variant", ["q6_k", "q5_k_m", "q4_k_m", "q4_0", "q4_k_m-imatrix", "q5_k_m-gptq", "q4_0-gptq"])
def test_every_variant_opens_in_llama_cpp_and_means_what_torch_reads_from_it(
    exported: Callable[[str], Path], variant: str
) -> None:
    file = exported(variant)
    require_same_weights(file, exported("f16"))
    engine, tokens = LlamaCppLogits(file, 48, 1, kv_cache="f32"), np.arange(3, 51)
    found = torch.from_numpy(engine.logits_at(tokens, np.arange(48))).log_softmax(-1)
    engine.close()
    with torch.inference_mode():
        expected = read_gguf(file)(input_ids=torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1)
    assert (expected.exp() * (expected - found).abs()).sum(-1).mean() < 0.03


def distance(text: dict[str, Artifact], reference: Path, file: Path) -> float:
    """Mean KL divergence of a file's model from the reference's on test documents, which calibration has not seen."""
    shards = Shards(text["prepare"], "test")
    tokens = torch.from_numpy(shards.take(np.arange(min(48, shards.rows)))["tokens"].astype(np.int64))
    whole, model, total, batches = read_gguf(reference), read_gguf(file), 0.0, tokens[:, :-1].split(16)
    with torch.inference_mode():
        for batch in batches:
            expected, found = (m(input_ids=batch).logits.log_softmax(-1) for m in (whole, model))
            total += float((expected.exp() * (expected - found)).sum(-1).mean())
    return total / len(batches)


def test_calibrated_files_are_as_large_and_nearer_to_the_model(
    exported: Callable[[str], Path], text: dict[str, Artifact]
) -> None:
    """On test documents, which calibration has not seen."""

    def to_f16(variant: str) -> float:
        return distance(text, exported("f16"), exported(variant))

    assert exported("q4_0").stat().st_size == exported("q4_0-gptq").stat().st_size
    plain, weighed, made = (to_f16(f"q4_0{rounding}") for rounding in ("", "-imatrix", "-gptq"))
    print(f"KL to f16: plain {plain:.4f}, imatrix {weighed:.4f}, gptq {made:.4f}")
    assert made < weighed < plain


def test_a_mixed_file_is_within_its_size_and_makes_good_use_of_it(
    exported: Callable[..., Path], text: dict[str, Artifact]
) -> None:
    uniform = exported("q4_0-gptq")
    most_bytes = uniform.stat().st_size + 4096
    mixed = exported("mixed-gptq", most_bytes)
    assert 0.99 * most_bytes < mixed.stat().st_size <= most_bytes
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(mixed).tensors}
    assert len(kinds) > 2
    near, far = (distance(text, exported("f16"), file) for file in (mixed, uniform))
    print(f"KL to f16: {near:.5f} mixed, {far:.5f} in q4_0-gptq of 4 kB less")
    assert near < far


def test_a_size_that_no_types_meet_is_refused_with_the_least_there_is(exported: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"compress\.mixed: .* the least they take is .* MB: give .* MB more"):
        exported("mixed-gptq", 20_000)


def test_a_mixed_file_may_be_as_large_as_a_plain_one_and_is_nearer(
    exported: Callable[[str], Path], text: dict[str, Artifact]
) -> None:
    """Of the bytes of q4_0, whose tables of embeddings have twice the bits, layers make better use."""
    plain, mixed = exported("q4_0"), exported("mixed-gptq", "q4_0")
    sizes = [file.stat().st_size for file in (plain, mixed)]
    assert 0.98 * sizes[0] < sizes[1] <= sizes[0] + 64
    near, far = (distance(text, exported("f16"), file) for file in (mixed, plain))
    assert near < 0.5 * far


@pytest.mark.parametrize("mixed", [{}, {"as_large_as": "q4_0", "at_most_mb": 1}])
def test_its_size_is_said_once(mixed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected as_large_as or at_most_mb, and not both"):
        Gguf.model_validate({"formats": ["mixed-gptq"], "mixed": mixed})
