"""A pruned model is its teacher without what was taken away, of every family; and what is taken away matters least."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill_world
import numpy as np
import pytest
import torch
from distill_world import World
from test_student_init import student
from test_sweep import job_of
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
from overproof.artifacts import Store
from overproof.config import Pretrained, Pruned, load_recipe
from overproof.distill import pruning
from overproof.distill.pruning import Importance, _head_width, keep_layers, measure_importance, prune
from overproof.distill.student_trainer import StudentTrainer
from overproof.engines.llamacpp_logits import LlamaCppLogits
from overproof.errors import InputError
from overproof.export.gguf import FORMAT, Gguf
from overproof.export.gguf_file import export_gguf
from overproof.models.base import Prediction
from overproof.models.encoder import PADDING, encoder_inputs
from overproof.models.hf_directory import count_parameters, layer_names
from overproof.models.sizes import student_size
from overproof.models.student_config import student_config
from overproof.registry import FAMILIES

STDLIB = Path(__file__).parents[2] / "jobs/recipes/stdlib-lm.yaml"
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

NARROWED = [name for name in GROUPED if not CASES[name].kind.startswith("gemma")]


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
    engine = LlamaCppLogits(tmp_path / "smaller.gguf", POSITIONS, 1, kv_cache="f32")
    read = torch.from_numpy(engine.logits_at(batch["input_ids"][0].numpy(), np.arange(POSITIONS)))
    engine.close()
    difference = (read.log_softmax(-1) - expected[0].log_softmax(-1)).abs()
    assert (expected[0].softmax(-1) * difference).sum(-1).max() < 4 * CASES[name].nats


@pytest.mark.parametrize("name", NARROWED)
def test_a_narrower_model_is_the_one_whose_least_channels_are_nothing(name: str, tmp_path: Path) -> None:
    """Norms divide by the root of a mean over fewer channels, and make up for it. llama.cpp reads it."""
    model, batch = made(name)
    names, found = layer_names(model), importance(model, batch)
    hidden = model.config.hidden_size
    assert found.width_H.shape == (hidden,)
    smaller = prune(model, Pruned(hidden_size=hidden // 2), found).eval()
    assert (smaller.config.hidden_size, smaller.config.head_dim) == (hidden // 2, _head_width(model.config))
    gone = torch.from_numpy(np.argsort(-found.width_H, kind="stable")[hidden // 2 :])
    model.get_submodule(names.embeddings).weight.data[:, gone] = 0  # type: ignore[operator, union-attr]
    for layer in model.get_submodule(names.layers).children():
        for part in (names.attention_output or "", names.feed_forward[-1]):
            module = layer.get_submodule(part)
            for weight in (columns_of(module), *([] if module.bias is None else [module.bias.data])):  # type: ignore[list-item, union-attr]
                weight[gone] = 0  # type: ignore[index, operator]
    folder = CASES[name].save(tmp_path / "smaller", smaller)
    export_gguf(folder, folder / "tokenizer.json", tmp_path / "smaller.gguf", "f32", "smaller")
    engine = LlamaCppLogits(tmp_path / "smaller.gguf", POSITIONS, 1, kv_cache="f32")
    read = torch.from_numpy(engine.logits_at(batch["input_ids"][0].numpy(), np.arange(POSITIONS)))
    engine.close()
    expected = ask(smaller, batch)[0]
    difference = (read.log_softmax(-1) - expected.log_softmax(-1)).abs()
    assert (expected.softmax(-1) * difference).sum(-1).max() < 4 * CASES[name].nats
    for module in (*model.modules(), *smaller.modules()):
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0  # which is added to means over all channels, and to those over fewer
    torch.testing.assert_close(ask(smaller, batch), ask(model, batch), rtol=1e-3, atol=1e-3)
    section = Pruned(hidden_size=hidden // 2, layers=2, intermediate_size=32)
    whole = CASES[name].save(tmp_path / "teacher", model)
    told = student_size(section, Pretrained(path=str(whole)), SHAPE.__class__(**{**vars(SHAPE), "outputs": 0}))
    assert told.parameters == count_parameters(prune(model, section, found))
    assert told.hidden == hidden // 2


def test_a_mixed_file_that_no_types_make_small_enough_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    model, _ = made("smollm2")
    folder = CASES["smollm2"].save(tmp_path / "teacher", model)
    size = student_size(Pruned(layers=2), Pretrained(path=str(folder)), SHAPE)
    least_mb = size.parameters * 18 / 32 / 1e6
    settings = {"kind": "gguf", "formats": ["mixed-gptq"]}
    for most_mb in (2 * least_mb, 0.9 * least_mb):
        asked = Gguf.model_validate(settings | {"mixed": {"at_most_mb": most_mb}})
        if most_mb > least_mb:
            FORMAT.require_size(asked, size, "student small")
            continue
        with pytest.raises(InputError, match=f"found {most_mb:g}; student small takes {least_mb:.2f} MB at least"):
            FORMAT.require_size(asked, size, "student small")


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


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "gpt2", "falcon", "phi4", *OTHERS])
def test_by_loss_the_layer_goes_without_which_the_model_loses_least(name: str) -> None:
    """What a model loses without a layer is what the smaller model of all others loses."""
    model, batch = made(name)

    def predict(asked: PreTrainedModel, given: dict[str, torch.Tensor]) -> Prediction:
        logits = ask(asked, given)
        logits_BPV = logits if logits.dim() == 3 else logits[:, None]
        places = torch.arange(logits_BPV[..., 0].numel()).reshape(logits_BPV.shape[:2])
        return Prediction(logits_BPV, (7 * places + 1) % logits_BPV.shape[-1], places % 3 < 2)

    found = measure_importance(model, [batch, batch], predict, layers_by_loss=True)
    by_influence = measure_importance(model, [batch, batch], predict)
    np.testing.assert_array_equal(found.channels_LI, by_influence.channels_LI)
    assert not np.allclose(found.layers_L, by_influence.layers_L)
    count, first = len(found.layers_L), int(layer_names(model).first_stays)
    for layer in range(first, count):
        given = predict(keep_layers(model, [other for other in range(count) if other != layer]).eval(), batch)
        logprobs_BPV = given.logits_BPV.log_softmax(-1)
        nats_BP = -logprobs_BPV.gather(-1, given.targets_BP[..., None])[..., 0]
        assert found.layers_L[layer] == pytest.approx(nats_BP[given.mask_BP].mean().item(), rel=1e-4)
    least = first + int(found.layers_L[first:].argmin())
    smaller = prune(model, Pruned(layers=count - 1, layers_by="loss"), found)
    expected = keep_layers(model, [other for other in range(count) if other != least])
    assert torch.equal(ask(smaller.eval(), batch), ask(expected.eval(), batch))


def test_what_says_so_is_measured_once_for_each_way() -> None:
    ways = [Pruned(layers=2), Pruned(layers=3), Pruned(layers=2, layers_by="loss"), Pruned(layers=2, rows=64)]
    assert len({section.measurement for section in ways}) == 3


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
        ("gpt2", {"kv_heads": 1}, "kv_heads: a GPT2LMHeadModel cannot lose any by themselves"),
        ("olmo2", {"kv_heads": 1}, "kv_heads: a Olmo2ForCausalLM cannot lose any by themselves"),
    ],
)
def test_what_a_teacher_has_not_or_cannot_lose_is_refused(name: str, changes: Any, words: str, tmp_path: Path) -> None:
    model, batch = made(name)
    with pytest.raises(InputError, match=words):
        prune(model, Pruned(**changes), importance(model, batch))
    folder = CASES[name].save(tmp_path / "teacher", model)
    with pytest.raises(InputError, match=r"the teacher has \d|cannot lose any"):
        student_size(Pruned(**changes), Pretrained(path=str(folder)), SHAPE)


def test_a_recipe_that_takes_nothing_away_or_all_is_refused() -> None:
    with pytest.raises(
        InputError,
        match="nothing is taken away; expected layers, intermediate_size, kv_heads, hidden_size or hidden_sizes",
    ):
        Pruned.parse({"kind": "pruned"}, "model")
    with pytest.raises(InputError, match="intermediate_size"):
        Pruned.parse({"kind": "pruned", "intermediate_size": 0}, "model")


@pytest.mark.parametrize("name", ["gpt2", "olmo2"])
def test_heads_that_cannot_go_are_refused_before_anything_is_trained(name: str) -> None:
    config, names = CASES[name].model().config.to_dict(), FAMILIES[CASES[name].kind].names
    with pytest.raises(InputError, match="cannot lose any by themselves"):
        student_config({**config, "architectures": ["X"]}, Pruned(kv_heads=1), names)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("kv_heads: 1", "kv_heads: such are taken from pretrained teachers alone"),
        ("hidden_size: 32", "hidden_size: such are taken from pretrained teachers alone"),
        ("layers: 99", "layers 99: the teacher has"),
        ("intermediate_size: 40", "intermediate_size"),  # no multiple of 32, which llama.cpp needs
    ],
)
def test_of_a_teacher_that_the_recipe_describes_the_same_is_known_from_the_recipe(changes: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_recipe(STDLIB, (f"sweep.students=[{{name: a, model: {{kind: pruned, {changes}}}}}]", "tune={}"))


def test_padding_does_not_count() -> None:
    """What an encoder is pruned by is the same however far rows are filled up."""
    model = bert()
    tokens = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    tokens[1, 5:], tokens[2, 3:] = PADDING, PADDING
    longer = torch.nn.functional.pad(tokens, (0, 7), value=PADDING)

    def predict(of: PreTrainedModel, batch: dict[str, torch.Tensor]) -> object:
        return of(**encoder_inputs(batch["tokens"]))

    one, other = (measure_importance(model, [{"tokens": each}], predict) for each in (tokens, longer))
    np.testing.assert_allclose(one.channels_LI, other.channels_LI, rtol=1e-4)
    np.testing.assert_allclose(one.layers_L, other.layers_L, rtol=1e-4)


def test_a_student_starts_from_it_and_all_trials_from_the_same(
    text_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What matters is measured once, by whoever comes first, and read by all others of the sweep."""
    measured = list[int]()
    original = pruning.measure_importance
    monkeypatch.setattr(pruning, "measure_importance", lambda *given: measured.append(1) or original(*given))
    section = {"kind": "pruned", "layers": 1, "intermediate_size": 32, "rows": 16}
    students = [student(section, name=name, teacher_weight=0.0) for name in ("one", "other")]
    context = text_world.context("sweep", cached=text_world.artifacts["prepare"], sweep={"students": students})
    made = [StudentTrainer(job_of(context, name)).model for name in ("one", "other")]
    assert measured == [1]
    assert made[0].config.num_hidden_layers == 1
    for name, weight in made[0].state_dict().items():
        assert torch.equal(weight, made[1].state_dict()[name])


