"""Every family of decoders: sizes as planned, trained, written as GGUF, and answered by llama.cpp as by torch."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from decoder_cases import CASES, LLAMA3, NUMBERS, POSITIONS, SHAPE, VOCABULARY, built, section
from finished import RECIPES
from overproof import pipeline
from overproof.config import Optimization, Pretrained, TeacherLayers, load_recipe
from overproof.data.manifest import Manifest
from overproof.data.token_parts import text_columns
from overproof.data.tokenization import train_bpe
from overproof.distill.feature_losses import capture_layers
from overproof.distill.pruning import keep_layers
from overproof.distill.text_worker import generate
from overproof.errors import InputError
from overproof.export import gguf, gguf_file
from overproof.export.gguf_file import export_gguf, read_gguf
from overproof.models import hf_directory
from overproof.models.base import GgufFamily
from overproof.models.gguf_layout import GgufLayout
from overproof.models.sizes import model_size, student_size
from overproof.registry import FAMILIES, FORMATS, TASKS
from overproof.train.engine import TorchEngine
from overproof.train.objective import CrossEntropy


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(["def f(x):\n    return x + 1\n"] * 3, VOCABULARY).save(str(file))
    return file


def saved(model: PreTrainedModel, folder: Path, tokenizer: Path) -> Path:
    hf_directory.save_model(model, model.config, folder, tokenizer)
    return folder


def some_tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, POSITIONS - 2), generator=torch.Generator().manual_seed(seed))


def logprobs(model: PreTrainedModel, tokens_BS: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=tokens_BS, use_cache=False).logits.log_softmax(-1)
        return found


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if isinstance(family, GgufFamily)])
def test_a_family_is_as_large_as_the_plan_says(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    model, planned = built(kind), model_size(section(kind), SHAPE)
    assert FAMILIES[kind].configuration_class() is type(model).config_class  # type: ignore[attr-defined]
    assert sorted(planned.tensors) == sorted(weight.numel() for weight in model.parameters())
    folder = Pretrained(path=str(saved(model, tmp_path / "model", tokenizer)))
    read = model_size(folder, SHAPE)
    assert sorted(read.tensors) == sorted(planned.tensors)
    for name in ("family", "hidden", "intermediate", "layers", "heads", "query_width", "key_width", "outputs"):
        assert getattr(read, name) == getattr(planned, name), name


FAR = {**LLAMA3, "rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("kind", "settings", "mistake", "looked_at"),
    [
        ("gemma3", {"sliding_window": 64}, (GgufLayout, "metadata", {"attention.sliding_window": 48}), 1024),
        ("gemma2", {"sliding_window": 1000}, (GgufLayout, "metadata", {"attention.sliding_window": 700}), 1500),
        ("llama", {"rope_parameters": FAR}, (GgufLayout, "extra_tensors", None), 1024),
        ("gpt2", {}, None, POSITIONS),
    ],
)  # fmt: skip
def test_a_mistake_that_shows_far_from_a_rows_beginning_is_seen(
    kind: str, settings: dict[str, Any], mistake: tuple[Any, str, Any] | None, looked_at: int, tmp_path: Path,
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, file = saved(built(kind, settings), tmp_path / "source", tokenizer), tmp_path / "model.gguf"
    export_gguf(source, tokenizer, file, "f16", "right")
    found = FORMATS["gguf"].difference(source, file)
    assert found.nats < found.explained_nats
    assert found.positions == looked_at
    if mistake is None:
        return
    layout, method, wrong = mistake
    right = getattr(layout, method)
    monkeypatch.setattr(layout, method, lambda *given: {} if wrong is None else right(*given) | wrong)
    export_gguf(source, tokenizer, file, "f16", "wrong")
    monkeypatch.setattr(layout, method, right)
    found = FORMATS["gguf"].difference(source, file)
    assert found.nats > found.explained_nats
    monkeypatch.setattr(gguf, "MOST_TOKENS", 32)
    short = FORMATS["gguf"].difference(source, file)
    assert (short.positions, short.nats < short.explained_nats) == (32, True)  # as a short row alone would have it


@pytest.mark.parametrize("kind", ["gemma3", "smollm3", "gpt2", "phi3", "falcon"])
def test_fewer_layers_are_a_model_of_the_family(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    model = built(kind)
    fewer = keep_layers(model, (0, 2))
    folder = saved(model, tmp_path / "teacher", tokenizer)
    planned = student_size(TeacherLayers(layers=(0, 2)), Pretrained(path=str(folder)), SHAPE)
    assert hf_directory.count_parameters(fewer) == planned.parameters
    written = saved(fewer.eval(), tmp_path / "student", tokenizer)
    export_gguf(written, written / "tokenizer.json", tmp_path / "student.gguf", "f32", "test")
    back = logprobs(read_gguf(tmp_path / "student.gguf"), some_tokens())
    torch.testing.assert_close(back, logprobs(fewer, some_tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-2", "gpt2", "falcon", "gemma2", "gemma3", "smollm3"])
def test_a_family_writes_text_with_a_cache_as_without(name: str) -> None:
    model = built(CASES[name].kind, CASES[name].settings)
    prompts_BQ = some_tokens()[:, :12]
    written_BS = generate(model, prompts_BQ, torch.zeros(2, 8), temperature=0)
    expected_BS = prompts_BQ
    for _ in range(8):
        likeliest_B1 = logprobs(model, expected_BS)[:, -1].argmax(-1, keepdim=True)
        expected_BS = torch.cat([expected_BS, likeliest_B1], 1)
    assert torch.equal(written_BS, expected_BS)


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "falcon"])
def test_fused_queries_keys_and_values_are_told_apart(kind: str) -> None:
    model = built(kind)
    seen: dict[str, torch.Tensor] = {}
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any) -> torch.Tensor:
        seen.setdefault("values", value)
        return attention(query, key, value, **named)

    with pytest.MonkeyPatch.context() as patched, capture_layers(model, [0]) as found:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model(input_ids=some_tokens(), use_cache=False)
    queries, _, values = found[0].attention
    kept = model_size(section(kind), SHAPE)
    assert (queries.shape[-1], values.shape[-1]) == (kept.query_width, kept.key_width)
    heads = kept.key_width // (kept.query_width // kept.heads)
    given = seen["values"].transpose(1, 2)
    repeats = given.shape[2] // heads
    torch.testing.assert_close(values.unflatten(-1, (heads, -1)), given[:, :, ::repeats])
    assert found[0].states.shape == (*some_tokens().shape, NUMBERS["hidden_size"])


def test_shards_and_half_precision_are_read(tmp_path: Path, tokenizer: Path) -> None:
    """As large models come: several files that an index names, beside another copy of the weights."""
    model = built("qwen2", {"tie_word_embeddings": False}).to(torch.bfloat16)
    whole = saved(model, tmp_path / "whole", tokenizer)
    state = load_file(whole / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (sharded / name).write_bytes((whole / name).read_bytes())
    parts = {f"model-0000{i + 1}-of-00002.safetensors": sorted(state)[i::2] for i in range(2)}
    for file, names in parts.items():
        save_file({name: state[name] for name in names}, sharded / file, metadata={"format": "pt"})
    save_file({f"consolidated.{name}": weight for name, weight in state.items()}, sharded / "consolidated.safetensors")
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    one, several = (Pretrained(path=str(folder)) for folder in (whole, sharded))
    assert sorted(model_size(several, SHAPE).tensors) == sorted(model_size(one, SHAPE).tensors)
    found = hf_directory.load_model(sharded)
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.float()), name
    export_gguf(whole, tokenizer, tmp_path / "one.gguf", "f16", "test")
    export_gguf(sharded, tokenizer, tmp_path / "several.gguf", "f16", "test")
    assert torch.equal(*(logprobs(read_gguf(tmp_path / f"{n}.gguf"), some_tokens()) for n in ("one", "several")))
    (sharded / next(iter(parts))).unlink()
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors is missing; expected the files that"):
        hf_directory.load_model(sharded)


@pytest.mark.parametrize(
    ("kind", "settings"), [("qwen2", {"tie_word_embeddings": False}), ("gemma3", {}), ("gpt2", {})]
)
def test_padding_beyond_the_datas_vocabulary_is_cut_off(
    kind: str, settings: dict[str, Any], tmp_path: Path, tokenizer: Path
) -> None:
    model, fewer = built(kind, settings), VOCABULARY - 20
    folder = saved(model, tmp_path / "model", tokenizer)
    manifest = Manifest(
        task="language_modeling", columns=(), splits={}, rows_per_group=4, positions=POSITIONS, outputs=fewer,
        tokenizer_sha256="0" * 64,
    )  # fmt: skip
    found = hf_directory.load_start(folder, manifest, 0)
    tokens_BS = some_tokens() % fewer
    expected = model(input_ids=tokens_BS, use_cache=False).logits[..., :fewer]
    torch.testing.assert_close(found(input_ids=tokens_BS, use_cache=False).logits, expected, rtol=0, atol=1e-6)
    planned = model_size(Pretrained(path=str(folder)), replace(SHAPE, outputs=fewer))
    assert (planned.outputs, planned.parameters) == (fewer, hf_directory.count_parameters(found))
    with pytest.raises(InputError, match=f"a vocabulary of {VOCABULARY}; the data's has 321"):
        hf_directory.load_start(folder, manifest.model_copy(update={"outputs": 321}), 0)


def test_a_window_that_llama_cpp_does_not_know_ends_the_context(tmp_path: Path, tokenizer: Path) -> None:
    model = built("mistral", {"sliding_window": 8})
    source = saved(model, tmp_path / "source", tokenizer)
    export_gguf(source, tokenizer, tmp_path / "model.gguf", "f32", "test")
    back = read_gguf(tmp_path / "model.gguf")
    assert back.config.max_position_embeddings == 8
    within, past = some_tokens()[:, :8], some_tokens()[:, :20]
    torch.testing.assert_close(logprobs(back, within), logprobs(model, within), rtol=0, atol=1e-5)
    assert float((logprobs(back, past) - logprobs(model, past)).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("qwen3", {"attention_bias": True}, "found attention_bias True; expected False: the GGUF export of qwen3"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "found layer_types"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "found query_pre_attn_scalar 99; expected 16"),
        ("gemma2", {"final_logit_softcapping": None}, "found final_logit_softcapping null; expected a number"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "found no_rope_layers"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "found partial_rotary_factor 0.5; expected 1"),
        ("mistral", {"head_dim": 20}, "found heads of 80; expected a multiple of 32"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "found scale_attn_by_inverse_layer_idx True"),
        ("falcon", {"alibi": True}, "found alibi True; expected False"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    kind: str, settings: dict[str, Any], message: str, tmp_path: Path, tokenizer: Path
) -> None:
    source = saved(built(kind, settings), tmp_path / "source", tokenizer)
    with pytest.raises(InputError, match=message):
        export_gguf(source, tokenizer, tmp_path / "model.gguf", "f16", "test")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_file_that_lacks_a_tensor_is_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(built("qwen2"), tmp_path / "source", tokenizer)
    written = gguf_file._tensors
    monkeypatch.setattr(gguf_file, "_tensors", lambda *given: list(written(*given))[:-1])
    export_gguf(source, tokenizer, tmp_path / "model.gguf", "f16", "test")
    with pytest.raises(InputError, match=r"tensor output_norm\.weight is missing; expected a model that overproof"):
        read_gguf(tmp_path / "model.gguf")


def test_another_decoder_is_trained_and_not_exported(tmp_path: Path, tokenizer: Path) -> None:
    from transformers import StableLmConfig, StableLmForCausalLM

    config = StableLmConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    model = StableLmForCausalLM(config).eval()
    source = saved(model, tmp_path / "source", tokenizer)
    found = hf_directory.load_model(source)
    assert torch.equal(logprobs(found, some_tokens()), logprobs(model, some_tokens()))
    assert model_size(Pretrained(path=str(source)), SHAPE).parameters == hf_directory.count_parameters(model)
    apart = Manifest(
        task="language_modeling", columns=text_columns(8, VOCABULARY, apart=True), splits={}, rows_per_group=4,
        positions=8, outputs=VOCABULARY, tokenizer_sha256="0" * 64,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"StableLmForCausalLM keeps the documents of a row apart is not "):
        hf_directory.load_start(source, apart, 0)
    assert hf_directory.load_start(source, apart.model_copy(update={"columns": ()}), 0).config.vocab_size == VOCABULARY
    fewer = keep_layers(found, (0, 2))
    assert fewer.config.num_hidden_layers == 2
    engine = TorchEngine(found, Optimization(steps=1, batch_size=2, learning_rate=1e-3))
    batch = {"tokens": some_tokens(), "length": torch.full((2,), POSITIONS - 3)}
    assert np.isfinite(engine.step(CrossEntropy(TASKS["language_modeling"].predict), batch)()["loss"])
    teacher = {"kind": "pretrained", "path": str(source)}
    sets = (f"train.model={json.dumps(teacher)}", f"store={tmp_path}")
    with pytest.raises(
        InputError, match=r"train\.model: .*StableLmForCausalLM keeps the documents of a row apart is not"
    ):
        pipeline.run(load_recipe(RECIPES / "stdlib-lm.yaml", sets))
    recipe = load_recipe(RECIPES / "stdlib-lm.yaml", (*sets, "compress.teacher=true"))
    with pytest.raises(
        InputError,
        match=r"train\.model: .*StableLmForCausalLM can be trained and not be written as gguf.*expected Llama",
    ):
        pipeline.run(recipe)
    assert not list(tmp_path.glob("stdlib*"))
    with pytest.raises(InputError, match=r"StableLmForCausalLM is not written as GGUF.*expected LlamaForCausalLM or"):
        export_gguf(source, tokenizer, tmp_path / "model.gguf", "f16", "test")
    other = copy.deepcopy(json.loads((source / "config.json").read_text()))
    (source / "config.json").write_text(
        json.dumps({**other, "model_type": "unheard", "architectures": ["UnheardForCausalLM"]})
    )
    with pytest.raises(InputError, match="transformers cannot build it"):
        hf_directory.load_model(source)
    assert (
        AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "again", tokenizer)).config.vocab_size
        == VOCABULARY
    )


def test_an_unknown_architecture_says_what_is_known_and_near(tmp_path: Path, tokenizer: Path) -> None:
    source = saved(built("gemma3"), tmp_path / "source", tokenizer)
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"))
    with pytest.raises(
        InputError, match=r"architecture Gemma3ForConditionalGeneration, nearest is 'Gemma.*expected Llama"
    ):
        hf_directory.load_model(source)


def test_rows_that_a_model_has_no_positions_for_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    folder = saved(built("gpt2"), tmp_path / "model", tokenizer)
    manifest = Manifest(
        task="language_modeling", columns=(), splits={}, rows_per_group=4, positions=POSITIONS + 1, outputs=VOCABULARY,
        tokenizer_sha256="0" * 64,
    )  # fmt: skip
    words = f"the model takes {POSITIONS} tokens at most; data.sequence_length is {POSITIONS + 1}: lower it"
    with pytest.raises(InputError, match=words):
        hf_directory.load_start(folder, manifest, 0)
    with pytest.raises(InputError, match=words):
        model_size(Pretrained(path=str(folder)), replace(SHAPE, positions=POSITIONS + 1))


def test_a_decoder_that_names_no_limit_of_positions_is_saved(tmp_path: Path, tokenizer: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = BloomForCausalLM(config).eval()
    folder = saved(model, tmp_path / "model", tokenizer)
    assert "model_max_length" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert torch.equal(logprobs(hf_directory.load_model(folder), some_tokens()), logprobs(model, some_tokens()))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_transformers_opens_the_file_as_the_model_that_it_holds(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    """By its own reader of GGUF, which of other families leaves settings out that these small models have, such as the
    width of qwen3's heads.
    """
    folder = saved(built(kind), tmp_path / "model", tokenizer)
    for format in ("q8_0", "q4_0"):
        export_gguf(folder, tokenizer, tmp_path / f"{format}.gguf", format, "made")  # type: ignore[arg-type]
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=f"{format}.gguf", dtype=torch.float32)
        own = read_gguf(tmp_path / f"{format}.gguf")
        torch.testing.assert_close(logprobs(theirs, some_tokens()), logprobs(own, some_tokens()), rtol=0, atol=1e-5)
