"""GGUF files hold the model they were made from, within their format's precision, and say what they hold."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM

from overproof.engines.base import Sampling
from overproof.engines.llamacpp import LlamaCpp
from overproof.errors import InputError
from overproof.export.gguf_file import export_gguf, read_gguf
from overproof.models import hf_directory
from overproof.models.gguf_layout import interleave_rotary, split_rotary
from overproof.tasks.text_evaluation import text_parity_nats
from overproof.tasks.torch_scorer import TorchScorer

HEADS, KV_HEADS, VOCABULARY, LAYERS = 4, 2, 288, 2


def make(folder: Path, tied: bool = True, **changes: Any) -> Path:
    """A Llama directory with weights large enough to matter, and its tokenizer."""
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.2,
            "tie_word_embeddings": tied,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "architectures": ["LlamaForCausalLM"],
        }
        | changes
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["for name in names: print(name) " * 9], trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "source.json"))
    hf_directory.save_model(model, config, folder, folder / "source.json")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source"))


def write(source: Path, folder: Path, format: Literal["f16", "q8_0", "q4_0"]) -> Path:
    file = folder / f"{format}.gguf"
    export_gguf(source, source / "tokenizer.json", file, format, "test model")
    return file


def test_f16_is_exact_to_half_precision(source: Path, tmp_path: Path) -> None:
    original, back = (
        hf_directory.load_model(source).state_dict(),
        read_gguf(write(source, tmp_path, "f16")).state_dict(),
    )
    assert original.keys() == back.keys()
    for name, weight in original.items():
        expected = weight if weight.ndim == 1 else weight.half().float()
        assert torch.equal(back[name], expected), name


@pytest.mark.parametrize(("format", "steps"), [("q8_0", 127), ("q4_0", 8)])
def test_quantised_weights_are_within_a_step_of_their_block(
    source: Path, tmp_path: Path, format: Literal["q8_0", "q4_0"], steps: int
) -> None:
    """q8_0 rounds to the nearest of 255 values, q4_0 to 16 of which one side has one fewer: a step at its end."""
    original, back = (
        hf_directory.load_model(source).state_dict(),
        read_gguf(write(source, tmp_path, format)).state_dict(),
    )
    for name, weight in original.items():
        if weight.ndim == 1:
            assert torch.equal(back[name], weight), name
            continue
        here = 127 if name in ("model.embed_tokens.weight", "lm_head.weight") else steps
        blocks, errors = weight.reshape(-1, 32), (weight - back[name]).reshape(-1, 32).abs()
        step = blocks.abs().amax(1, keepdim=True) / here
        allowed = 0.5 if here == 127 else 1.0
        assert (errors <= step * allowed * 1.01 + blocks.abs() * 1e-3).all(), name
        assert (errors > 0).any(), name


def test_a_tensor_at_a_time_is_held(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers and quantised ones of a tensor are gone before those of the next come."""
    quantize, held = gguf.quants.quantize, list[weakref.ref[Any]]()

    def watched(weights: Any, kind: Any) -> Any:
        gc.collect()
        assert not any(array() is not None for array in held)
        written = quantize(weights, kind)
        held.extend((weakref.ref(weights), weakref.ref(written)))
        return written

    monkeypatch.setattr(gguf.quants, "quantize", watched)
    write(source, tmp_path, "q8_0")
    assert len(held) == 2 * len(gguf.GGUFReader(tmp_path / "q8_0.gguf").tensors)


def test_logits_follow(source: Path, tmp_path: Path) -> None:
    tokens_BS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = hf_directory.load_model(source)(input_ids=tokens_BS).logits.log_softmax(-1)
        errors = {}
        for format in ("f16", "q8_0", "q4_0"):
            found = read_gguf(write(source, tmp_path, format))(input_ids=tokens_BS).logits.log_softmax(-1)
            errors[format] = float((found - expected).abs().mean())
    assert errors["f16"] < 0.01 < errors["q8_0"] < 0.2 < errors["q4_0"] < 3