@pytest.mark.parametrize(
    ("rounds", "seen", "ends", "rounding"),
    [
        (2, [96, 96, 32, 32, 32], [5, 6, 10, 12], None),
        (3, [128, 96, 96, 32, 32, 32], [4, 5, 8, 10, 12], None),
        (2, [96, 96, 32, 32, 32], [5, 6, 10, 12], "q8_0"),
    ],
)
def test_in_rounds_a_student_loses_a_part_at_a_time_and_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int, seen: list[int], ends: list[int], rounding: str | None
) -> None:
    """Of 160 channels 32 stay; what goes is chosen by the student as it is by then. One that is stopped after any
    validation ends with the same weights; so does its control.
    """
    taught = distill_world.TEACHERS["text"].model_copy(update={"intermediate_size": 160})
    monkeypatch.setitem(distill_world.TEACHERS, "text", taught)
    world = distill_world.make("text", Store(str(tmp_path)))
    student = {
        "name": "slow", "teacher": "live", "rounding": rounding,
        "model": {"kind": "pruned", "intermediate_size": 32, "rows": 24, "rounds": rounds},
    }  # fmt: skip
    settings = {"students": [student], "steps": 12, "validate_every": 5, "warmup_steps": 0, "batch_size": 8}
    context = world.context("sweep", cached=world.artifacts["prepare"], sweep=settings)

    def widths(trainer: StudentTrainer) -> int:
        return int(trainer.model.config.intermediate_size)

    for distilled in (True, False):
        job = replace(job_of(context, "slow"), distilled=distilled)
        whole = StudentTrainer(replace(job_of(context, "slow"), distilled=distilled))
        found, validated = [widths(whole)], list[int]()
        while not validated or validated[-1] < 12:
            validated.append(whole.run_to_validation().steps)
            found.append(widths(whole))
        assert (validated, found) == (ends, seen)
        expected = whole.model.state_dict()
        for _ in ends:  # each attempt is stopped after one validation more
            stopped = StudentTrainer(job)
            assert widths(stopped) == seen[ends.index(stopped.resumed_step) + 1 if stopped.resumed_step else 0]
            while stopped._replayed:
                stopped.run_to_validation()
            stopped.run_to_validation()
            stopped.checkpoint_writer.wait()
        ended = stopped.model.state_dict()
        assert ended.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(ended[name], value, rtol=0, atol=0)


