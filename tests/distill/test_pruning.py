"""A pruned model is its teacher without what was taken away, of every family; and what is taken away matters least."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_world import World
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from decoder_cases import CASES, POSITIONS, SHAPE
from overproof.config import Pretrained, Pruned
from overproof.data.manifest import Manifest
from overproof.distill import pruning
from overproof.distill.pruning import Importance, measure_importance, prune
from overproof.distill.student_init import initial_student
from overproof.engines.llamacpp_logits import LlamaCppLogits
from overproof.errors import InputError
from overproof.export.gguf_file import export_gguf
from overproof.models.hf_directory import count_parameters, layer_names
from overproof.models.sizes import student_size

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 60}


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**TEXT))


def distilbert() -> PreTrainedModel:
    return DistilBertForSequenceClassification(
        DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4, vocab_size=60)
    )


def modernbert() -> PreTrainedModel:
    own = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    return ModernBertForSequenceClassification(ModernBertConfig(**TEXT, **own))


def vit() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1))


OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": bert, "distilbert": distilbert, "modernbert": modernbert, "vit": vit,
}  # fmt: skip
DECODERS = sorted(CASES)
GROUPED = [name for name in DECODERS if CASES[name].kind not in ("olmo2", "phi3", "gpt2", "falcon", "qwen2")]


def made(name: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model with fresh weights, and a batch of it."""
    generator = torch.Generator().manual_seed(0)
    if name in CASES:
        return CASES[name].model(), {"input_ids": torch.randint(3, 60, (2, POSITIONS), generator=generator)}
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator)}
    return model, {"input_ids": torch.randint(3, 60, (2, 12), generator=generator)}


