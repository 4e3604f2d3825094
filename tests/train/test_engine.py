"""Engines: the schedule, DeepSpeed's settings, and that every engine, stage and world size trains the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_data import LLAMA, VIT, settings

from overproof.config import Optimization
from overproof.data.manifest import Manifest
from overproof.models.gpt2 import Gpt2
from overproof.models.hf_directory import build_model
from overproof.train.loop import CurveRow
from overproof.train.optim import deepspeed_config, learning_rate, parameter_groups

STAGES = (0, 1, 2, 3)
GPT2 = Gpt2(hidden_size=32, intermediate_size=64, layers=1, heads=4)  # a module of which draws its children's weights
TOLERANCE = 1e-5


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rate_warms_up_to_the_peak_then_falls_to_the_last_fraction(schedule: str) -> None:
    plan = Optimization(
        steps=20, batch_size=1, learning_rate=2.0, warmup_steps=4, schedule=schedule, final_fraction=0.1
    )
    rates = [learning_rate(plan, step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)
    middle = {"cosine": 0.2 + 1.8 * 0.5 * (1 + 0.10452846), "linear": 0.2 + 1.8 * 8 / 15, "constant": 2.0}
    assert rates[11] == pytest.approx(middle[schedule])


def test_rate_of_very_short_runs() -> None:
    one = Optimization(steps=1, batch_size=1, learning_rate=1.0)
    assert learning_rate(one, 0) == 1.0
    warming = Optimization(steps=2, batch_size=1, learning_rate=1.0, warmup_steps=9)
    assert [learning_rate(warming, step) for step in range(2)] == pytest.approx([0.1, 0.2])


def test_deepspeed_config_is_pinned() -> None:
    assert deepspeed_config(settings(workers=2, zero_stage=2, batch_size=8, clip_norm=0.5), 2) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True,
                       "fused": True},
        },
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000,
                              "overlap_comm": False},
    }  # fmt: skip


def test_deepspeed_config_of_everything_else_is_pinned() -> None:
    plan = settings(workers=4, zero_stage=3, batch_size=16, micro_batch_size=2, offload="parameters", precision="fp16")
    config = deepspeed_config(plan, 2, universal=True)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["optimizer"]["params"]["torch_adam"] is False
    assert config["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 500_000_000,
        "allgather_bucket_size": 500_000_000,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    assert config["fp16"] == {"enabled": True, "initial_scale_power": 16}
    assert config["checkpoint"] == {"load_universal": True}


def test_without_zero_clipping_is_not_left_to_deepspeed() -> None:
    assert deepspeed_config(settings(zero_stage=0), 1)["gradient_clipping"] == 0.0
    assert deepspeed_config(settings(zero_stage=0, precision="fp16"), 1)["gradient_clipping"] == 1.0


@pytest.mark.parametrize(("micro", "world", "count"), [(None, 2, 1), (4, 2, 3), (5, 2, 3), (1, 3, 8), (24, 1, 1)])
def test_accumulation_is_the_fewest_equal_parts_within_the_limit(micro: int | None, world: int, count: int) -> None:
    assert settings(batch_size=24, micro_batch_size=micro, workers=world).accumulation(world) == count


def test_bf16_is_cast_activations_without_zero_and_weights_with_masters_under_it() -> None:
    lower = [deepspeed_config(settings(precision="bf16", zero_stage=stage), 1) for stage in (0, 1, 3)]
    assert lower[0]["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert "bf16" not in lower[0]
    assert all(config["bf16"] == {"enabled": True} and "torch_autocast" not in config for config in lower[1:])
    assert [config["data_types"]["grad_accum_dtype"] for config in lower[1:]] == ["bf16", "fp32"]


def test_buckets_and_partitions_are_the_recipes_and_no_larger_than_what_is_trained() -> None:
    plan = settings(workers=4, zero_stage=3, bucket_elements=9_000, hpz_partition_size=2, overlap_comm=False)
    zero = deepspeed_config(plan, 4, trained=777)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (777, 778)
    assert (zero["zero_hpz_partition_size"], zero["overlap_comm"]) == (2, False)
    assert deepspeed_config(plan, 4)["zero_optimization"]["reduce_bucket_size"] == 9_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_accum_dtype": "fp32", "precision": "bf16", "zero_stage": 1}, "precision 'bf16', zero_stage 1: ex"),
        ({"grad_accum_dtype": "bf16"}, "a choice under precision bf16 .*found precision 'fp32'"),
        ({"overlap_comm": True, "zero_stage": 0}, "overlap_comm true needs zero_stage 1, 2 or 3; found 0"),
        ({"hpz_partition_size": 2}, "of zero_stage 3 on the device; found zero_stage 1"),
        ({"hpz_partition_size": 2, "zero_stage": 3, "offload": "parameters"}, "offload 'parameters': expected 1"),
        ({"hpz_partition_size": 4, "zero_stage": 3}, "hpz_partition_size 4 does not divide workers 2"),
        ({"bucket_elements": 0}, "greater than or equal to 1"),
        ({"attention": "varlen", "gpus_per_worker": 1}, "takes 16 bits on GPUs; found precision 'fp32': expected bf16"),
        ({"attention": "varlen", "compile": True}, "found compile true: expected false"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(workers=2, **changes)


def test_elastic_workers_keep_whole_partitions() -> None:
    plan = settings(workers=(2, 8), batch_size=24, zero_stage=3, hpz_partition_size=2)
    assert plan.worlds == (2, 4, 6, 8)


def test_vectors_are_not_decayed(digits_root: Path) -> None:
    model = build_model(VIT, Manifest.read(digits_root), 0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    assert {name for name in names.values() if "norm" in name or name.endswith("bias")} <= kept
    assert any("cls_token" in name for name in kept)
    assert all(name.endswith("weight") or "position" in name for name in decayed)


PARTS = ["parts2", "parts3"]  # whose output layer is a part of the loss


def cases(root: Path, text: Path, world: int) -> list[dict[str, Any]]:
    """What a process group of this size trains, by name."""

    def case(
        name: str, engine: str = "zero", at: Path = root, dropout: float = 0.0, read: bool = False, save: bool = False,
        output_rows: int = 256, **changes: object,
    ) -> dict[str, Any]:  # fmt: skip
        train = settings(workers=world, **changes)
        about = {"name": name, "engine": engine, "root": str(at), "dropout": dropout, "read": read, "save": save}
        about |= {"output_rows": output_rows}
        return about | {"train": train.model_dump(mode="json")}

    if world == 1:
        return [
            case("torch", "torch"),
            case("one", save=True),
            case("text-torch", "torch", text, model=LLAMA),
            case("dropout-one", dropout=0.2, micro_batch_size=2),
        ]
    return [
        *(case(f"stage{stage}", zero_stage=stage, save=True) for stage in STAGES),
        *(case(f"bf16-stage{stage}", zero_stage=stage, precision="bf16", save=True) for stage in STAGES),
        case("text-stage3", at=text, model=LLAMA, zero_stage=3),
        case("read-stage3", at=text, model=LLAMA, zero_stage=3, read=True),
        case("drawn-stage3", at=text, model=GPT2, zero_stage=3),
        *(case(f"accumulated{stage}", zero_stage=stage, micro_batch_size=1) for stage in STAGES),
        case("recomputed", at=text, model=LLAMA, zero_stage=3, activation_checkpointing=True),
        *(case(name, at=text, model=LLAMA, zero_stage=int(name[-1]), output_rows=7) for name in PARTS),
        case("lengths", at=text, model=LLAMA, zero_stage=3, activation_checkpointing=True, attention="varlen"),
        case("compiled", compile=True, zero_stage=1),
        case("dropout-two", dropout=0.2, micro_batch_size=2, zero_stage=2),
        *(case(f"overlapping{stage}", zero_stage=stage, micro_batch_size=2, overlap_comm=True) for stage in (1, 2)),
        *(case(f"buckets{stage}", zero_stage=stage, bucket_elements=500) for stage in (1, 2, 3)),
        case("hpz", zero_stage=3, hpz_partition_size=2, save=True),  # last: DeepSpeed keeps the group
    ]


@pytest.fixture(scope="module")
def trained(digits_root: Path, text_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both process groups, one and two ranks, run side by side; their losses and weights by case."""
    out = tmp_path_factory.mktemp("engines")
    script = Path(__file__).with_name("engine_ranks.py")
    given = {}
    for world in (1, 2):
        (out / str(world)).mkdir()
        given[world] = cases(digits_root, text_root, world)
    done = subprocess.run(
        [sys.executable, str(script), str(out), json.dumps(given)],
        capture_output=True,
        text=True,
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(out / "compiled")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def curve(trained: Path, name: str) -> list[CurveRow]:
    rows: list[CurveRow] = json.loads(next(trained.glob(f"*/{name}.json")).read_text())
    return rows


def differences(trained: Path, name: str, other: str, key: str) -> list[float]:
    here, there = ([row[key] for row in curve(trained, n) if key in row] for n in (name, other))
    assert len(here) == len(there) > 0
    return [abs(a - b) for a, b in zip(here, there, strict=True)]


@pytest.mark.parametrize(
    "name",
    ["one", "compiled", "overlapping1", "overlapping2", "buckets1", "buckets2", "buckets3", "hpz",
     *(f"{kind}{stage}" for kind in ("stage", "accumulated") for stage in STAGES)],
)  # fmt: skip
@pytest.mark.parametrize("key", ["loss", "grad_norm", "learning_rate", "validation_loss"])
def test_every_stage_and_world_size_trains_like_plain_torch(trained: Path, name: str, key: str) -> None:
    assert max(differences(trained, name, "torch", key)) < TOLERANCE


def test_nothing_is_compiled(trained: Path) -> None:
    assert not (trained / "compiled").exists()


def test_training_ends_with_the_lock_before_it_compiles(trained: Path) -> None:
    """It waited for ever, and said nothing. Of locks, see test_extension_lock.py."""
    said = json.loads((trained / "1" / "locked.json").read_text())
    assert said.startswith(f"{trained / '1/cpu_adam/lock'}: a lock of 30 minutes ago")
    assert (trained / "1/cpu_adam/lock").exists()


def test_the_compiler_is_loaded_where_it_is_asked_for(trained: Path) -> None:
    """It takes seconds of CPU time, in every worker."""
    loaded = json.loads((trained / "2" / "compiler.0.json").read_text())
    names = list(loaded)
    assert [name for name in names if loaded[name]] == names[names.index("compiled") :]


def test_large_logits_are_taken_in_parts_at_every_rank(trained: Path) -> None:
    assert [json.loads((trained / "2" / f"in_parts.{rank}.json").read_text()) for rank in (0, 1)] == [PARTS] * 2


@pytest.mark.parametrize("name", ["text-stage3", "lengths", *PARTS])
def test_text_with_rows_of_unequal_length_too(trained: Path, name: str) -> None:
    assert max(differences(trained, name, "text-torch", "loss")) < TOLERANCE
    assert max(differences(trained, name, "text-torch", "validation_loss")) < TOLERANCE


@pytest.mark.parametrize("name", ["stage3", "bf16-stage3", "text-stage3", "read-stage3", "drawn-stage3"])
def test_stage_3_takes_a_model_apart_as_it_is_drawn_or_read(trained: Path, name: str) -> None:
    for rank in range(2):
        whole, held, others = json.loads((trained / "2" / f"parts.{rank}.json").read_text())[name]
        assert whole / 2 <= held < 0.51 * whole  # shares are rounded up
        assert not others


def test_what_stage_3_reads_in_parts_trains_as_it_did(trained: Path) -> None:
    assert max(differences(trained, "read-stage3", "text-torch", "loss")) < TOLERANCE
    assert max(differences(trained, "read-stage3", "text-torch", "grad_norm")) < TOLERANCE


def test_activations_computed_again_change_nothing(trained: Path) -> None:
    assert max(differences(trained, "recomputed", "text-stage3", "loss")) < TOLERANCE


def test_chance_follows_the_rows_and_not_the_workers(trained: Path) -> None:
    assert max(differences(trained, "dropout-two", "dropout-one", "loss")) < TOLERANCE
    assert max(differences(trained, "dropout-two", "torch", "loss")) > 100 * TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_whole_and_the_same(trained: Path, stage: int) -> None:
    whole = torch.load(trained / "1" / "torch.pt")
    gathered = torch.load(trained / "2" / f"stage{stage}.pt")
    assert whole.keys() == gathered.keys()
    files = sorted((trained / "2" / f"stage{stage}-written").glob("*.safetensors"))
    assert len(files) > 2  # each of the two ranks writes several
    written = {name: value for file in files for name, value in load_file(file).items()}
    assert whole.keys() == written.keys()
    for name, value in whole.items():
        torch.testing.assert_close(gathered[name].view(value.shape), value, rtol=0, atol=TOLERANCE)
        assert torch.equal(written[name], gathered[name].view(value.shape))


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_fp32_and_gives_fp32_weights(trained: Path, stage: int) -> None:
    assert max(differences(trained, f"bf16-stage{stage}", "torch", "loss")) < 0.02
    state = torch.load(trained / "2" / f"bf16-stage{stage}.pt")
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_a_checkpoint_that_runs_code_is_refused_and_runs_none(trained: Path) -> None:
    for world in (1, 2):
        for rank in range(world):
            refused = json.loads((trained / str(world) / f"refused.{rank}.json").read_text())
            assert refused.keys() >= ({"one"} if world == 1 else {f"stage{stage}" for stage in STAGES})
            for name, said in refused.items():
                assert f"forged-{name}: a file of this checkpoint names posix.system, which would run code" in said
        assert not (trained / str(world) / "ran").exists()
