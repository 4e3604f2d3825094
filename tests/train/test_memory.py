"""What the plan says of a model's size and memory, against the models themselves and against real workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overproof.config import Lora, Pretrained, Train
from overproof.data.manifest import START, Manifest
from overproof.data.token_parts import text_columns
from overproof.errors import InputError
from overproof.models import stage_memory, zero_memory
from overproof.models.adapters import add_adapters
from overproof.models.base import DataShape, shape_of
from overproof.models.decoder import DecoderModel
from overproof.models.hf_directory import build_model, count_parameters, save_model
from overproof.models.llama import Llama
from overproof.models.sizes import FP32_BYTES, ModelSize, model_size, trained_size
from overproof.models.varlen import attend_by_lengths
from overproof.models.vit import Vit
from overproof.registry import FAMILIES, TASKS
from overproof.train.objective import CrossEntropy

RANKS_S = 600
WORLD, VOCABULARY, LENGTH, CLASSES = 2, 1024, 12, 10
TEXT = DataShape("language_modeling", VOCABULARY, LENGTH)
TEACHER = Llama(hidden_size=256, intermediate_size=512, layers=3, heads=4, kv_heads=2)
LLAMAS = (
    TEACHER,
    Llama(hidden_size=64, intermediate_size=160, layers=1, heads=4, kv_heads=4),
    Llama(hidden_size=96, intermediate_size=64, layers=4, heads=3, kv_heads=1),
)
VITS = (
    Vit(hidden_size=64, intermediate_size=160, layers=3, heads=4, patch_size=2),
    Vit(hidden_size=30, intermediate_size=7, layers=1, heads=2, patch_size=4),
    Vit(hidden_size=16, intermediate_size=32, layers=2, heads=2, patch_size=1),
)
# One of each further family of decoders, with as many numbers.
DECODERS = tuple(
    family.section.model_validate({"kind": kind, "hidden_size": 64, "intermediate_size": 160, "layers": 2, "heads": 4,
                                   **({"kv_heads": 2} if "kv_heads" in family.section.model_fields else {})})
    for kind, family in FAMILIES.items()
    if kind != "llama" and family.section is not None and issubclass(family.section, DecoderModel)
)  # fmt: skip
# A tensor that lies across two workers' shares is kept whole by both; one matrix of the model at most.
ONE_TENSOR = 4 * 512 * 256
SLACK_BYTES = 100_000  # alignment of shares, norms and flags: under 2 % of the smallest part measured


def manifest(model: DecoderModel | Vit | str = "llama", apart: bool = False) -> Manifest:
    text = not isinstance(model, Vit)
    columns = text_columns(LENGTH, VOCABULARY, apart) if text else ()
    return Manifest(
        task="language_modeling" if text else "image_classification", columns=columns, splits={}, rows_per_group=8,
        positions=LENGTH if text else 1, outputs=VOCABULARY if text else CLASSES,
        details={} if text else {"channels": 1, "height": 8, "width": 8},
    )  # fmt: skip


def training(**changes: object) -> Train:
    kept = {"model": TEACHER, "steps": 6, "batch_size": 8, "learning_rate": 1e-3, "workers": WORLD}
    return Train.model_validate(kept | changes)


@pytest.mark.parametrize("model", [*LLAMAS, *VITS], ids=lambda m: f"{m.kind}-{m.hidden_size}x{m.layers}")
def test_every_tensor_of_a_model_is_counted(model: Llama | Vit, tmp_path: Path) -> None:
    real = build_model(model, manifest(model), 0)
    shape = shape_of(manifest(model))
    size = model_size(model, shape)
    assert sorted(size.tensors) == sorted(p.numel() for p in real.parameters())
    assert size.parameters == count_parameters(real)
    save_model(real, real.config, tmp_path)
    unknown = replace(shape, outputs=0)
    assert model_size(Pretrained(path=str(tmp_path)), unknown).parameters == size.parameters
    read = model_size(Pretrained(path=f"file://{tmp_path}"), unknown)
    assert (read.places, read.outputs, read.key_width) == (size.places, size.outputs, size.key_width)
    assert sorted(read.tensors) == sorted(size.tensors)


def test_what_is_no_model_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        model_size(Pretrained(path=str(tmp_path)), DataShape("language_modeling", 0, 1))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="safetensors"):
        model_size(Pretrained(path=str(tmp_path)), DataShape("language_modeling", 0, 1))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="not safetensors: a header of"):
        model_size(Pretrained(path=str(tmp_path)), DataShape("language_modeling", 0, 1))


CASES: dict[str, dict[str, object]] = {
    **{f"fp32-{stage}": {"zero_stage": stage} for stage in range(4)},
    **{f"bf16-{stage}": {"zero_stage": stage, "precision": "bf16"} for stage in range(4)},
    "bf16-sums-2": {"zero_stage": 2, "precision": "bf16", "grad_accum_dtype": "bf16", "bucket_elements": 9_000},
    "overlapping-1": {"zero_stage": 1, "overlap_comm": True},
    "overlapping-2": {"zero_stage": 2, "overlap_comm": True, "bucket_elements": 50_000},
    "accumulated-1": {"zero_stage": 1, "micro_batch_size": 2},
    "optimizer-1": {"zero_stage": 1, "offload": "optimizer"},
    "optimizer-2": {"zero_stage": 2, "offload": "optimizer", "precision": "bf16"},
    "optimizer-sums-2": {"zero_stage": 2, "offload": "optimizer", "precision": "bf16", "grad_accum_dtype": "fp32"},
    "parameters-3": {"zero_stage": 3, "offload": "parameters"},
    **{f"adapters-{stage}": {"zero_stage": stage} for stage in (0, 1, 3)},
    "hpz-3": {"zero_stage": 3, "precision": "bf16", "hpz_partition_size": 2},  # last: DeepSpeed keeps the group
}
LORA = Lora(rank=4)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes of every case on both ranks of a real group, each trained for two steps."""
    folder: Path = tmp_path_factory.mktemp("memory")
    cases = [
        {
            "name": name,
            "train": training(**changes).model_dump(mode="json"),
            "manifest": manifest().model_dump(),
            "lora": LORA.model_dump() if name.startswith("adapters") else None,
        }
        for name, changes in CASES.items()
    ]
    script = Path(__file__).parent / "memory_ranks.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(WORLD), json.dumps(cases)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=RANKS_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", CASES)
