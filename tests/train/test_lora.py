"""Adapters beside frozen weights: what is trained, what checkpoints hold, and what is written when they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rank_results import run_cases
from tiny_data import LLAMA, settings, text_like

from overproof.config import Lora
from overproof.data.manifest import Manifest
from overproof.errors import InputError
from overproof.models.adapters import MARK, add_adapters, count_weights, merge_adapters
from overproof.models.base import DataShape
from overproof.models.hf_directory import build_model, load_model, save_model
from overproof.registry import FAMILIES

pytest.importorskip("peft", reason="the library that adapters come from is not installed here")

SEED = 3
LORA: dict[str, Any] = {"rank": 2, "alpha": 8.0}
COMMON: dict[str, Any] = {"steps": 12, "batch_size": 8, "validate_every": 6, "checkpoint": {"every_steps": 4}}
STAGES = (0, 2, 3)
DECODERS = [kind for kind, family in FAMILIES.items() if "chat" in family.tasks and family.section]


def tiny(kind: str) -> Any:
    family = FAMILIES[kind]
    assert family.section is not None
    numbers = {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 4, "kv_heads": 2}
    section = family.section(**{name: value for name, value in numbers.items() if name in family.section.model_fields})
    torch.manual_seed(0)
    return family.model_class()(family.configuration(section, DataShape("chat", 320, 16, bos_id=0, end_id=0))).eval()


@pytest.mark.parametrize("kind", DECODERS)
def test_adapters_alone_are_trained_and_merge_into_the_same_model(kind: str) -> None:
    model, tokens = tiny(kind), torch.arange(15)[None]
    names, size = list(model.state_dict()), count_weights(model)[0]
    with torch.no_grad():
        before = model(input_ids=tokens, use_cache=False).logits
        add_adapters(model, Lora(**LORA), SEED)
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, before)  # they add nothing yet
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(MARK in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    own, count = count_weights(model)
    assert own == size > 3 * count
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(value.shape, generator=generator) * 0.2
               for name, value in model.state_dict().items() if MARK in name}  # fmt: skip
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        adapted = model(input_ids=tokens, use_cache=False).logits
        merged = merge_adapters(model, {})
        assert list(merged.state_dict()) == names
        found = merged(input_ids=tokens, use_cache=False).logits
    assert (found - adapted).abs().max() < 1e-4
    assert (found - before).abs().max() > 1e-2


def test_adapters_begin_as_the_seed_says() -> None:
    found = []
    for seed in (1, 1, 2):
        model = tiny("llama")
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        add_adapters(model, Lora(**LORA), seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_A" in n]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_targets_may_be_named_and_must_be_there() -> None:
    model = tiny("llama")
    add_adapters(model, Lora(targets=("q_proj", "v_proj")), SEED)
    held = {name.split(".")[-4] for name, _ in model.named_parameters() if MARK in name}
    assert held == {"q_proj", "v_proj"}
    with pytest.raises(InputError, match=r"train\.lora\.targets: \('nowhere',\)"):
        add_adapters(tiny("llama"), Lora(targets=("nowhere",)), SEED)


def test_weights_of_other_adapters_are_refused() -> None:
    model = tiny("llama")
    add_adapters(model, Lora(**LORA), SEED)
    with pytest.raises(RuntimeError, match="weights of other adapters"):
        merge_adapters(model, {"model.layers.0.lora_A.default.weight": torch.zeros(1)})


def test_models_that_adapters_do_not_suit_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"lora: model\.kind is 'llama', whose weights are drawn at random"):
        settings(**COMMON, model=LLAMA.model_dump(), lora=LORA)
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(InputError, match="the output layer of a bert may be made"):
        add_adapters(BertForSequenceClassification(config), Lora(), SEED)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Trainings by real ranks, whole, killed, and moved to another number of workers."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "data").mkdir()
    manifest = Manifest.read(text_like(folder / "data"))
    model = build_model(LLAMA, manifest, SEED)
    save_model(model, model.config, folder / "base", manifest.tokenizer(folder / "data"))
    start = {"model": {"kind": "pretrained", "path": str(folder / "base")}, "lora": LORA}
    cases = []
    for stage in STAGES:
        train = {**COMMON, **start, "zero_stage": stage, "workers": [1, 2]}
        moved = [{"world": 2, "kill": 7}, {"world": 2, "kill": 11}, {"world": 1}]
        for name, attempts in (("whole", [{"world": 2}]), ("moved", moved)):
            cases.append({"name": f"{stage}-{name}", "data": "text", "attempts": attempts, "train": train})
    return run_cases("resume_ranks.py", folder, cases) | {"base": str(folder / "base")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_of_adapters_goes_on_after_a_kill_and_elsewhere(results: dict[str, Any], stage: int) -> None:
    """Killed and begun again on two workers, then on one; where it stands decides how close it must be."""
    whole, moved = (results[f"{stage}-{name}"] for name in ("whole", "moved"))
    losses, found = ([row["loss"] for row in result["rows"] if "loss" in row] for result in (whole, moved))
    last = moved["starts"][2]
    assert moved["starts"][0] == 0
    assert last in (4, 8)
    assert losses[-1] < losses[0]
    assert [loss.hex() for loss in found[:last]] == [loss.hex() for loss in losses[:last]]
    assert found == pytest.approx(losses, rel=1e-5)
    assert whole["metrics"]["trained_parameters"] * 3 < whole["metrics"]["parameters"]


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_hold_adapters_alone_and_the_model_has_them_merged(results: dict[str, Any], stage: int) -> None:
    result = results[f"{stage}-whole"]
    base, merged = load_model(Path(results["base"])), load_model(Path(result["model"]))
    held = torch.load(next(Path(result["checkpoint"]).glob("*model_states.pt")), weights_only=False)
    assert all(MARK in name for name in held["module"])
    size = sum(file.stat().st_size for file in Path(result["checkpoint"]).glob("*.pt"))
    assert size < 4 * 3 * 3 * result["metrics"]["trained_parameters"] + (1 << 17)
    before, after = base.state_dict(), merged.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    assert merged.config.architectures == base.config.architectures
    first = load_model(Path(results[f"{STAGES[0]}-whole"]["model"])).state_dict()
    for name, value in after.items():  # merged whole, or a rank's part at a time
        torch.testing.assert_close(value, first[name], rtol=0, atol=1e-5)
