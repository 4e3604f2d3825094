"""Families of encoders, by one test each for all: sizes, memory, starts from directories, layers, exports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from overproof.config import AttentionRelationLoss, HiddenStateLoss, Pretrained, TeacherLayers, Train
from overproof.data.manifest import Manifest
from overproof.distill.feature_losses import capture_layers, relation_loss
from overproof.distill.losses import Divergence
from overproof.distill.objectives import DistillObjective, LiveTeacherObjective
from overproof.distill.pruning import keep_layers
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.errors import InputError
from overproof.export import stage
from overproof.export.onnx_file import Reference, export_onnx
from overproof.export.onnx_int8 import quantize_onnx, quantize_onnx_static, require_same_numbers
from overproof.models import zero_memory
from overproof.models.base import class_order, shape_of
from overproof.models.encoder import Encoder, EncoderFamily, encoder_inputs
from overproof.models.hf_directory import (
    build_model,
    count_parameters,
    load_model,
    load_start,
    require_outputs,
    save_model,
)
from overproof.models.sizes import model_size, student_size
from overproof.registry import FAMILIES, FORMATS, TASKS
from overproof.train.objective import CrossEntropy, Objective

FAMILY = {kind: family for kind, family in FAMILIES.items() if isinstance(family, EncoderFamily)}
LENGTH, VOCABULARY, CLASSES = 16, 200, ["animal", "food", "plant"]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "layers": 3, "heads": 4, "initializer_range": 0.2}
OWN = {  # so small that rows of this length come to their ends
    "modernbert": {"local_attention": 8, "global_every": 2},
    "deberta_v2": {"position_buckets": 8},
}


def manifest(classes: list[str] = CLASSES, length: int = LENGTH, vocabulary: int = VOCABULARY) -> Manifest:
    details = {"classes": classes, "sequence_length": length, "vocabulary": vocabulary, "padding": 1}
    return Manifest(
        task="text_classification", columns=(), splits={}, rows_per_group=4, positions=1, outputs=len(classes),
        details=details,
    )  # fmt: skip


def section(kind: str, **changes: Any) -> Encoder:
    found: Encoder = FAMILY[kind].section.model_validate(SHAPE | OWN.get(kind, {}) | changes)
    return found


def tokens(rows: int = 4, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    drawn = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    lengths = torch.linspace(length, 3, rows).long()
    return drawn.masked_fill(torch.arange(length) >= lengths[:, None], -1)


def batch(**changes: Any) -> dict[str, torch.Tensor]:
    found = tokens(**changes)
    return {"tokens": found, "label": torch.zeros(len(found), dtype=torch.long)}


def floats_in(file: Path) -> int:
    held = (tensor for tensor in onnx.load(file).graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    return sum(math.prod(tensor.dims) for tensor in held)


def logits(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return TASKS["text_classification"].predict(model, given).logits_BPV[:, 0]


@pytest.mark.parametrize("kind", FAMILY)
def test_a_model_has_the_size_that_is_planned_and_survives_its_directory(kind: str, tmp_path: Path) -> None:
    model = build_model(section(kind), manifest(), 0).eval()
    planned = model_size(section(kind), shape_of(manifest()))
    assert sorted(planned.tensors) == sorted(p.numel() for p in model.parameters())
    save_model(model, model.config, tmp_path / "model")
    assert model_size(Pretrained(path=str(tmp_path / "model")), shape_of(manifest())) == planned
    assert torch.equal(logits(load_model(tmp_path / "model"), batch()), logits(model, batch()))
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.allclose(auto(**encoder_inputs(tokens())).logits, logits(model, batch()), atol=1e-5)
    assert [auto.config.id2label[number] for number in range(3)] == CLASSES


@pytest.mark.parametrize("kind", FAMILY)
def test_what_lies_beyond_a_text_has_no_part_in_its_answer(kind: str) -> None:
    model = build_model(section(kind), manifest(), 0).eval()
    whole = logits(model, batch())
    for row in range(4):
        alone = tokens()[row]
        short = alone[alone != -1][None]
        found = logits(model, {"tokens": short, "label": torch.zeros(1, dtype=torch.long)})
        torch.testing.assert_close(found[0], whole[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILY)
def test_a_base_gets_a_head_of_the_datas_classes_and_positions_of_the_rows(kind: str, tmp_path: Path) -> None:
    """Its other weights stay, and what is fresh is a function of the seed."""
    classifier = build_model(section(kind), manifest(["x", "y"], 2 * LENGTH), 0)
    base = classifier.base_model
    base.config.architectures = [f"{FAMILY[kind].prefix}Model"]
    base.save_pretrained(tmp_path / "base")
    one, same, other = (load_start(tmp_path / "base", manifest(), seed) for seed in (1, 1, 2))
    assert type(one).__name__ == FAMILY[kind].architectures[0]
    assert FAMILY[kind].width(one.config) == LENGTH
    assert logits(one, batch()).shape == (4, 3)
    head = f"{FAMILY[kind].names.output}.weight"
    fresh = one.state_dict()
    assert not torch.equal(fresh[head], other.state_dict()[head])
    for name, value in same.state_dict().items():
        assert torch.equal(fresh[name], value), name
    for name, value in base.state_dict().items():
        kept = fresh[f"{classifier.base_model_prefix}.{name}"]
        assert torch.equal(kept, value[: len(kept)]), name
    planned = model_size(Pretrained(path=str(tmp_path / "base")), shape_of(manifest()))
    assert planned.parameters == count_parameters(one)
    states = (each.base_model(**encoder_inputs(tokens())).last_hidden_state for each in (base.eval(), one.base_model))
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILY)
def test_a_head_stays_where_it_is_of_the_datas_classes(kind: str, tmp_path: Path) -> None:
    model = build_model(section(kind), manifest(), 0).eval()
    save_model(model, model.config, tmp_path / "model")
    assert torch.equal(logits(load_start(tmp_path / "model", manifest(), 1), batch()), logits(model, batch()))
    for classes in (["food", "animal", "stone"], ["animal", "food"]):
        found = load_start(tmp_path / "model", manifest(classes), 1)
        assert logits(found, batch()).shape == (4, len(classes))
        head = f"{FAMILY[kind].names.output}.weight"
        assert not torch.equal(found.state_dict()[head], model.state_dict()[head][: len(classes)])
        with pytest.raises(InputError, match=r"no output layer for the classes .* \(its own: animal, food, plant\)"):
            require_outputs(tmp_path / "model", manifest(classes))
    other = load_start(tmp_path / "model", manifest(["food", "animal", "plant"]), 1)
    require_outputs(tmp_path / "model", manifest(["food", "animal", "plant"]))
    assert torch.equal(logits(other, batch()), logits(model, batch())[:, [1, 0, 2]])
    assert other.config.id2label == {0: "food", 1: "animal", 2: "plant"}


def test_classes_without_names_are_those_that_are_numbered_alike() -> None:
    unnamed = ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert class_order(unnamed, CLASSES) is None
    assert class_order(unnamed, ["0", "1", "2"]) == [0, 1, 2]
    assert class_order(unnamed, ["1", "2", "3"]) is None
    assert class_order(["negative", "positive"], ["positive", "negative"]) == [1, 0]
    assert class_order(["a", "a"], ["a", "b"]) is None
    assert class_order([], CLASSES) is None


@pytest.mark.parametrize("kind", FAMILY)
def test_a_directory_that_cannot_take_the_rows_is_refused(kind: str, tmp_path: Path) -> None:
    model = build_model(section(kind), manifest(), 0)
    save_model(model, model.config, tmp_path / "model")
    for asked, words in (
        (manifest(length=17), "the model takes 16 tokens at most; data.sequence_length is 17"),
        (manifest(vocabulary=201), "the model has 200 embeddings; the data's tokenizer has 201 entries"),
    ):
        with pytest.raises(InputError, match=words):
            load_start(tmp_path / "model", asked, 0)
        with pytest.raises(InputError, match=words):
            model_size(Pretrained(path=str(tmp_path / "model")), shape_of(asked))
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"vocab_size": 210}))
    with pytest.raises(InputError, match=r"weights do not fit config\.json: mismatched keys"):
        load_start(tmp_path / "model", manifest(), 0)


@pytest.mark.parametrize("kind", FAMILY)
def test_layers_are_dropped(kind: str, tmp_path: Path) -> None:
    model = build_model(section(kind), manifest(), 0).eval()
    save_model(model, model.config, tmp_path / "model")
    smaller = keep_layers(model, (0, 2)).eval()
    planned = student_size(TeacherLayers(layers=2), Pretrained(path=str(tmp_path / "model")), shape_of(manifest()))
    assert planned.parameters == count_parameters(smaller)
    layers = model.get_submodule(FAMILY[kind].names.layers)
    del layers[1]
    torch.testing.assert_close(logits(smaller, batch()), logits(model, batch()))
    save_model(smaller, smaller.config, tmp_path / "smaller")
    assert torch.equal(logits(load_model(tmp_path / "smaller"), batch()), logits(smaller, batch()))


@pytest.mark.parametrize("kind", FAMILY)
def test_a_layers_features_are_there_to_learn_from(kind: str) -> None:
    model, names = build_model(section(kind), manifest(), 0).eval(), FAMILY[kind].names
    assert model.get_submodule(names.embeddings).weight.shape == (VOCABULARY, 32)
    with capture_layers(model, {0, 2}) as found:
        logits(model, batch())
    for layer in (0, 2):
        assert [part.shape for part in found[layer]] == [(4, LENGTH, 32)] * 4
        for name in names.feed_forward:
            assert model.get_submodule(f"{names.layers}.{layer}.{name}").weight.ndim == 2
    mask = TASKS["text_classification"].segments(batch(), found[0].states)
    assert mask.sum(1).tolist() == (tokens() != -1).sum(1).tolist()
    assert float(relation_loss(found[0], found[0], 4, mask)) == pytest.approx(0, abs=1e-5)
    assert float(relation_loss(found[0], found[2], 4, mask)) > 0


@pytest.mark.parametrize("kind", FAMILY)
def test_exports_are_the_model_and_int8_holds_its_embeddings(kind: str, tmp_path: Path) -> None:
    model = build_model(section(kind), manifest(), 0).eval()
    save_model(model, model.config, tmp_path / "model")
    fp32, int8 = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    export_onnx(tmp_path / "model", fp32)
    stage.require_same_model(FORMATS["onnx"], tmp_path / "model", fp32)
    quantize_onnx(fp32, int8)
    rows = tokens(7).numpy().astype(np.float32)
    expected = logits(model, batch(rows=7)).log_softmax(-1).numpy()
    for count in (1, 3, 7):
        np.testing.assert_allclose(OnnxRuntime(fp32).logprobs(rows[:count]), expected[:count], atol=1e-5)
    for length in (1, 2, LENGTH - 1):  # what lies beyond the longest text is not computed
        cut = np.where(np.arange(LENGTH) < length, np.abs(rows), -1).astype(np.float32)
        with torch.inference_mode():
            padded = FAMILY[kind].flat_logprobs(model, torch.from_numpy(cut)).numpy()
        np.testing.assert_allclose(OnnxRuntime(fp32).logprobs(cut), padded, atol=1e-5)
    assert OnnxRuntime(int8).width == LENGTH
    one = np.concatenate([OnnxRuntime(int8).logprobs(row[None]) for row in rows])
    np.testing.assert_allclose(one, np.concatenate([Reference(int8)(row[None]) for row in rows]), atol=1e-3)
    assert (one.argmax(1) == expected.argmax(1)).mean() > 0.5
    tables = {t.name: t for t in onnx.load(int8).graph.initializer if list(t.dims) == [VOCABULARY, 32]}
    assert [t.data_type for t in tables.values()] == [onnx.TensorProto.UINT8]
    assert floats_in(int8) < 0.1 * floats_in(fp32)
    static = tmp_path / "static.onnx"
    quantize_onnx_static(fp32, static, (row[None] for row in tokens(16).numpy().astype(np.float32)), full_range=False)
    for made in (int8, static):
        require_same_numbers(made, fp32)
    nats = np.abs(OnnxRuntime(static).logprobs(rows) - expected)
    assert nats.mean() < 0.2
    assert OnnxRuntime(static).width == LENGTH


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", FAMILY)
def test_activations_are_what_autograd_keeps(kind: str, precision: str) -> None:
    """Beside the mask, which all layers share. The logits and their log-softmax are kept by the loss."""
    train = Train.model_validate(
        {"model": section(kind), "steps": 1, "batch_size": 64, "learning_rate": 1e-3, "workers": 1,
         "precision": precision, "zero_stage": 1}
    )  # fmt: skip
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = build_model(section(kind), manifest(), 0).to(dtype)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, dict[int, torch.Tensor]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights and tensor.is_floating_point():
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        TASKS["text_classification"].predict(model, batch(rows=64))
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    size = model_size(section(kind), shape_of(manifest()))
    logits_bytes = 64 * zero_memory.logits_memory(size.outputs, dtype.itemsize)
    assert found == pytest.approx(zero_memory.activation_memory(size, train, 1) - logits_bytes, rel=0.05)


def curves(model: Any, objective: Objective, more: tuple[torch.Tensor, ...] = ()) -> dict[str, list[float]]:
    """Of a few steps on the same rows: the loss, and what else the objective tells."""
    optimizer = torch.optim.AdamW([*model.parameters(), *more], lr=2e-3)
    rows = batch(rows=12) | {"label": torch.arange(12) % 3}
    found: dict[str, list[float]] = {}
    for _ in range(8):
        loss, scalars = objective.loss(model.train(), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in {"loss": loss.detach(), **scalars}.items():
            found.setdefault(name, []).append(float(value))
    return found


def learn_features(teacher: Any, student: Any) -> dict[str, list[float]]:
    """From logits, relations and states of a live teacher."""
    task, projection = TASKS["text_classification"], torch.nn.Linear(student.config.hidden_size, 32)
    inner = DistillObjective(task.predict, 2.0, 0.5, (), Divergence())
    live = LiveTeacherObjective(
        task, teacher.requires_grad_(False), inner, True, AttentionRelationLoss(heads=4, weight=1.0),
        HiddenStateLoss(weight=0.1, teacher_layer=1), projection,
    )  # fmt: skip
    return curves(student, live, tuple(projection.parameters()))


@pytest.mark.parametrize("kind", FAMILY)
def test_teachers_and_students_of_fewer_layers_or_narrower_ones_learn(kind: str) -> None:
    teacher = build_model(section(kind), manifest(), 0)
    losses = curves(teacher, CrossEntropy(TASKS["text_classification"].predict))["loss"]
    assert losses[-1] < 0.9 * losses[0]
    teacher.eval()
    for student in (keep_layers(teacher, (0, 2)), build_model(section(kind, hidden_size=16, layers=1), manifest(), 1)):
        found = learn_features(teacher, student)
        for name in ("loss", "relations", "states"):
            assert found[name][-1] < found[name][0], name


def test_a_student_of_another_family_learns_from_features() -> None:
    teacher, student = (build_model(section(kind), manifest(), 0) for kind in ("deberta_v2", "modernbert"))
    found = learn_features(teacher.eval(), student)
    assert found["relations"][-1] < found["relations"][0]


def test_deberta_shows_the_queries_of_its_places() -> None:
    """Its projections are asked about relative positions, too, and share their weights with those of places."""
    model = build_model(section("deberta_v2"), manifest(), 0).eval()
    with capture_layers(model, {0, 1}) as found:
        logits(model, batch())
    attention = model.deberta.encoder.layer[1].attention.self
    for part, module in zip(found[1].attention, (attention.query_proj, attention.key_proj, attention.value_proj),
                            strict=True):  # fmt: skip
        with torch.inference_mode():
            torch.testing.assert_close(part, module(found[0].states))


def test_deberta_of_shorter_rows_tells_distances_as_before(tmp_path: Path) -> None:
    """A directory need not say which distance is the farthest: the longest row does."""
    model = build_model(section("deberta_v2"), manifest(length=64), 0).eval()
    model.config.max_relative_positions = -1
    save_model(model, model.config, tmp_path / "model")
    fitted = load_start(tmp_path / "model", manifest(), 0)
    assert (fitted.config.max_position_embeddings, fitted.config.max_relative_positions) == (LENGTH, 64)
    torch.testing.assert_close(logits(fitted, batch()), logits(load_model(tmp_path / "model"), batch()))


def test_deberta_with_a_convolution_is_exported(tmp_path: Path) -> None:
    """As DeBERTa-v2 xlarge has it beside its first layer."""
    config = build_model(section("deberta_v2"), manifest(), 0).config
    config.conv_kernel_size, config.conv_act = 3, "gelu"
    model = FAMILY["deberta_v2"].model_class()(config).eval()
    save_model(model, model.config, tmp_path / "model")
    planned = model_size(Pretrained(path=str(tmp_path / "model")), shape_of(manifest()))
    assert planned.parameters == count_parameters(model)
    export_onnx(tmp_path / "model", tmp_path / "fp32.onnx")
    expected = logits(model, batch()).log_softmax(-1).numpy()
    found = OnnxRuntime(tmp_path / "fp32.onnx").logprobs(tokens().numpy().astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "value"), [("share_att_key", False), ("pos_att_type", "c2p"), ("position_buckets", -1)]
)
def test_what_is_no_deberta_v2_is_refused(setting: str, value: Any, tmp_path: Path) -> None:
    model = build_model(section("deberta_v2"), manifest(), 0)
    save_model(model, model.config, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {setting: value}))
    words = f"config.json: {setting}: found {value!r}; expected it as DeBERTa-v2 and v3 have it"
    with pytest.raises(InputError, match=words):
        model_size(Pretrained(path=str(tmp_path)), shape_of(manifest()))


def test_modernbert_keeps_what_each_layer_looks_at() -> None:
    """Local layers stay local wherever they are put; the first has no norm, so none takes its place."""
    model = build_model(section("modernbert", layers=4), manifest(), 0)
    kinds = ["full_attention", "sliding_attention"] * 2
    assert model.config.layer_types == kinds
    smaller = keep_layers(model, (0, 1, 3))
    assert smaller.config.layer_types == [kinds[0], kinds[1], kinds[3]]
    assert [layer.attention_type for layer in smaller.model.layers] == smaller.config.layer_types
    with pytest.raises(InputError, match=r"layers \[1, 3\]: the first layer .* expected layer 0 among them"):
        keep_layers(model, (1, 3))


def test_modernberts_local_layers_see_no_farther() -> None:
    model = build_model(section("modernbert", layers=2, global_every=3), manifest(), 0).eval()
    with capture_layers(model, {0, 1}) as found:
        logits(model, batch())
    attention = model.model.layers[1].attn
    assert attention.sliding_window == 5  # four on each side, and itself
    layer = model.model.layers[1]
    states = found[0].states[:1]
    mask = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() <= 4
    turned = model.model.rotary_emb(states, torch.arange(LENGTH)[None], "sliding_attention")
    with torch.inference_mode():
        expected = layer(states, attention_mask=mask[None, None], position_embeddings=turned)
    torch.testing.assert_close(found[1].states[:1], expected, atol=1e-5, rtol=1e-4)