def test_formulas_give_the_bytes_that_workers_hold(measured: Path, name: str, rank: int, tmp_path: Path) -> None:
    found: dict[str, Any] = json.loads((measured / f"{name}.{rank}.json").read_text())
    train = training(**CASES[name])
    size = adapted_size(TEACHER, LORA, tmp_path) if name.startswith("adapters") else model_size(TEACHER, TEXT)
    held = zero_memory.state_memory(size, train, train.zero_stage, WORLD)
    for part in ("weights", "gradients", "optimizer", "buffers"):
        expected = getattr(held.device, part) + getattr(held.host, part)
        tolerance = SLACK_BYTES + (ONE_TENSOR if part == "gradients" else 0)
        assert found["parts"][part] == pytest.approx(expected, abs=tolerance), part
    assert abs(found["unclaimed"]) < SLACK_BYTES  # there is no further tensor
    if rank == 0:  # which writes what the ranks have in common
        assert found["checkpoint"] == pytest.approx(stage_memory.checkpoint_memory(size, train, WORLD), abs=SLACK_BYTES)


def adapted_size(model: DecoderModel, lora: Lora, folder: Path) -> ModelSize:
    """Of a directory of such a model, with adapters."""
    built = build_model(model, manifest(model), 0)
    save_model(built, built.config, folder)
    return trained_size(training(model={"kind": "pretrained", "path": str(folder)}, lora=lora.model_dump()), TEXT)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj"), ("self_attn.v_proj",)])
def test_the_adapters_that_a_plan_counts_are_those_that_are_trained(targets: Any, tmp_path: Path) -> None:
    lora = Lora(rank=3, targets=targets)
    size, real = adapted_size(TEACHER, lora, tmp_path), build_model(TEACHER, manifest(), 0)
    add_adapters(real, lora, 0)
    assert sorted(size.trained) == sorted(p.numel() for p in real.parameters() if p.requires_grad)
    assert size.held == count_parameters(real)
    assert size.parameters == model_size(TEACHER, TEXT).parameters


