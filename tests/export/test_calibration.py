"""Calibrated rounding: codes in ggml's own blocks, what GPTQ makes up for, and the pass over a model that it needs."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from overproof.export.calibration import calibrate
from overproof.export.ggml_blocks import BLOCKS, dequantise, quantise
from overproof.export.gguf_types import MIXES, TensorTypes
from overproof.export.gptq import gptq

ROWS, COLUMNS = 24, 512


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_any_code_is_written_into_the_scales_that_ggml_chose(weights: np.ndarray, kind: Ggml) -> None:
    """By gguf's reader, which shares no code with what is tested; ggml's own codes give back its own bytes."""
    layout, rng = BLOCKS[kind], np.random.default_rng(1)
    width = gguf.quants.quant_shape_to_byte_shape((1, layout.columns), kind)[-1]
    plain = quantise(weights, kind).reshape(-1, width)
    scale, offset = layout.grid(plain)
    own = np.rint((dequantise(plain, kind) - offset) / scale)
    assert (own.min() >= 0, own.max() <= layout.most) == (True, True)
    np.testing.assert_array_equal(layout.with_codes(plain, own.astype(np.uint8)), plain)
    codes = rng.integers(0, layout.most + 1, scale.shape, np.uint8)
    found = dequantise(layout.with_codes(plain, codes), kind)
    np.testing.assert_allclose(found, scale * codes + offset, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_outputs_change_less_than_by_rounding_each_number_by_itself(weights: np.ndarray, kind: Ggml) -> None:
    """Of inputs that hang together, as those of a layer do; in as many bytes, on grids of ggml's choice."""
    rng = np.random.default_rng(2)
    inputs = rng.standard_normal((2048, 64)) @ rng.standard_normal((64, COLUMNS)) + rng.standard_normal((2048, COLUMNS))
    hessian = torch.from_numpy(inputs.T @ inputs).float()

    def lost(blocks: np.ndarray) -> float:
        return float((((dequantise(blocks, kind) - weights) @ inputs.T) ** 2).mean())

    plain, made = quantise(weights, kind), gptq(weights, hessian, kind)
    assert (made.dtype, made.shape) == (plain.dtype, plain.shape)
    weighed = quantise(weights, kind, hessian.diagonal().numpy())
    assert lost(made) < 0.5 * min(lost(plain), lost(weighed))
    np.testing.assert_array_equal(gptq(weights, hessian, kind), made)


def test_inputs_that_are_always_zero_and_weights_that_are_do_no_harm(weights: np.ndarray) -> None:
    weights[5] = 0
    inputs = np.random.default_rng(3).standard_normal((600, COLUMNS)).astype(np.float32)
    inputs[:, 100:200] = 0
    made = dequantise(gptq(weights, torch.from_numpy(inputs.T @ inputs), Ggml.Q4_0), Ggml.Q4_0)
    assert np.isfinite(made).all()
    assert not made[5].any()


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=3, n_head=2, n_positions=32)).eval()


def ask(model: PreTrainedModel, batch: dict[str, Tensor]) -> object:
    return model(**batch, use_cache=False)


@pytest.mark.parametrize(("make", "layers"), [(llama, "model.layers"), (gpt2, "transformer.h")])
def test_each_matrix_comes_with_what_the_renewed_model_gives_it(
    make: Callable[[], PreTrainedModel], layers: str
) -> None:
    """Its inputs are those of the model whose earlier layers have their new weights, and its own layer the old ones."""
    torch.manual_seed(0)
    model = make()
    batches = [{"input_ids": torch.randint(0, 96, (2, 16))} for _ in range(3)]
    renewed, told = dict[str, Tensor](), list[tuple[int, int]]()

    def inputs_of(reference: PreTrainedModel, module: str) -> Tensor:
        seen = list[Tensor]()
        hook = reference.get_submodule(module).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with torch.inference_mode():
            for batch in batches:
                ask(reference, batch)
        hook.remove()
        flat = torch.cat([each.reshape(-1, each.shape[-1]) for each in seen])
        return flat.T @ flat

    def renew(name: str, weight: Tensor, inputs_CC: Tensor) -> Tensor | None:
        reference = make()
        reference.load_state_dict(original)
        layer = name.removeprefix(f"{layers}.").partition(".")[0]
        earlier = {n: w for n, w in renewed.items() if int(n.removeprefix(f"{layers}.").partition(".")[0]) < int(layer)}
        reference.load_state_dict(earlier, strict=False)
        expected = inputs_of(reference, name.removesuffix(".weight"))
        torch.testing.assert_close(inputs_CC, expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(weight, original[name])
        if len(renewed) % 2:
            return None
        renewed[name] = weight.clone() * 1.5
        return renewed[name]

    original = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, layers, batches, ask, renew, lambda done, of: told.append((done, of)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert renewed


def test_the_mixes_are_llama_cpps() -> None:
    """Of eight layers the first, the last and each third between have more bits in two matrices."""
    types = TensorTypes(MIXES["q4_k_m"], 8, has_output=True)
    found = [types.of(f"blk.{layer}.ffn_down.weight", (256, 512)) for layer in range(8)]
    more = [kind is Ggml.Q6_K for kind in found]
    assert more == [True, False, False, True, False, False, True, True]
    assert types.of("blk.0.attn_q.weight", (256, 256)) is Ggml.Q4_K
    assert types.of("output.weight", (1000, 256)) is Ggml.Q6_K
    assert types.of("token_embd.weight", (1000, 256)) is Ggml.Q4_K
    assert types.of("blk.0.attn_norm.weight", (256,)) is Ggml.F32
    tied = TensorTypes(MIXES["q4_k_m"], 8, has_output=False)
    assert tied.of("token_embd.weight", (1000, 256)) is Ggml.Q6_K
    assert tied.of("blk.1.ffn_up.weight", (256, 576)) is Ggml.Q5_0  # no whole super-blocks
    assert tied.of("blk.0.ffn_down.weight", (256, 576)) is Ggml.Q8_0
