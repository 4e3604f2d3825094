"""Residual networks of convolutions: their sizes, memory and directories, and training with batch norm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from overproof.config import Optimization, Pretrained, Train
from overproof.data.manifest import Manifest
from overproof.errors import InputError
from overproof.files import file_sha256
from overproof.models import stage_memory, zero_memory
from overproof.models.base import DataShape
from overproof.models.hf_directory import (
    build_model,
    count_parameters,
    load_model,
    load_start,
    require_outputs,
    save_model,
)
from overproof.models.resnet import FAMILY, ResNet
from overproof.models.sizes import FP32_BYTES, model_size
from overproof.registry import TASKS
from overproof.train.engine import TorchEngine
from overproof.train.objective import CrossEntropy

CLASSES = ("cat", "dog", "emu")
BASIC = ResNet(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 2))
BOTTLENECK = ResNet(embedding_size=8, hidden_sizes=(16, 32), depths=(2, 1), layer_type="bottleneck")
HALVING = ResNet(embedding_size=12, hidden_sizes=(12, 8, 20), depths=(1, 1, 2), downsample_in_first_stage=True)
SECTIONS = {"basic": BASIC, "bottleneck": BOTTLENECK, "halving": HALVING}


def manifest(height: int = 20, width: int = 12, channels: int = 3, classes: tuple[str, ...] = CLASSES) -> Manifest:
    details = {"channels": channels, "height": height, "width": width, "classes": list(classes)}
    return Manifest(
        task="image_classification", columns=(), splits={}, rows_per_group=4, positions=1, outputs=len(classes),
        details=details,
    )  # fmt: skip


def shape(of: Manifest) -> DataShape:
    return DataShape(of.task, of.outputs, 1, of.details)


def batch(rows: int, of: Manifest, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    edges = tuple(of.details[name] for name in ("channels", "height", "width"))
    labels = torch.randint(0, of.outputs, (rows,), generator=generator)
    return {"pixels": torch.rand(rows, *edges, generator=generator), "label": labels}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_parameter_is_counted_and_no_running_statistic(name: str, tmp_path: Path) -> None:
    model = build_model(SECTIONS[name], manifest(), 0)
    size = model_size(SECTIONS[name], shape(manifest()))
    assert sorted(size.tensors) == sorted(p.numel() for p in model.parameters())
    assert size.parameters == count_parameters(model)
    save_model(model, model.config, tmp_path)
    read = model_size(Pretrained(path=str(tmp_path)), shape(manifest()))
    assert sorted(read.tensors) == sorted(size.tensors)
    assert replace(read, tensors=()) == replace(size, tensors=())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("edges", [(8, 8), (33, 50)])
def test_memory_is_an_upper_bound_of_what_autograd_keeps(name: str, edges: tuple[int, int], precision: str) -> None:
    rows, of = 16, manifest(*edges)
    model = build_model(SECTIONS[name], of, 0).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, dict[int, torch.Tensor]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    given = {key: value.to(model.dtype) if key == "pixels" else value for key, value in batch(rows, of).items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        CrossEntropy(TASKS[of.task].predict).loss(model, given)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    statistics = sum(2 * FP32_BYTES * m.num_features for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    train = Train.model_validate(
        {"model": SECTIONS[name], "steps": 1, "batch_size": rows, "learning_rate": 1e-3, "workers": 1, "zero_stage": 1}
        | {"precision": precision}
    )
    told = zero_memory.activation_memory(model_size(SECTIONS[name], shape(of)), train, 1)
    assert saved - statistics <= told <= 1.2 * saved


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("edges", [(8, 8), (64, 96)])
def test_memory_without_gradients_is_an_upper_bound_of_what_is_there_at_once(name: str, edges: tuple[int, int]) -> None:
    rows, of = 8, manifest(*edges)
    model, size = build_model(SECTIONS[name], of, 0).eval(), model_size(SECTIONS[name], shape(of))
    images_BCHW = batch(rows, of)["pixels"]
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        model(images_BCHW)
    held, most = 0, 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    kernel = FP32_BYTES * max(size.tensors)  # as the convolution's library lays it out
    assert 0 < most <= stage_memory.forward_memory(size, rows) + kernel


@pytest.mark.parametrize("name", SECTIONS)
def test_a_directory_has_the_running_statistics_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = build_model(SECTIONS[name], manifest(), 1)
    for seed in range(3):
        model(batch(8, manifest(), seed)["pixels"])
    save_model(model, model.config, tmp_path / "model")
    found, theirs = load_model(tmp_path / "model"), AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert not found.training
    counts = {key: value for key, value in found.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts
    assert all(value.dtype == torch.int64 and value == 3 for value in counts.values())
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)
        assert torch.equal(theirs.state_dict()[key], value)
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    save_model(found, found.config, tmp_path / "again")
    files = [tmp_path / folder / "model.safetensors" for folder in ("model", "again")]
    assert file_sha256(files[0]) == file_sha256(files[1])


def test_flat_rows_are_images_of_the_data(tmp_path: Path) -> None:
    model = build_model(BASIC, manifest(), 0).eval()
    rows_BD = torch.from_numpy(FAMILY.sample_rows(model.config, 5, np.random.default_rng(0)))
    assert rows_BD.shape == (5, FAMILY.width(model.config)) == (5, 3 * 20 * 12)
    with torch.inference_mode():
        found = TASKS["image_classification"].predict(
            model, {"pixels": rows_BD.view(5, 3, 20, 12), "label": torch.zeros(5, dtype=torch.int64)}
        )
        assert torch.equal(FAMILY.flat_logprobs(model, rows_BD), found.logits_BPV[:, 0].log_softmax(-1))
    config = json.loads(json.dumps(model.config.to_dict()))
    del config["image_size"]
    with pytest.raises(InputError, match="no image_size, so that rows of it are not known; expected a ResNet that was"):
        FAMILY.width(ResNetConfig.from_dict(config))


def test_a_directory_of_other_classes_is_fitted_to_the_data(tmp_path: Path) -> None:
    """As the models on the Hub: of any image size, with an output layer that is not the data's."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7)
    whole = ResNetForImageClassification(config)
    save_model(whole, config, tmp_path)
    assert model_size(Pretrained(path=str(tmp_path)), shape(manifest())).outputs == 3
    with pytest.raises(InputError, match="has no output layer for the classes cat, dog, emu"):
        require_outputs(tmp_path, manifest())
    model = load_start(tmp_path, manifest(), 0)
    assert count_parameters(model) == model_size(Pretrained(path=str(tmp_path)), shape(manifest())).parameters
    assert model.config.image_size == [20, 12]
    for key, value in whole.state_dict().items():
        if not key.startswith("classifier"):
            assert torch.equal(model.state_dict()[key], value)
    save_model(model, model.config, tmp_path / "fitted")
    other = load_start(tmp_path / "fitted", manifest(classes=CLASSES[::-1]), 0)
    assert torch.equal(other.classifier[1].weight, model.classifier[1].weight.flip(0))
    with pytest.raises(InputError, match=r"num_channels is 3, the images have 1; expected data.channels: 3"):
        load_start(tmp_path, manifest(channels=1), 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depths": (1,)}, r"depths \[1\] and hidden_sizes \[8, 16\]: expected as many stages"),
        ({"layer_type": "bottleneck", "hidden_sizes": (8, 18)}, r"found 18; expected multiples of 4: a bottleneck has"),
        ({"hidden_sizes": (8, 0)}, "hidden_sizes.1"),
        ({"hidden_sizes": (), "depths": ()}, "at least 1"),
        ({"layer_type": "wide"}, "layer_type"),
    ],
)
def test_sections_that_describe_no_network_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ResNet.parse(BASIC.model_dump() | changes, "train.model")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": "fp16", "zero_stage": 0}, "train.precision: found 'fp16' with zero_stage 0, which keeps batch"),
        ({"precision": "bf16", "zero_stage": 2}, "found 'bf16' with zero_stage 2.*expected fp32, or bf16 with"),
        ({"activation_checkpointing": True}, "train.activation_checkpointing: found true; expected false"),
        ({"precision": "bf16", "zero_stage": 0}, None),
    ],
)  # fmt: skip
def test_trainings_that_would_spoil_running_statistics_are_refused(settings: dict[str, Any], words: str | None) -> None:
    asked = {"model": BASIC, "steps": 1, "batch_size": 4, "learning_rate": 1e-3, "workers": 1, "zero_stage": 1}
    train = Train.model_validate(asked | settings)
    if words is None:
        FAMILY.require_training(train, "train")
        return
    with pytest.raises(InputError, match=words):
        FAMILY.require_training(train, "train")


