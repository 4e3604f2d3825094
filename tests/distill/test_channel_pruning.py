"""Convolutional teachers without the channels that matter least: what is left is the teacher with those at nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import distill_world
import numpy as np
import pytest
import torch
from distill_world import World
from test_student_init import student
from test_sweep import SWEEP, job_of
from test_sweep_resume import to_end
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

from overproof.artifacts import Store
from overproof.config import Pretrained, load_recipe
from overproof.config.student_models import Pruned, TeacherLayers
from overproof.data.manifest import Manifest
from overproof.distill.objectives import LiveTeacherObjective
from overproof.distill.pruning import Importance, measure_importance, prune
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep import sweep
from overproof.errors import InputError
from overproof.models.base import DataShape, shape_of
from overproof.models.hf_directory import build_model, count_parameters, load_model, save_model
from overproof.models.resnet import FAMILY, ResNet
from overproof.models.sizes import student_size
from overproof.models.student_config import left_config

DIGITS = Path(__file__).parents[2] / "jobs/recipes/digits.yaml"
DETAILS = {"channels": 1, "height": 32, "width": 24, "classes": ["a", "b", "c"]}
SHAPE = DataShape("image_classification", 3, 1, DETAILS)
MANIFEST = Manifest(
    task="image_classification", columns=(), splits={}, rows_per_group=4, positions=1, outputs=3, details=DETAILS
)
# Each with what is left of its stages, and of its stem, which goes with the first stage where that adds to it.
TEACHERS: dict[str, tuple[ResNet, tuple[int, ...], int]] = {
    "basic": (ResNet(embedding_size=8, hidden_sizes=(8, 16), depths=(2, 2)), (5, 9), 5),
    "basic-wider": (ResNet(embedding_size=8, hidden_sizes=(12, 16), depths=(1, 2)), (7, 16), 8),
    "bottleneck": (
        ResNet(embedding_size=8, hidden_sizes=(32, 48), depths=(2, 1), layer_type="bottleneck"), (16, 20), 8,
    ),
    "halving": (
        ResNet(embedding_size=8, hidden_sizes=(8, 16, 16), depths=(1, 1, 2), downsample_in_first_stage=True),
        (6, 4, 8),
        8,
    ),
}  # fmt: skip


def images(rows: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"pixels": torch.rand(rows, 1, 32, 24, generator=torch.Generator().manual_seed(seed))}


def teacher(name: str) -> PreTrainedModel:
    """With weights and running statistics that differ from channel to channel."""
    model = build_model(TEACHERS[name][0], MANIFEST, 0)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data = torch.empty_like(weight).uniform_(-0.3, 1.0, generator=generator)
    for seed in range(4):
        model(images(seed=seed)["pixels"])
    return model.eval()


def ask(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(pixel_values=batch["pixels"]).logits
    return logits


def zero(model: PreTrainedModel, conv_layer: str, gone: torch.Tensor) -> None:
    """Have a norm give nothing of these channels."""
    norm = model.get_submodule(f"{conv_layer}.normalization")
    norm.weight.data[gone] = 0  # type: ignore[index, union-attr]
    norm.bias.data[gone] = 0  # type: ignore[index, union-attr]


def least(values_C: np.ndarray, kept: int) -> torch.Tensor:
    return torch.from_numpy(np.argsort(-values_C, kind="stable")[kept:].copy())


@pytest.mark.parametrize("name", TEACHERS)
def test_what_is_left_is_the_teacher_without_the_channels_that_give_least(name: str, tmp_path: Path) -> None:
    section, hidden_sizes, stem = TEACHERS[name]
    model, batch = teacher(name), images(seed=9)
    found = measure_importance(model, [images(seed=5)], ask)
    smaller = prune(model, Pruned(hidden_sizes=hidden_sizes), found).eval()
    assert (smaller.config.hidden_sizes, smaller.config.embedding_size) == ([*hidden_sizes], stem)
    outputs = dict[str, torch.Tensor]()
    for module_name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, o, name=module_name: outputs.update({name: o}))
    ask(model, images(seed=5))
    assert len(found.stages_G) == sum(group.channels for group in FAMILY.channel_groups(model.config.to_dict()))
    last = 1 if section.layer_type == "basic" else 2
    for stage, kept in enumerate(hidden_sizes):
        prefix = f"resnet.encoder.stages.{stage}"
        gone = least(outputs[prefix].abs().mean((0, 2, 3)).numpy(), kept)
        for block in range(section.depths[stage]):
            zero(model, f"{prefix}.layers.{block}.layer.{last}", gone)
            for place in range(last):
                name_inside = f"{prefix}.layers.{block}.layer.{place}"
                inside = kept if section.layer_type == "basic" else kept // 4
                zero(model, name_inside, least(outputs[name_inside].abs().mean((0, 2, 3)).numpy(), inside))
        shortcut = f"{prefix}.layers.0.shortcut"
        if not isinstance(model.get_submodule(shortcut), torch.nn.Identity):
            zero(model, shortcut, gone)
        else:
            zero(model, "resnet.embedder.embedder", gone)
    expected = ask(model, batch)
    torch.testing.assert_close(ask(smaller, batch), expected, rtol=1e-4, atol=1e-4)
    save_model(smaller, smaller.config, tmp_path)
    for read in (load_model(tmp_path), AutoModelForImageClassification.from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(ask(read, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TEACHERS)
def test_its_size_is_known_before_it_is_made(name: str, tmp_path: Path) -> None:
    section, hidden_sizes, _ = TEACHERS[name]
    model = teacher(name)
    save_model(model, model.config, tmp_path)
    asked = Pruned(hidden_sizes=hidden_sizes)
    smaller = prune(model, asked, measure_importance(model, [images()], ask))
    for source in (section, Pretrained(path=str(tmp_path))):
        told = student_size(asked, source, SHAPE)
        assert sorted(told.tensors) == sorted(p.numel() for p in smaller.parameters())
        assert told.parameters == count_parameters(smaller) < count_parameters(model)
        assert told.kept < student_size(source, source, SHAPE).kept


def test_what_stays_whole_is_the_teacher() -> None:
    model = teacher("bottleneck")
    same = prune(model, Pruned(hidden_sizes=(32, 48)), measure_importance(model, [images()], ask))
    for name, value in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], value)


def test_what_matters_is_measured_in_evaluation_and_over_all_rows() -> None:
    model = teacher("basic").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = images(7)["pixels"]
    together = measure_importance(model, [{"pixels": rows}], ask)
    apart = measure_importance(model, [{"pixels": rows[:3]}, {"pixels": rows[3:]}], ask)
    np.testing.assert_allclose(together.stages_G, apart.stages_G, rtol=1e-5)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


REFUSED = [
    ("basic", {"hidden_sizes": (9, 16)}, r"hidden_sizes \[9, 16\]: the teacher has \[8, 16\]; expected 2 numbers"),
    ("basic", {"hidden_sizes": (8,)}, r"hidden_sizes \[8\]: the teacher has \[8, 16\]; expected 2 numbers"),
    ("bottleneck", {"hidden_sizes": (16, 22)}, "found 22; expected multiples of 4"),
    ("bottleneck", {"hidden_sizes": (8, 20)}, "as many as embedding_size 8 in the first stage, whose"),
    ("basic", {"layers": 1}, "layers: a .*loses channels of its stages alone; expected hidden_sizes"),
    ("basic", {"kv_heads": 1, "hidden_sizes": (4, 4)}, "kv_heads: a .*loses channels of its stages alone"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED)
def test_what_a_teacher_has_not_or_cannot_lose_is_refused(name: str, changes: Any, words: str, tmp_path: Path) -> None:
    model, asked = teacher(name), Pruned(**changes)
    save_model(model, model.config, tmp_path)
    with pytest.raises(InputError, match=words):
        prune(model, asked, Importance(*[np.zeros((0, 0))] * 4))
    for source in (TEACHERS[name][0], Pretrained(path=str(tmp_path))):
        with pytest.raises(InputError, match=words):
            student_size(asked, source, SHAPE)


def test_layers_of_a_convolutional_teacher_are_not_taken(tmp_path: Path) -> None:
    model = teacher("basic")
    save_model(model, model.config, tmp_path)
    config = model.config.to_dict() | {"architectures": ["ResNetForImageClassification"]}
    words = r"has stages of blocks, and no equal layers; expected \{kind: pruned"
    with pytest.raises(InputError, match=words):
        left_config(config, TeacherLayers(layers=1), FAMILY)
    with pytest.raises(InputError, match=words):
        student_size(TeacherLayers(layers=1), Pretrained(path=str(tmp_path)), SHAPE)


def test_stages_of_another_teacher_are_refused(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    save_model(model, config, tmp_path)
    words = "hidden_sizes: a ViTForImageClassification cannot lose any by themselves; .*a family such as resnet"
    with pytest.raises(InputError, match=words):
        student_size(Pruned(hidden_sizes=(4,)), Pretrained(path=str(tmp_path)), SHAPE)
    with pytest.raises(InputError, match=words):
        prune(model, Pruned(hidden_sizes=(4,)), Importance(*[np.zeros((0, 0))] * 4))


RESNET = "train.model={kind: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1]}"
VIT = "train.model={kind: vit, hidden_size: 16, intermediate_size: 32, layers: 2, heads: 2}"


@pytest.mark.parametrize(
    ("taught", "model", "words"),
    [
        (RESNET, "{kind: pruned, hidden_sizes: [8, 17]}", r"students.0.model.hidden_sizes \[8, 17\]: the teacher has"),
        (RESNET, "{kind: pruned, hidden_sizes: [8, 0]}", "hidden_sizes.1"),
        (RESNET, "{kind: pruned, hidden_sizes: []}", "hidden_sizes"),
        (RESNET, "{kind: pruned, layers: 1}", "layers: a teacher of kind resnet loses channels of its stages alone"),
        (RESNET, "{kind: teacher_layers, layers: 1}", "kind teacher_layers: a teacher of kind resnet has stages"),
        (RESNET, "{kind: masked, method: wanda, sparsity: 0.5}", "kind masked: a teacher of kind resnet has stages"),
        (RESNET, "{kind: pruned, hidden_sizes: [8, 8], rounds: 2}", "loses channels of its stages at once; expected 1"),
        (VIT, "{kind: pruned, hidden_sizes: [8, 8]}", "hidden_sizes: a teacher of kind vit has no stages"),
    ],
)  # fmt: skip
def test_of_a_teacher_that_the_recipe_describes_the_same_is_known_from_the_recipe(
    taught: str, model: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        load_recipe(DIGITS, (taught, f"sweep.students=[{{name: a, model: {model}}}]", "tune={}"))


def test_a_student_is_pruned_distilled_and_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a live teacher, whose running statistics stay as they are."""
    taught = ResNet(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1))
    monkeypatch.setitem(distill_world.TEACHERS, "digits", taught)
    world = distill_world.make("digits", Store(str(tmp_path)))
    model = {"kind": "pruned", "hidden_sizes": [4, 8], "rows": 16}
    students = [student(model, name="half", teacher="live")]
    context = world.context("sweep", sweep={**SWEEP, "students": students})
    job = job_of(context, "half")
    first = StudentTrainer(job)
    assert (first.model.config.hidden_sizes, first.model.config.embedding_size) == ([4, 8], 4)
    first.run_to_validation()
    first.checkpoint_writer.wait()
    teacher = load_model(job.trained.local() / "model").state_dict()
    assert isinstance(first.objective, LiveTeacherObjective)
    for name, value in first.objective.teacher.state_dict().items():
        assert torch.equal(value, teacher[name])
    second, whole = StudentTrainer(job), StudentTrainer(job_of(context, "half"))
    assert second.resumed_step == 7
    assert to_end(second) == to_end(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_searches_the_widths_of_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught = ResNet(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1))
    monkeypatch.setitem(distill_world.TEACHERS, "digits", taught)
    world = distill_world.make("digits", Store(str(tmp_path)))
    students = [student({"kind": "pruned", "hidden_sizes": [8, 8], "rows": 16}, name="base", teacher="live")]
    tune = {"space": {"hidden_sizes": {"kind": "choice", "values": [[4, 8], [8, 12]]}}}
    context = world.context("sweep", sweep={**SWEEP, "students": students}, tune=tune)
    assert sweep(context)["trials"] == 2
    trials = json.loads((Path(context.draft.uri) / "trials.json").read_text())["trials"]
    found = {tuple(trial["values"]["hidden_sizes"]): trial["parameters"] for trial in trials}
    shape = shape_of(Manifest.read(world.artifacts["prepare"]))
    for widths, parameters in found.items():
        assert parameters == student_size(Pruned(hidden_sizes=widths), taught, shape).parameters
    assert found.keys() == {(4, 8), (8, 12)}


@pytest.mark.parametrize("taught", ["resnet", "vit"])
def test_states_of_convolutional_models_are_not_compared(
    taught: str, digits_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = ResNet(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1))
    world, who = digits_world, "student"
    if taught == "resnet":
        monkeypatch.setitem(distill_world.TEACHERS, "digits", fresh)
        world, who = distill_world.make("digits", Store(str(tmp_path))), "teacher"
    students = [student(fresh.model_dump(mode="json"), name="alike", states={"weight": 1.0})]
    context = world.context("sweep", sweep={**SWEEP, "students": students})
    with pytest.raises(InputError, match=f"student alike: relations, states: a {who} of the family resnet has no lay"):
        StudentTrainer(job_of(context, "alike"))