def test_buckets_are_the_recipes_and_a_second_copy_begins_where_weights_are_let_go() -> None:
    size = model_size(Llama(hidden_size=4096, intermediate_size=11_008, layers=16, heads=32, kv_heads=8), TEXT)
    assert size.parameters > zero_memory.MAX_LIVE_PARAMETERS

    def device(stage: int, **changes: object) -> zero_memory.MemoryParts:
        train = training(workers=8, precision="bf16", zero_stage=stage, **changes)
        return zero_memory.state_memory(size, train, stage, 8).device

    assert device(2).buffers == 2 * 500_000_000
    assert device(2, bucket_elements=1000, overlap_comm=True).buffers == 2 * 2 * 1000
    assert device(3, bucket_elements=1000).buffers == 2 * 1000
    second = device(3, hpz_partition_size=4).weights - device(3).weights
    assert second == pytest.approx(2 * size.parameters / 4, abs=2)
    assert device(2, grad_accum_dtype="bf16").gradients - device(2).gradients == 2 * -(-size.parameters // 8)


def test_the_papers_table_at_7_5_billion_parameters() -> None:
    """Figure 1 of arXiv 1910.02054: 7.5 billion parameters, 64 workers, 16 bits: 120, 31.4, 16.6 and 1.9 GB."""
    paper = {1: 31.4e9, 2: 16.6e9, 3: 1.9e9}
    billions = Llama(hidden_size=4096, intermediate_size=16_384, layers=28, heads=32, kv_heads=32)
    size = model_size(billions, DataShape("language_modeling", 50_000, 1024))
    scale = 7.5e9 / size.parameters
    assert scale == pytest.approx(1, abs=0.05)
    train = training(batch_size=64, workers=64, precision="bf16", grad_accum_dtype="bf16")
    for stage, bytes_ in paper.items():
        device = zero_memory.state_memory(size, train, stage, 64).device
        gathered = zero_memory.HALF_BYTES * zero_memory.MAX_LIVE_PARAMETERS if stage == 3 else 0
        copies = FP32_BYTES * size.parameters / 64 if stage > 1 else 0  # fp32 gradients of the update
        plain = device.total - device.buffers - gathered - copies
        assert plain * scale == pytest.approx(bytes_, abs=0.05e9)


@given(
    stage=st.integers(1, 3),
    world=st.sampled_from([1, 2, 4, 8]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    offload=st.sampled_from(["none", "optimizer"]),
)
def test_more_workers_and_higher_stages_never_ask_for_more(
    stage: int, world: int, precision: str, offload: str
) -> None:
    size = model_size(TEACHER, TEXT)
    train = training(workers=8, zero_stage=stage, precision=precision, offload=offload)
    here, wider = (zero_memory.state_memory(size, train, stage, n) for n in (world, 2 * world))
    for where in ("device", "host"):
        assert getattr(wider, where).total <= getattr(here, where).total
    assert here.total == here.device.total + here.host.total
    if offload == "optimizer":
        assert here.device.optimizer == 0
        assert (
            here.device.total
            < zero_memory.state_memory(size, training(workers=8, precision=precision), stage, world).total
        )


def saved_bytes(train: Train, autocast: bool = False, apart: bool = False) -> int:
    """Bytes of what autograd keeps of a forward pass of one worker's micro-batch, weights left out."""
    model = train.model
    assert isinstance(model, DecoderModel | Vit)
    half = train.precision != "fp32" and not autocast
    built = build_model(model, manifest(model), 0).to(torch.bfloat16 if half else torch.float32)
    if train.activation_checkpointing:
        built.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = train.batch_size // WORLD // train.accumulation(WORLD)
    if train.attention == "varlen":
        attend_by_lengths(built)
    own = {p.untyped_storage().data_ptr() for p in built.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor  # so that no address is used again
        return tensor

    text = isinstance(model, DecoderModel)
    batch = (
        {"tokens": torch.randint(0, VOCABULARY, (rows, LENGTH + 1)), "length": torch.full((rows,), LENGTH)}
        if text
        else {"pixels": torch.rand(rows, 1, 8, 8).to(built.dtype), "label": torch.zeros(rows, dtype=torch.long)}
    )
    if apart:
        batch["tokens"][:, 5] = 0
        batch[START] = torch.zeros(rows, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        CrossEntropy(TASKS[manifest(model).task].predict).loss(built, batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "model", [*LLAMAS, *DECODERS, VITS[0], VITS[2]], ids=lambda m: f"{m.kind}-{m.hidden_size}x{m.layers}"
)
def test_activations_are_what_autograd_keeps(model: DecoderModel | Vit, precision: str) -> None:
    train = training(model=model, precision=precision, batch_size=64, zero_stage=1)
    size = model_size(model, shape_of(manifest(model)))
    assert saved_bytes(train) == pytest.approx(kept_of(size, train), rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [*LLAMAS, *DECODERS], ids=lambda m: f"{m.kind}-{m.hidden_size}x{m.layers}")
def test_rows_whose_documents_are_apart_keep_the_mask_in_each_layer(model: DecoderModel, precision: str) -> None:
    """Rotary tables of positions of their own in each row are left out: the layers share them."""
    train = training(model=model, precision=precision, batch_size=64, zero_stage=1)
    size = model_size(model, shape_of(manifest(model, apart=True)))
    assert saved_bytes(train, apart=True) == pytest.approx(kept_of(size, train), rel=0.03)


@pytest.mark.parametrize("model", [LLAMAS[0], LLAMAS[2]], ids=lambda m: f"{m.kind}-{m.hidden_size}x{m.layers}")
def test_attention_by_lengths_keeps_no_mask(model: DecoderModel) -> None:
    train = training(model=model, batch_size=64, zero_stage=1, attention="varlen")
    size = trained_size(train, shape_of(manifest(model, apart=True)))
    assert saved_bytes(train, apart=True) == pytest.approx(kept_of(size, train), rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_large_logits_are_counted_in_parts(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the layers lie the gradients of the output layer and of its inputs; a part of the logits is gone."""
    rows = 16
    monkeypatch.setattr(zero_memory, "LEAST_CHUNK_ROWS", rows)
    monkeypatch.setitem(zero_memory.OUTPUT_CHUNK_BYTES, "cpu", 1)
    train = training(model=TEACHER, precision=precision, batch_size=64, zero_stage=1)
    size = model_size(TEACHER, TEXT)
    number = FP32_BYTES if precision == "fp32" else zero_memory.HALF_BYTES
    kept = zero_memory.activation_memory(size, train, WORLD) - rows * VOCABULARY * number
    assert saved_bytes(train) == pytest.approx(kept, rel=0.02)


def kept_of(size: Any, train: Train, stage: int = 1) -> int:
    """The estimate less the logits that are gone when the loss is known: all but the log-softmax."""
    number = FP32_BYTES if train.precision == "fp32" else zero_memory.HALF_BYTES
    rows = train.batch_size // WORLD // train.accumulation(WORLD)
    gone = rows * size.predictions * size.outputs * number  # the logits; their gradient is kept
    return zero_memory.activation_memory(size, train, WORLD, stage) - gone


def test_autocast_keeps_16_bit_copies_of_the_weights_too() -> None:
    train = training(precision="bf16", batch_size=64, zero_stage=0)
    size = model_size(TEACHER, TEXT)
    assert saved_bytes(train, autocast=True) == pytest.approx(kept_of(size, train, 0), rel=0.25)


def test_checkpointed_layers_keep_their_inputs() -> None:
    model = Llama(hidden_size=64, intermediate_size=160, layers=6, heads=4, kv_heads=2)
    train = training(model=model, batch_size=64, activation_checkpointing=True)
    size = model_size(model, TEXT)
    # The layer that is computed again in the backward pass.
    one_layer = 32 * LENGTH * zero_memory.layer_memory(size, FP32_BYTES)
    assert saved_bytes(train) == pytest.approx(kept_of(size, train) - one_layer, rel=0.02)
    assert zero_memory.activation_memory(size, train, WORLD) < zero_memory.activation_memory(
        size, training(model=model, batch_size=64), WORLD
    )


def test_smaller_micro_batches_keep_less() -> None:
    size = model_size(TEACHER, TEXT)
    whole, halves = (training(batch_size=64, micro_batch_size=limit) for limit in (None, 16))
    assert zero_memory.activation_memory(size, whole, WORLD) == 2 * zero_memory.activation_memory(size, halves, WORLD)
