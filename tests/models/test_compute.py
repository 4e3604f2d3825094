"""Where and how models compute: as the recipe says, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from decoder_cases import CASES
from overproof.data.manifest import Manifest
from overproof.errors import InputError
from overproof.models.bert import Bert
from overproof.models.compute import start_compute
from overproof.models.hf_directory import build_model
from overproof.models.mlp import Mlp
from overproof.models.vit import Vit

WIDE_SPREAD = {"initializer_range": 0.2}
IMAGES = {"channels": 1, "height": 8, "width": 8, "classes": ["a", "b", "c"]}
TEXTS = {"classes": ["a", "b", "c"], "sequence_length": 16, "vocabulary": 320, "padding": 1}
NUMBERS = {"columns": [{"mean": 0.1, "deviation": 2.0, "categories": c} for c in ([], ["a", "b"])]}
CLASSIFIERS = {
    "bert": (
        Bert(hidden_size=32, intermediate_size=48, layers=2, heads=4, **WIDE_SPREAD),
        "text_classification",
        TEXTS,
    ),
    "vit": (
        Vit(hidden_size=32, intermediate_size=64, layers=2, heads=4, **WIDE_SPREAD),
        "image_classification",
        IMAGES,
    ),
    "mlp": (Mlp(hidden_size=32, intermediate_size=64, layers=2, **WIDE_SPREAD), "tabular_classification", NUMBERS),
}


def model_of(kind: str) -> PreTrainedModel:
    if kind in CASES:
        return CASES[kind].model()
    section, task, details = CLASSIFIERS[kind]
    manifest = Manifest(task=task, columns=(), splits={}, rows_per_group=4, positions=1, outputs=3, details=details)
    return build_model(section, manifest, 0).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (3, 16), generator=generator)
    given: dict[str, Any] = {"input_ids": ids}
    if model.main_input_name == "pixel_values":
        given = {"pixel_values": torch.rand(3, 1, 8, 8, generator=generator)}
    elif model.main_input_name == "features":
        given = {"features": torch.tensor([[0.3, 0.0], [torch.nan, 1.0], [-2.0, torch.nan]])}
    with torch.inference_mode():
        found: torch.Tensor = model(**given).logits
    return found


@pytest.mark.parametrize("kind", ["smollm2", "gpt2", "gemma3", "bert", "vit", "mlp"])
def test_weights_in_half_the_bytes_change_nothing_and_logits_are_whole(kind: str) -> None:
    where = start_compute(0, "bf16")
    called, trained, plain = where.place(model_of(kind)), where.place(model_of(kind), trained=True), model_of(kind)
    found = logits(called)
    assert torch.equal(found, logits(trained))
    assert {weight.dtype for weight in trained.parameters()} == {torch.float32}
    assert any(weight.dtype == torch.bfloat16 for weight in called.parameters())
    expected = logits(plain)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
    for precision in ("fp32", "tf32"):
        assert torch.equal(logits(start_compute(0, precision).place(plain)), expected)


def test_products_on_gpus_are_rounded_as_asked_alone() -> None:
    for precision in ("bf16", "tf32", "fp32"):
        start_compute(0, precision)
        flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        assert flags == (precision != "fp32",) * 2


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_is_taken_where_one_was_reserved_and_nowhere_else(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hides no GPU of a node from a process that reserved none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert start_compute(0, "fp32").device == torch.device("cpu")
    if there:
        assert start_compute(0.5, "fp32").device == torch.device("cuda", 3)
        return
    with pytest.raises(InputError, match=r"0\.5 GPUs are reserved here, and torch .* finds none"):
        start_compute(0.5, "fp32")