def test_untied_output_is_kept(tmp_path: Path) -> None:
    source = make(tmp_path / "untied", tied=False)
    back = read_gguf(write(source, tmp_path, "q4_0"))
    original = hf_directory.load_model(source)
    assert not torch.equal(back.lm_head.weight, back.model.embed_tokens.weight)
    torch.testing.assert_close(back.lm_head.weight, original.lm_head.weight, atol=0.01, rtol=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_reads_it_the_same_way(tmp_path: Path, tied: bool) -> None:
    """Odd rotary base and norms, grouped heads, rows without a token, an output of its own."""
    file = write(make(tmp_path / "source", tied=tied), tmp_path, "f16")
    engine = LlamaCpp(file)
    prompt = [0, 40, 41, 42]
    given = engine.complete(prompt, Sampling(12, logprobs=0))
    assert (
        engine.tokenize("for name")
        == Tokenizer.from_file(str(tmp_path / "source/tokenizer.json")).encode("for name").ids
    )
    engine.close()
    assert given.token_logprobs is not None
    logprobs = [token.logprob for token in given.token_logprobs]
    assert text_parity_nats(TorchScorer(read_gguf(file), 1), prompt, given.tokens, logprobs) < 0.05


def test_metadata_says_what_it_is(source: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write(source, tmp_path, "q4_0"))
    value = {key: field.contents() for key, field in reader.fields.items()}
    assert value["general.architecture"] == "llama"
    assert value["general.name"] == "test model"
    assert value["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert value["llama.context_length"] == 128
    assert value["llama.block_count"] == LAYERS
    assert value["llama.attention.head_count_kv"] == KV_HEADS
    assert value["llama.rope.freq_base"] == 5000.0
    assert value["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert value["tokenizer.ggml.model"] == "gpt2"
    assert value["tokenizer.ggml.pre"] == "gpt-2"
    assert value["tokenizer.ggml.eos_token_id"] == 0
    assert value["tokenizer.ggml.add_bos_token"] is False
    spec = json.loads((source / "tokenizer.json").read_text())
    tokens, kinds = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == VOCABULARY
    assert {token: tokens.index(token) for token in spec["model"]["vocab"]} == spec["model"]["vocab"]
    assert kinds[0] == gguf.TokenType.CONTROL
    assert kinds[len(spec["model"]["vocab"]) :] == [gguf.TokenType.UNUSED] * (VOCABULARY - len(spec["model"]["vocab"]))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert "output.weight" not in types
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["output_norm.weight"] == "F32"


def test_same_model_same_bytes_and_nothing_beside_them(source: Path, tmp_path: Path) -> None:
    first = write(source, tmp_path, "q8_0").read_bytes()
    assert write(source, tmp_path, "q8_0").read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["q8_0.gguf"]


def test_rotary_order_is_undone_and_pairs_halves() -> None:
    weights = np.arange(16, dtype=np.float32).reshape(8, 2)
    there = interleave_rotary(weights, 2)
    np.testing.assert_array_equal(split_rotary(there, 2), weights)
    np.testing.assert_array_equal(there[:4], weights[[0, 2, 1, 3]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "found hidden_act 'gelu'"),
        ({"hidden_size": 48, "head_dim": 16}, "found embedding_length 48; expected a multiple of 32"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'dynamic'"),
    ],
)
def test_features_the_format_would_lose_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = make(tmp_path / "source", **changes)
    with pytest.raises(InputError, match=message):
        write(source, tmp_path, "q8_0")
    assert not list(tmp_path.glob("*.gguf*"))


def test_other_tokenizers_are_refused(source: Path, tmp_path: Path) -> None:
    spec = json.loads((source / "tokenizer.json").read_text())
    prefixed = spec | {"pre_tokenizer": spec["pre_tokenizer"] | {"add_prefix_space": True}}
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(prefixed))
    with pytest.raises(
        InputError, match=r"'a space before the text' then .*; the GGUF export covers .* gpt-2, llama-bpe"
    ):
        export_gguf(source, other, tmp_path / "x.gguf", "f16", "x")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(f"<extra-{i}>") for i in range(50)])
    tokenizer.save(str(other))
    with pytest.raises(InputError, match=r"tokens; expected at most the model's 288"):
        export_gguf(source, other, tmp_path / "x.gguf", "f16", "x")
    assert not list(tmp_path.glob("*.gguf*"))