def ask(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(**batch).logits
    return logits


def columns_of(module: torch.nn.Module) -> torch.Tensor:
    """Its weights by output and input, which share memory with it."""
    weight: torch.Tensor = module.weight.data  # type: ignore[assignment, union-attr]
    return weight.T if isinstance(module, Conv1D) else weight


def importance(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Importance:
    return measure_importance(model, [batch], ask)


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_narrower_feed_forward_layers_are_those_without_the_channels_that_give_least(name: str) -> None:
    model, batch = made(name)
    names, found = layer_names(model), importance(model, batch)
    channels = found.channels_LI.shape[1]
    smaller = prune(model, Pruned(intermediate_size=channels // 2), found).eval()
    assert smaller.config.to_dict()[names.intermediate] == channels // 2
    for layer, given_I in zip(model.get_submodule(names.layers).children(), found.channels_LI, strict=True):
        gone = np.argsort(-given_I, kind="stable")[channels // 2 :]
        columns_of(layer.get_submodule(names.feed_forward[-1]))[:, torch.from_numpy(gone)] = 0
    torch.testing.assert_close(ask(smaller, batch), ask(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GROUPED)
def test_fewer_heads_are_the_groups_that_give_most_and_llama_cpp_reads_them(name: str, tmp_path: Path) -> None:
    model, batch = made(name)
    names, found = layer_names(model), importance(model, batch)
    assert found.heads_LK.shape == (model.config.num_hidden_layers, 2)
    smaller = prune(model, Pruned(kv_heads=1, intermediate_size=64), found).eval()
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (2, 1)
    layers = model.get_submodule(names.layers).children()
    for layer, heads_K, given_I in zip(layers, found.heads_LK, found.channels_LI, strict=True):
        output = columns_of(layer.get_submodule(names.attention_output or ""))
        half, lost = output.shape[1] // 2, int(heads_K.argmin())
        output[:, lost * half : (lost + 1) * half] = 0
        gone = np.argsort(-given_I, kind="stable")[64:]
        columns_of(layer.get_submodule(names.feed_forward[-1]))[:, torch.from_numpy(gone)] = 0
    expected = ask(model, batch)
    torch.testing.assert_close(ask(smaller, batch), expected, rtol=1e-4, atol=1e-4)
    folder = CASES[name].save(tmp_path / "smaller", smaller)
    export_gguf(folder, folder / "tokenizer.json", tmp_path / "smaller.gguf", "f32", "smaller")
    engine = LlamaCppLogits(tmp_path / "smaller.gguf", POSITIONS, 1, exact_cache=True)
    read = torch.from_numpy(engine.logits_at(batch["input_ids"][0].numpy(), np.arange(POSITIONS)))
    engine.close()
    difference = (read.log_softmax(-1) - expected[0].log_softmax(-1)).abs()
    assert (expected[0].softmax(-1) * difference).sum(-1).max() < 4 * CASES[name].nats


def test_a_layer_that_turns_nothing_goes_first() -> None:
    model, batch = made("smollm2")
    names = layer_names(model)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        for weight in model.get_submodule(f"{names.layers}.1.{name}").parameters():
            torch.nn.init.zeros_(weight)
    found = importance(model, batch)
    assert int(found.layers_L.argmin()) == 1
    smaller = prune(model, Pruned(layers=2), found)
    kept = [model.get_submodule(f"{names.layers}.{layer}").state_dict() for layer in (0, 2)]
    for place, expected in enumerate(kept):
        for name, weight in smaller.get_submodule(f"{names.layers}.{place}").state_dict().items():
            assert torch.equal(weight, expected[name])


@pytest.mark.parametrize("name", ["llama-3", "smollm2", "qwen3", "gpt2", "falcon", "phi4"])
def test_its_size_is_known_before_it_is_made(name: str, tmp_path: Path) -> None:
    model, batch = made(name)
    folder = CASES[name].save(tmp_path / "teacher", model)
    changes = {"layers": 2, "intermediate_size": 32, **({"kv_heads": 1} if name in GROUPED else {})}
    section = Pruned(**changes)  # type: ignore[arg-type]
    found = student_size(section, Pretrained(path=str(folder)), SHAPE.__class__(**{**vars(SHAPE), "outputs": 0}))
    smaller = prune(model, section, importance(model, batch))
    assert found.parameters == count_parameters(smaller)
    assert (found.layers, found.intermediate) == (2, 32)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("smollm2", {"layers": 4}, "layers 4: the teacher has 3; expected at most that"),
        ("smollm2", {"intermediate_size": 97}, "intermediate_size 97: the teacher has 96"),
        ("smollm2", {"kv_heads": 3}, "kv_heads 3: the teacher has 2"),
        ("gpt2", {"kv_heads": 1}, "heads of a GPT2LMHeadModel cannot be taken away by themselves"),
        ("olmo2", {"kv_heads": 1}, "heads of a Olmo2ForCausalLM cannot be taken away by themselves"),
    ],
)
def test_what_a_teacher_has_not_or_cannot_lose_is_refused(name: str, changes: Any, words: str, tmp_path: Path) -> None:
    model, batch = made(name)
    with pytest.raises(InputError, match=words):
        prune(model, Pruned(**changes), importance(model, batch))
    folder = CASES[name].save(tmp_path / "teacher", model)
    with pytest.raises(InputError, match=r"the teacher has \d|cannot be taken away"):
        student_size(Pruned(**changes), Pretrained(path=str(folder)), SHAPE)


def test_a_recipe_that_takes_nothing_away_or_all_is_refused() -> None:
    with pytest.raises(InputError, match="nothing is taken away; expected layers, intermediate_size or kv_heads"):
        Pruned.parse({"kind": "pruned"}, "model")
    with pytest.raises(InputError, match="intermediate_size"):
        Pruned.parse({"kind": "pruned", "intermediate_size": 0}, "model")


def test_a_student_starts_from_it_and_what_matters_is_measured_once(
    text_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    measured = list[int]()
    monkeypatch.setattr(pruning, "measure_importance", lambda *given: measured.append(1) or measure_importance(*given))
    prepared, teacher = text_world.artifacts["prepare"], text_world.artifacts["train"].local() / "model"
    section = Pruned(layers=1, intermediate_size=16, rows=16)
    manifest = Manifest.read(prepared)
    one, other = (initial_student(section, manifest, 3, teacher, prepared) for _ in range(2))
    assert measured == [1]
    assert one.training
    assert one.config.num_hidden_layers == 1
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name])
