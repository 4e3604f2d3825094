"""Several classifiers as one: what it answers is the mean of what they do, wherever it is asked, and it ships as any
model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_runner import artifact_of, run
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from made_tokenizers import byte_level
from overproof.artifacts import Artifact
from overproof.cli.main import main
from overproof.config import Pretrained, Recipe
from overproof.config.student_models import Pruned, TeacherLayers
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.errors import InputError
from overproof.evaluate.metrics import Report
from overproof.evaluate.stage import evaluate_exports
from overproof.export import stage
from overproof.export.onnx_file import export_onnx
from overproof.export.stage import export_models
from overproof.models.base import shape_of
from overproof.models.ensemble_module import combined
from overproof.models.hf_directory import load_model, load_start, require_outputs, save_model
from overproof.models.sizes import student_size
from overproof.registry import FAMILIES, FORMATS
from overproof.train.ensemble import likeliest_mixture, write_ensemble

WEIGHTS = (0.5, 0.3, 0.2)


def text_manifest(length: int, classes: list[str]) -> Manifest:
    details = {"classes": classes, "sequence_length": length, "vocabulary": 60, "padding": 0}
    return Manifest(
        task="text_classification", columns=(), splits={}, rows_per_group=4, positions=1, outputs=len(classes),
        details=details,
    )  # fmt: skip


def members(digits: dict[str, Artifact]) -> list[Path]:
    sweep = digits["sweep"].local()
    return [digits["train"].local() / "model", sweep / "students/student", sweep / "control"]


def probabilities(digits: dict[str, Artifact]) -> np.ndarray:
    """Of each member on the test images."""
    shards = Shards(digits["prepare"].local(), "test")
    pixels = torch.from_numpy(shards.take(np.arange(shards.rows))["pixels"])
    with torch.inference_mode():
        return np.stack([load_model(m)(pixel_values=pixels).logits.softmax(-1).numpy() for m in members(digits)])


@pytest.mark.parametrize("combine", ["probabilities", "logits", "votes"])
def test_it_answers_as_its_members_do_together(digits: dict[str, Artifact], tmp_path: Path, combine: str) -> None:
    write_ensemble(members(digits), tmp_path / "both", combine, WEIGHTS)  # type: ignore[arg-type]
    shards, each_MBV = Shards(digits["prepare"].local(), "test"), probabilities(digits)
    pixels = torch.from_numpy(shards.take(np.arange(shards.rows))["pixels"])
    model = load_model(tmp_path / "both")
    with torch.inference_mode():
        found = model(pixel_values=pixels).logits.softmax(-1).numpy()
    weights = np.array(WEIGHTS)[:, None, None]
    if combine == "probabilities":
        expected = (weights * each_MBV).sum(0)
    elif combine == "logits":
        product = np.exp((weights * np.log(each_MBV)).sum(0))
        expected = product / product.sum(1, keepdims=True)
    else:
        expected = (weights * (each_MBV == each_MBV.max(-1, keepdims=True))).sum(0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    export_onnx(tmp_path / "both", tmp_path / "both.onnx")
    stage.require_same_model(FORMATS["onnx"], tmp_path / "both", tmp_path / "both.onnx")
    asked = OnnxRuntime(tmp_path / "both.onnx").logprobs(pixels[:20].flatten(1).numpy())
    np.testing.assert_allclose(np.exp(asked), expected[:20], atol=1e-4)


def test_labels_are_averaged_by_their_probability() -> None:
    both = [torch.tensor([[0.2, 0.8]]).log(), torch.tensor([[0.6, 0.4]]).log()]
    np.testing.assert_allclose(combined(both, (0.5, 0.5), "probabilities").exp().numpy(), [[0.4, 0.6]], atol=1e-6)


@pytest.mark.parametrize("combine", ["probabilities", "logits", "votes"])
def test_texts_of_several_families(tmp_path: Path, combine: Any) -> None:
    """BERT and DistilBERT, of one tokenizer: rows as short as their texts, several classes at once."""
    shared = {"vocab_size": 60, "max_position_embeddings": 16, "num_labels": 3}
    made = {
        "bert": BertForSequenceClassification(
            BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, **shared,
                       problem_type="multi_label_classification", initializer_range=0.3)),
        "distil": DistilBertForSequenceClassification(
            DistilBertConfig(dim=32, hidden_dim=48, n_layers=1, n_heads=2, **shared,
                             problem_type="multi_label_classification", initializer_range=0.3)),
    }  # fmt: skip
    for name, model in made.items():
        save_model(model.eval(), model.config, tmp_path / name)
    write_ensemble([tmp_path / name for name in made], tmp_path / "both", combine, (0.25, 0.75))
    export_onnx(tmp_path / "both", tmp_path / "both.onnx")
    stage.require_same_model(FORMATS["onnx"], tmp_path / "both", tmp_path / "both.onnx")
    rows = np.full((2, 16), -1, np.float32)
    rows[0, :9], rows[1, :4] = np.arange(9), np.arange(10, 14)
    with torch.inference_mode():
        each = [
            FAMILIES[kind].flat_logprobs(load_model(tmp_path / name), torch.from_numpy(rows)).exp().numpy()  # type: ignore[attr-defined]
            for kind, name in (("bert", "bert"), ("distilbert", "distil"))
        ]
    found = np.exp(OnnxRuntime(tmp_path / "both.onnx").logprobs(rows))
    if combine == "probabilities":
        expected = 0.25 * each[0] + 0.75 * each[1]
    elif combine == "votes":
        expected = 0.25 * (each[0] > 0.5) + 0.75 * (each[1] > 0.5)
    else:
        odds = (each[0] / (1 - each[0])) ** 0.25 * (each[1] / (1 - each[1])) ** 0.75
        expected = odds / (1 + odds)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    model, ids = load_model(tmp_path / "both"), torch.from_numpy(rows[:1, :9]).long()
    with torch.inference_mode():
        odds = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sigmoid().numpy()
    np.testing.assert_allclose(odds, found[:1], atol=1e-4)


def test_a_text_teacher_is_fitted_to_the_data(tmp_path: Path) -> None:
    """As each of its members would be: a shorter table of positions, and the data's order of classes."""
    manifest = text_manifest(length=12, classes=["no", "yes", "maybe"])
    names, made = ["yes", "maybe", "no"], []
    for number in range(2):
        torch.manual_seed(number)
        config = BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=60,
            max_position_embeddings=40, id2label=dict(enumerate(names)), initializer_range=0.3,
            label2id={name: place for place, name in enumerate(names)},
        )  # fmt: skip
        model = BertForSequenceClassification(config).eval()
        save_model(model, model.config, tmp_path / f"m{number}")
        (tmp_path / f"m{number}" / "tokenizer.json").write_text(byte_level())
        made.append(tmp_path / f"m{number}")
    write_ensemble(made, tmp_path / "both", "probabilities", (0.5, 0.5))
    assert (tmp_path / "both/tokenizer.json").is_file()
    require_outputs(tmp_path / "both", manifest)
    started = load_start(tmp_path / "both", manifest, 0).eval()
    save_model(started, started.config, tmp_path / "taken")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.inference_mode():
        found = load_model(tmp_path / "taken")(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.softmax(-1)
        each = [
            load_start(path, manifest, 0).eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.softmax(-1)
            for path in made
        ]
    np.testing.assert_allclose(found, (each[0] + each[1]) / 2, atol=1e-5)
    assert FAMILIES["ensemble"].width(started.config) == 12  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="has no output layer for the classes red, green, blue"):
        require_outputs(tmp_path / "both", text_manifest(length=12, classes=["red", "green", "blue"]))
    teacher, shape = Pretrained(path=str(tmp_path / "taken")), shape_of(manifest)
    assert student_size(teacher, teacher, shape).layers == 2
    for section in (TeacherLayers(layers=1), Pruned(layers=1)):
        with pytest.raises(InputError, match="a teacher of the family ensemble has no layers of its own"):
            student_size(section, teacher, shape)


