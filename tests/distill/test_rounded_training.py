"""Students that learn in the numbers of a format: as it rounds, with the gradients of what was computed, and the better
for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from distill_world import World
from gguf import GGMLQuantizationType as Ggml
from test_student_init import student
from test_sweep import job_of
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from overproof.config import Recipe
from overproof.distill.rounded_training import ROUNDINGS, round_int8, train_rounded
from overproof.distill.student_trainer import StudentTrainer
from overproof.errors import InputError
from overproof.export.onnx_file import export_onnx
from overproof.export.onnx_int8 import quantize_onnx
from overproof.models.hf_directory import load_model, save_model

LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 60,
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [("q8_0", Ggml.Q8_0), ("q4_0", Ggml.Q4_0)])
def test_it_is_what_ggml_writes(name: Any, kind: Ggml) -> None:
    weights_RC = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    weights_RC[3, 32:64], weights_RC[5, 7] = 0, 40.0  # a block of nothing, and a number far off
    expected_RC = gguf.quants.dequantize(gguf.quants.quantize(weights_RC, kind), kind)
    found_RC = ROUNDINGS[name](torch.from_numpy(weights_RC)).numpy()
    np.testing.assert_allclose(found_RC, expected_RC, atol=1e-6)
    assert np.abs(found_RC - weights_RC).max() > 0.01


def test_it_is_what_onnx_runtime_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, architectures=["ViTForImageClassification"])
    save_model(ViTForImageClassification(config), config, tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "fp32.onnx")
    quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    held = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    written = [
        (codes.astype(np.float32) * held[name.replace("_quantized", "_scale")]).T
        for name, codes in held.items()
        if name.endswith("_quantized") and codes.ndim == 2
    ]
    for module in load_model(tmp_path / "model").vit.modules():
        if isinstance(module, nn.Linear):
            rounded_RC = round_int8(module.weight.detach()).numpy()
            rows, columns = rounded_RC.shape  # queries, keys and values are one matrix there
            parts = [part for each in written for part in np.split(each, range(rows, len(each), rows))]
            assert min(np.abs(part - rounded_RC).max() for part in parts if part.shape == (rows, columns)) < 1e-6


@pytest.mark.parametrize("name", ROUNDINGS)
def test_gradients_are_those_of_the_rounded_weights(name: Any) -> None:
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(LlamaConfig(**LLAMA)), torch.arange(24).view(2, 12)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    for module in plain.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = ROUNDINGS[name](module.weight.data)
    assert [*train_rounded(model, name).state_dict()] == [*plain.state_dict()]
    losses = [each(input_ids=ids, labels=ids).loss for each in (model, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    for (place, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=place)


def test_half_precision_trains_it_too() -> None:
    """Under autocast the forward pass is in bf16, the weights and some inputs are in fp32, and backward has neither."""
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(LlamaConfig(**LLAMA)), torch.arange(24).view(2, 12)
    train_rounded(model, "q4_0")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for place, weight in model.named_parameters():
        assert weight.grad is not None, place
        assert weight.grad.dtype is torch.float32
        assert torch.isfinite(weight.grad).all()
        assert weight.grad.abs().sum() > 0


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(InputError, match=r"rounding q4_0: found a matrix of 48 columns; expected .* blocks of 32"):
        train_rounded(LlamaForCausalLM(LlamaConfig(**LLAMA | {"intermediate_size": 48})), "q4_0")
    with pytest.raises(InputError, match=r"rounding q8_0: found none in transformer\.h"):
        train_rounded(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60)), "q8_0")


def test_a_student_validates_as_it_ships(text_world: World) -> None:
    shape = {"kind": "llama", "hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "kv_heads": 1}
    students = [student(shape, name="rounded", rounding="q4_0", teacher_weight=0.0)]
    sweep = {"students": students, "steps": 20, "validate_every": 20}
    trainer = StudentTrainer(
        job_of(text_world.context("sweep", cached=text_world.artifacts["prepare"], sweep=sweep), "rounded")
    )
    validated = trainer.run_to_validation().validation_loss
    for module in trainer.model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear
            module.weight.data = ROUNDINGS["q4_0"](module.weight.data)
    assert trainer._validate() == pytest.approx(validated, rel=1e-5)


def test_in_four_bits_it_comes_nearer_to_its_teacher() -> None:
    """Than the teacher's own weights do in four bits, or those of a student that trained as long without rounding."""
    torch.manual_seed(0)
    teacher, ids = LlamaForCausalLM(LlamaConfig(**LLAMA)), torch.randint(0, 60, (8, 16))
    for weight in teacher.parameters():
        nn.init.normal_(weight, std=0.3)
    expected = teacher(input_ids=ids).logits.log_softmax(-1).detach()

    def divergence(model: LlamaForCausalLM) -> torch.Tensor:
        found = model(input_ids=ids).logits.log_softmax(-1)
        return nn.functional.kl_div(found, expected, log_target=True, reduction="sum") / ids.numel()

    def rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
        made = LlamaForCausalLM(model.config)
        made.load_state_dict(model.state_dict())
        return train_rounded(made, "q4_0")

    plain, aware = LlamaForCausalLM(teacher.config), rounded(teacher)
    plain.load_state_dict(teacher.state_dict())
    for model in (plain, aware):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(60):
            optimizer.zero_grad()
            divergence(model).backward()
            optimizer.step()
    with torch.inference_mode():
        of_teacher, of_plain, of_aware = (divergence(rounded(model)).item() for model in (teacher, plain, aware))
    assert of_aware < 0.5 * min(of_teacher, of_plain)


def test_it_must_be_a_variant_of_the_recipe(text_world: World) -> None:
    recipe = text_world.context("sweep", cached=text_world.artifacts["prepare"]).recipe.model_dump()
    recipe["sweep"]["students"][0]["rounding"] = "int8"
    with pytest.raises(ValueError, match=r"students\.0\.rounding: found 'int8'; expected q8_0 or q4_0, so that"):
        Recipe.model_validate(recipe)
    recipe["sweep"]["students"][0]["rounding"] = None
    recipe["tune"]["space"]["rounding"] = {"kind": "choice", "values": [None, "int8"]}
    with pytest.raises(ValueError, match=r"tune\.space\.rounding\.values\.1: found 'int8'; expected q8_0 or q4_0"):
        Recipe.model_validate(recipe)
    recipe["compress"] = {"kind": "compressed_tensors", "formats": ["int8"]}  # of eight bits
    with pytest.raises(ValueError, match=r"found 'int8'; expected none: no variant of compress has one"):
        Recipe.model_validate(recipe)