def test_in_rounds_heads_layers_and_channels_between_layers_go_as_well() -> None:
    """Sizes of each round lie evenly between the teacher's and what stays."""
    section = Pruned(layers=2, kv_heads=1, hidden_size=96, intermediate_size=45, rounds=3)
    parts = [section.after(done, 8, 60, 4, 192) for done in (1, 2, 3)]
    found = [(each.layers, each.kv_heads, each.hidden_size, each.intermediate_size) for each in parts]
    assert found == [(6, 3, 160, 55), (4, 2, 128, 50), (2, 1, 96, 45)]
    assert section.further_steps(90) == (30, 60)


ROUNDS = "{kind: pruned, intermediate_size: 64, rounds: 3}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sweep.steps": 2}, "student a: model.rounds is 3, and sweep.steps 2; expected no more rounds than steps"),
        ({"tune": "{space: {steps: {kind: choice, values: [9, 2]}}}"},
         "student a: model.rounds is 3, and the least of tune.space.steps 2; expected no more rounds than steps"),
        ({"sweep.students": f"[{{name: a, states: {{weight: 1.0}}, model: {ROUNDS}}}]"},
         "student a learns from features, whose widths model.rounds changes as it trains"),
        ({"sweep.group": "{workers: 2}"}, "student a is pruned in 3 rounds, as one process alone trains it"),
        ({"tune": "{scheduler: {kind: pbt}, space: {learning_rate: {kind: uniform, low: 0.001, high: 0.01}}, search: "
          "{kind: random, trials: 2}}"}, "pbt hands weights from trial to trial; expected model.rounds: 1"),
    ],
)  # fmt: skip
def test_rounds_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    sets = {"sweep.students": f"[{{name: a, model: {ROUNDS}}}]", "tune": "{}"} | changes
    overrides = tuple(f"{name}={value}" for name, value in sets.items())
    with pytest.raises(InputError, match=re.escape(words)):
        load_recipe(STDLIB, overrides)


def test_rounds_go_by_the_steps_that_trials_have() -> None:
    tune = "tune={space: {steps: {kind: choice, values: [9, 3]}}}"
    students = f"sweep.students=[{{name: a, model: {ROUNDS}}}]"
    recipe = load_recipe(STDLIB, ("sweep.steps=2", "sweep.warmup_steps=0", students, tune))
    assert recipe.tune.least_steps(recipe.sweep) == 3