def test_weights_are_the_likeliest() -> None:
    generator = np.random.default_rng(0)
    truth = np.where(generator.random(4000) < 0.7, 0, 1)  # which of two members knows
    logprobs_MN = np.log(np.where(truth == np.arange(2)[:, None], 0.9, 0.05))
    assert likeliest_mixture(logprobs_MN) == pytest.approx([0.7, 0.3], abs=0.05)

    def likelihood(weights: np.ndarray, values: np.ndarray) -> float:
        return float(np.log((weights[:, None] * values).sum(0)).mean())

    values = generator.dirichlet((4, 2, 1), 500).T
    found, best = likeliest_mixture(np.log(values)), -np.inf
    for weights in generator.dirichlet(np.ones(3), 500):
        best = max(best, likelihood(weights, values))
    assert likelihood(found, values) >= best - 1e-6


@pytest.mark.usefixtures("ray_cluster")
def test_as_a_teacher_it_is_measured_quantised_and_may_ship(
    make_recipe: Callable[..., Recipe], digits: dict[str, Artifact], tmp_path: Path
) -> None:
    asked = make_recipe("digits")
    asked = asked.model_copy(update={"compress": asked.compress.model_copy(update={"teacher": True})})

    def teacher(folder: Path) -> None:
        write_ensemble(members(digits), folder / "model", "probabilities", WEIGHTS)
        (folder / "curve.jsonl").touch()

    parents = {name: digits[name] for name in ("prepare", "sweep")}
    parents["train"] = artifact_of("train", teacher, tmp_path)
    parents["compress"] = run(export_models, asked, parents, tmp_path)
    evaluated = run(evaluate_exports, asked, parents, tmp_path)
    report = Report.model_validate_json((evaluated.local() / "report.json").read_bytes())
    shards = Shards(digits["prepare"].local(), "test")
    labels = shards.take(np.arange(shards.rows))["label"]
    mixed = (np.array(WEIGHTS)[:, None, None] * probabilities(digits)).sum(0)
    by_name = {m.name: m for m in report.measured}
    assert by_name["teacher"].metrics["accuracy"].value == pytest.approx((mixed.argmax(1) == labels).mean())
    assert by_name["teacher-int8"].candidate
    assert by_name["teacher-int8"].metrics["accuracy"].value > by_name["teacher"].metrics["accuracy"].value - 0.05
    assert by_name["teacher-int8"].metrics["parity_nats"].value < 0.05


def test_what_does_not_go_together_is_refused(
    digits: dict[str, Artifact], text: dict[str, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = members(digits)[:2]
    assert main(["ensemble", str(tmp_path / "both"), str(one), str(other)]) == 0
    assert "50.0 %" in capsys.readouterr().out
    assert main(["ensemble", str(tmp_path / "both"), str(one), str(other)]) == 2
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(InputError, match="found 1; expected 2 or more"):
        write_ensemble([one], tmp_path / "new", "votes", (1.0,))
    with pytest.raises(InputError, match=r"a llama does not go with .*expected classifiers of"):
        write_ensemble([one, text["train"].local() / "model"], tmp_path / "new", "votes", (0.5, 0.5))
    renamed = load_model(other)
    renamed.config.id2label = {number: f"other {number}" for number in range(10)}
    save_model(renamed, renamed.config, tmp_path / "renamed")
    with pytest.raises(InputError, match="id2label is not that of"):
        write_ensemble([one, tmp_path / "renamed"], tmp_path / "new", "votes", (0.5, 0.5))
    assert not (tmp_path / "new").exists()
    assert json.loads((tmp_path / "both/config.json").read_text())["architectures"] == ["OverproofEnsemble"]
