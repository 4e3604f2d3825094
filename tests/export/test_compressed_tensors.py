"""Files in compressed-tensors hold the model they were made from, and the format's own library reads them alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoder_cases import VOCABULARY, built
from overproof.data.tokenization import train_bpe
from overproof.engines.gguf_tokens import read_gguf_header
from overproof.engines.vllm_server import VOCABULARY as TOKENS
from overproof.engines.vllm_server import unpacked_directory
from overproof.errors import InputError
from overproof.export.compressed_tensors import FORMAT
from overproof.export.compressed_tensors_file import (
    CONFIG,
    linear_weights,
    read_compressed,
    require_same_weights,
    write_compressed,
)
from overproof.export.compressed_tensors_schemes import SCHEMES, RoundedInputs, best_scales, group_size
from overproof.export.compressed_tensors_to_directory import write_directory
from overproof.models.hf_directory import load_model, read_config, save_model
from overproof.registry import FAMILIES

KINDS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "gemma2", "gemma3", "phi3")
VARIANTS = tuple(SCHEMES)
Write = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    train_bpe(["def f(x):\n    return x + 1\n"] * 3, VOCABULARY).save(str(made / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def write(folder: Path) -> Write:
    """A family's model in a variant; its directory lies beside."""

    def written(kind: str, variant: str) -> Path:
        place = folder / kind
        if not place.exists():
            model = built(kind)
            save_model(model, model.config, place / "model", folder / "tokenizer.json")
            (place / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        file = place / f"{variant}.safetensors"
        if not file.exists():
            write_compressed(place / "model", file, variant, "{{ messages[0].content }}")
        return file

    return written


def logprobs(model: Any, tokens: int = 24) -> Tensor:
    ids = torch.randint(VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_was_meant(write: Write, kind: str, tmp_path: Path) -> None:
    """By compressed-tensors' own code: weights to the last bit, and what they give; int8's activations apart, which the
    library scales by 127.5 and vLLM by 127.
    """
    whole = write(kind, "bf16")
    held = FORMAT.difference(whole.parent / "model", whole)
    assert held.nats <= held.explained_nats
    for variant in ("bf16", *VARIANTS):
        file = write(kind, variant)
        if variant != "bf16":
            require_same_weights(file, whole)
        own = read_compressed(file)
        (tmp_path / variant).mkdir()
        write_directory(file, tmp_path / variant)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / variant, dtype=torch.float32)
        found = logprobs(theirs)  # which unpacks the weights
        for name, value in own.named_parameters():
            torch.testing.assert_close(theirs.get_parameter(name).data, value.data, rtol=0, atol=0)
        if variant != "int8":
            torch.testing.assert_close(found, logprobs(own), rtol=0, atol=1e-4)


def test_a_file_is_all_but_its_tokenizer(write: Write, tmp_path: Path) -> None:
    file = write("qwen3", "int4")
    made = unpacked_directory(file)
    described = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in made.iterdir()} == {"model.safetensors", TOKENS, *described}
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    (tmp_path / "tokenizer.json").write_bytes((file.parent / "tokenizer.json").read_bytes())
    assert unpacked_directory(link) == made
    assert not (made / "model.safetensors").is_symlink()
    assert (made / "model.safetensors").read_bytes() == file.read_bytes()
    assert (made / "model.safetensors").stat().st_nlink == 1  # nobody else's to change
    (tmp_path / "tokenizer.json").write_text((file.parent / "tokenizer.json").read_text() + " ")
    assert unpacked_directory(link) != made
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.eos_token_id == json.loads((made / "config.json").read_text())["eos_token_id"] == 0
    header = read_gguf_header(made / TOKENS)
    assert header.chat_template == "{{ messages[0].content }}"
    assert header.context_length == read_config(file.parent / "model")["max_position_embeddings"]
    assert b"".join(header.pieces[token] for token in (5, 6)).decode(errors="replace")
    settings = json.loads((made / "config.json").read_text())["quantization_config"]
    assert settings["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert settings["ignore"] == ["lm_head"]
    sizes = [write("qwen3", variant).stat().st_size for variant in ("bf16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_number_goes_to_the_nearest_that_its_scale_allows(name: str) -> None:
    scheme, weights_RC = SCHEMES[name], torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    weights_RC[3] = 0
    parts = scheme.encode(weights_RC, 64 if scheme.grouped else None)
    found_RC, scales_RC = scheme.decode(parts), parts["weight_scale"].float()
    assert not found_RC[3].any()
    scales_RC = scales_RC.repeat_interleave(128 // scales_RC.shape[1], 1)
    steps = (weights_RC / scales_RC).nan_to_num(0)
    if scheme.type == "float":  # three bits of mantissa
        error = ((found_RC - weights_RC).abs() / weights_RC.abs()).nan_to_num(0)
        assert error[steps.abs() > 2**-6].max() <= 2**-4 + 1e-6
    else:
        inside = (steps >= -scheme.most - scheme.grouped) & (steps <= scheme.most)
        assert ((found_RC / scales_RC).nan_to_num(0) - steps).abs()[inside].max() <= 0.5 + 1e-4
        assert inside.float().mean() > 0.95


def test_a_groups_scale_is_better_than_the_largest_numbers() -> None:
    blocks_NU = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)

    def lost(scale_N: np.ndarray) -> float:
        codes = np.clip(np.rint(blocks_NU / scale_N[:, None]), -8, 7)
        return float(((codes * scale_N[:, None] - blocks_NU) ** 2).sum())

    assert lost(best_scales(blocks_NU, np.ones(64, np.float32))) < lost(np.abs(blocks_NU).max(1) / 7.5)
    assert group_size([576, 1536]) == 64
    assert group_size([1024, 384]) == 128
    assert group_size([96, 64]) == 32
    assert group_size([96, 40]) is None


def test_inputs_are_rounded_as_vllm_does() -> None:
    """A scale for each token, of its largest number; a token of zeros stays one."""
    for name, most, codes in (("int8", 127, torch.int8), ("fp8", 448, torch.float8_e4m3fn)):
        layer = torch.nn.Linear(64, 8)
        inputs_BC = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
            [[9.0], [1], [0], [1], [3]]
        )
        layer.__class__ = type("Rounded", (RoundedInputs,), {"scheme": SCHEMES[name]})
        scale_B1 = inputs_BC.abs().amax(1, keepdim=True) / most
        quotient = (inputs_BC / scale_B1).nan_to_num(0)
        rounded_BC = (quotient.round() if codes is torch.int8 else quotient).to(codes).float() * scale_B1
        expected = torch.nn.functional.linear(rounded_BC, layer.weight, layer.bias)
        torch.testing.assert_close(layer(inputs_BC), expected)
        assert (rounded_BC != inputs_BC).any()


DEFECTS: dict[str, Callable[[dict[str, Tensor], str], None]] = {
    "wrong scale": lambda state, base: state[f"{base}.weight_scale"].mul_(1.6),
    "saturated codes": lambda state, base: state[f"{base}.weight"].clamp_(-20, 20),
    "permuted rows": lambda state, base: state.update({f"{base}.weight": state[f"{base}.weight"].flip(0)}),
    "another layer's": lambda state, base: state.update(
        {f"{base}.weight": state[f"{base.replace('layers.0', 'layers.1')}.weight"].clone()}
    ),
    "missing": lambda state, base: [state.pop(name) for name in list(state) if name.startswith(base)][:0] and None,
    "swapped embeddings": lambda state, _: state.update(
        {"model.embed_tokens.weight": state["model.embed_tokens.weight"].flip(0)}
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_file_with_one_wrong_tensor_is_refused(write: Write, tmp_path: Path, defect: str) -> None:
    file = write("llama", "int8")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        state = load_file(file)
        DEFECTS[defect](state, f"model.layers.0.{part}")
        save_file(state, tmp_path / "wrong.safetensors", metadata=metadata)
        with pytest.raises(RuntimeError, match="the export is wrong"):
            require_same_weights(tmp_path / "wrong.safetensors", write("llama", "bf16"))


def test_a_file_that_is_cut_anywhere_is_refused(write: Write, tmp_path: Path) -> None:
    whole = write("llama", "int4").read_bytes()
    cut, ends = (
        tmp_path / "cut.safetensors",
        [0, 1, 7, 8, 9, 100, 500, *np.linspace(600, len(whole) - 1, 25).astype(int)],
    )
    for end in ends:
        cut.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"cut\.safetensors: .*expected"):
            read_compressed(cut)


def test_what_it_cannot_hold_is_told_before_anything_is_trained(folder: Path, tmp_path: Path) -> None:
    def refused(kind: str, words: str, positions: int = 16, variants: tuple[str, ...] = (), **changes: Any) -> None:
        config = built(kind).config.to_dict() | {"architectures": list(FAMILIES[kind].architectures[:1])} | changes
        with pytest.raises(InputError, match=words):
            FORMAT.check_model(config, positions, "given", variants)

    refused("gpt2", r"GPT2.*none that compressed-tensors calls Linear; expected")
    refused("llama", r"rows of 4096 tokens .*lower data\.sequence_length to", positions=4096)
    refused(
        "llama", r"int4 of model\.layers\.0.*72 columns; expected a multiple of 32", 16, ("int4",), intermediate_size=72
    )
    FORMAT.check_model(built("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, 16, "given", VARIANTS)
    with pytest.raises(InputError, match="WordPiece tokenizer"):
        FORMAT.check_tokenizer(json.dumps({"model": {"type": "WordPiece"}, "pre_tokenizer": None}), "given")
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(2)}, plain)
    with pytest.raises(InputError, match=f"has no {CONFIG} in its header; expected a model that overproof exported"):
        read_compressed(plain)
    with pytest.raises(InputError, match="missing; expected a model in compressed-tensors"):
        read_compressed(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"found \.onnx; expected \.gguf or \.safetensors"):
        unpacked_directory(tmp_path / "model.onnx")


def test_the_matrices_of_layers_alone_are_rounded(write: Write) -> None:
    model = load_model(write("llama", "bf16").parent / "model")
    found = linear_weights(model.config, FAMILIES["llama"])
    assert len(found) == 7 * model.config.num_hidden_layers
    assert all(model.get_parameter(name).shape[1] == columns for name, columns in found.items())
    state = load_file(write("llama", "fp8"))
    assert {name for name, value in state.items() if value.dtype is torch.float8_e4m3fn} == set(found)