def engine(steps: int = 6) -> TorchEngine:
    plan = Optimization(steps=steps, batch_size=8, learning_rate=1e-3, warmup_steps=1)
    return TorchEngine(build_model(BOTTLENECK, manifest(), 0), plan)


def test_training_in_one_process_resumes_bit_for_bit(tmp_path: Path) -> None:
    objective = CrossEntropy(TASKS["image_classification"].predict)
    whole, first, second = engine(), engine(), engine()
    expected = [whole.step(objective, batch(8, manifest(), step))() for step in range(6)]
    for step in range(3):
        assert first.step(objective, batch(8, manifest(), step))() == expected[step]
    first.save(lambda name, value: torch.save(value, tmp_path / name))
    second.load(tmp_path, 3)
    for step in range(3, 6):
        assert second.step(objective, batch(8, manifest(), step))() == expected[step]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value)


def test_a_step_whose_numbers_are_not_finite_leaves_the_running_statistics_as_they_were() -> None:
    objective, trained = CrossEntropy(TASKS["image_classification"].predict), engine()
    trained.step(objective, batch(8, manifest()))
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    broken = batch(8, manifest(), 1)
    broken["pixels"][3] = torch.nan
    assert not np.isfinite(trained.step(objective, broken)()["grad_norm"])
    for key, value in trained.model.state_dict().items():
        assert torch.equal(value, before[key])


def test_evaluation_computes_with_running_statistics_and_changes_none() -> None:
    trained = engine()
    trained.step(CrossEntropy(TASKS["image_classification"].predict), batch(8, manifest()))
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    images_BCHW = batch(6, manifest(), 4)["pixels"]
    with trained.eval_mode() as model:
        together, alone = model(images_BCHW).logits, torch.cat([model(image[None]).logits for image in images_BCHW])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in trained.model.state_dict().items())
    assert trained.model.training
