"""Texts with several classes each: rows, losses, metrics, exports, errors, and one model through all of it."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from tokenizers import Tokenizer
from torch.nn.functional import binary_cross_entropy_with_logits

from finished import RECIPES
from overproof.artifacts import Store
from overproof.config import Dense, Optimization, Pretrained, Recipe, TeacherLayers, load_recipe
from overproof.data.manifest import SPLITS, TOKENIZER, Manifest
from overproof.data.order import Order
from overproof.data.parquet_reader import Shards
from overproof.data.prepare import prepare
from overproof.distill.cache_checks import check_rows
from overproof.distill.losses import Divergence, distillation_loss
from overproof.distill.target_cache import TargetCache, TargetIndex, target_key
from overproof.distill.target_codec import TargetLayout
from overproof.distill.target_encoder import encode_targets
from overproof.distill.teacher_pool import finished_files, write_index
from overproof.distill.teacher_worker import CaptureJob, TargetWorker
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.errors import InputError
from overproof.evaluate.metrics import Bootstrap, PerExampleSums, further_metrics, quality_metrics
from overproof.export.onnx_file import Reference, export_onnx
from overproof.export.onnx_int8 import quantize_onnx
from overproof.models.base import shape_of
from overproof.models.bert import Bert
from overproof.models.hf_directory import build_model, count_parameters, load_model, load_start, save_model, to_tensors
from overproof.models.sizes import model_size, student_size
from overproof.registry import FORMATS, TASKS
from overproof.stage_context import StageContext, no_progress
from overproof.tasks.base import agreements
from overproof.tasks.class_metrics import calibration_error
from overproof.tasks.label_metrics import LABEL_METRICS, MICRO_F1, label_columns
from overproof.tasks.multi_label_text_classification import TASK
from overproof.train.engine import TorchEngine
from overproof.train.loop import fit, validation_loss
from overproof.train.objective import CrossEntropy
from text_classes import WORDS, texts_of_several, write_jsonl

KIND = "multi_label_text_classification"
TEXTS = texts_of_several()
SIZES = "sequence_length: 24, validation_fraction: 0.1, test_fraction: 0.2, shards: 1, rows_per_group: 4"
SMALL = Bert(hidden_size=16, intermediate_size=16, layers=3, heads=2, initializer_range=0.3)


def recipe(folder: Path, source: str, *changes: str, more: str = "") -> Recipe:
    data = f"data={{kind: {KIND}, source: {source}, tokenizer: {{kind: bpe, vocab_size: 384}}, {SIZES}{more}}}"
    return load_recipe(RECIPES / "minilm-topics.yaml", (f"store={folder}/store", data, *changes))


def prepared(asked: Recipe) -> Path:
    name = hashlib.sha256(str(asked).encode()).hexdigest()
    draft = Store(asked.store).new_writer(asked.name, "prepare", name, {}, {})
    prepare(StageContext(asked, {}, draft, no_progress))
    return Path(draft.uri)


def jsonl(folder: Path, texts: Any = TEXTS) -> str:
    return f"{{kind: jsonl, path: {write_jsonl(folder / 't.jsonl', texts)}}}"


def rows_of(root: Path, split: str) -> dict[str, Any]:
    shards = Shards(root, split)
    return shards.take(np.arange(shards.rows))


def test_lists_and_separated_classes_give_the_same_shards(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, "; ".join(names)) for text, names in TEXTS)])
    pq.write_table(pa.table({"text": [t for t, _ in TEXTS], "label": [n for _, n in TEXTS]}), tmp_path / "t.parquet")
    twice = [*TEXTS, *TEXTS[:5], ("unsure", ["food"]), ("unsure", ["food", "plant"])]
    roots = [
        prepared(recipe(tmp_path, jsonl(tmp_path, twice))),
        prepared(recipe(tmp_path, f"{{kind: csv, path: {tmp_path}/t.csv}}", more=", separator: ;")),
        prepared(recipe(tmp_path, f"{{kind: parquet, path: {tmp_path}/t.parquet}}")),
    ]
    manifest = Manifest.read(roots[0])
    assert manifest.dropped == {"duplicates": 6, "texts whose classes differ": 1}
    assert (manifest.positions, manifest.outputs, manifest.details["classes"]) == (3, 2, list(WORDS))
    tokenizer = Tokenizer.from_file(str(roots[0] / TOKENIZER))
    names_of = {tuple(tokenizer.encode(text).ids): names for text, names in TEXTS}
    for split in SPLITS:
        first = rows_of(roots[0], split)
        for root in roots[1:]:
            for name, values in rows_of(root, split).items():
                np.testing.assert_array_equal(values, first[name])
        assert first["label"].shape[1:] == (3,)
        for tokens_T, there_V in zip(first["tokens"], first["label"], strict=True):
            names = [name for name, there in zip(WORDS, there_V, strict=True) if there]
            assert names == names_of[tuple(tokens_T[tokens_T != -1])]
        assert manifest.splits[split].predictions == 3 * manifest.splits[split].rows
        share = [sum(name in names for _, names in TEXTS) / len(TEXTS) for name in WORDS]
        np.testing.assert_allclose(first["label"].mean(0), share, atol=0.15)  # every class has about its own
    asked = recipe(tmp_path, jsonl(tmp_path))
    assert TASK.shape(asked.data).positions == 3


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("food", r"line 121: the classes are 'food', str; expected a list of them, \[\] for none; .*data\.separator"),
        (3, r"line 121: the classes are 3, int; expected a list"),
        (None, r"line 121: the classes are missing; expected a list"),
        (["food", ""], r"line 121, class 2 of 2: there is no class; expected its name or number"),
        ([["food"]], r"line 121, class 1 of 1: the class is list; expected its name or number"),
    ],
)
def test_what_is_no_list_of_classes_is_named(label: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        prepared(recipe(tmp_path, jsonl(tmp_path, [*TEXTS, ("one more", label)])))


def test_classes_that_cannot_be_learned_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no class but 'food'; expected texts of two classes"):
        prepared(recipe(tmp_path, jsonl(tmp_path, [("a", ["food"]), ("b", [])])))
    with pytest.raises(InputError, match="no text has a class; expected texts of two classes"):
        prepared(recipe(tmp_path, jsonl(tmp_path, [("a", []), ("b", [])])))
    with pytest.raises(InputError, match="class 'alone' has 1 texts, and none falls into the train split"):
        prepared(recipe(tmp_path, jsonl(tmp_path, [*TEXTS, ("rare", ["alone"])]), "data.test_fraction=0.6"))
    with pytest.raises(InputError, match=r"CSV holds no lists; expected what stands between classes"):
        recipe(tmp_path, "{kind: csv, path: t.csv}")
    with pytest.raises(InputError, match=r"line 1, class 2 of 3: there is no class"):
        prepared(recipe(tmp_path, jsonl(tmp_path, [("a", "food;;plant")]), more=", separator: ;"))


@pytest.mark.parametrize("chosen", ["balanced", "{plant: 3.0, food: 0.5}"])
def test_that_a_class_is_there_counts_by_its_weight(chosen: str, tmp_path: Path) -> None:
    """In the labels' loss and in the teacher's."""
    texts = [(text, names) for number, (text, names) in enumerate(TEXTS) if "food" in names or number % 4 == 0]
    root = prepared(recipe(tmp_path, jsonl(tmp_path, texts), more=f", class_weights: {chosen}"))
    columns = rows_of(root, "train")
    there, weight = columns["label"] > 0, columns["weight"]
    np.testing.assert_allclose(weight.mean(0), 1, rtol=1e-5)  # of each class
    for number, name in enumerate(WORDS):
        of_there, of_absent = weight[there[:, number], number], weight[~there[:, number], number]
        if chosen == "balanced":
            assert of_there.sum() == pytest.approx(of_absent.sum())
        else:
            assert of_there[0] / of_absent[0] == pytest.approx({"plant": 3, "food": 0.5}.get(name, 1))
    batch = to_tensors(columns)
    prediction = TASK.predict(build_model(SMALL, Manifest.read(root), 0).eval(), batch)
    logits = prediction.logits_BPV[..., 1]
    expected = binary_cross_entropy_with_logits(logits, batch["label"].float(), weight=batch["weight"])
    found, _ = CrossEntropy(TASK.predict).loss(build_model(SMALL, Manifest.read(root), 0).eval(), batch)
    torch.testing.assert_close(found, expected)
    terms = distillation_loss(
        prediction.logits_BPV, prediction.targets_BP, prediction.mask_BP, None, prediction.logits_BPV, 1.0, 0.25
    )
    torch.testing.assert_close(terms.cross_entropy, expected)
    with pytest.raises(InputError, match=r"data\.class_weights\.fod: there is no such class, nearest is 'food'"):
        prepared(recipe(tmp_path, jsonl(tmp_path, texts), more=", class_weights: {fod: 2.0}"))


def manifest(classes: list[str], **details: Any) -> Manifest:
    found = {"classes": classes, "sequence_length": 16, "vocabulary": 100, "padding": 1, **details}
    kind, positions, outputs = (KIND, len(classes), 2) if details else ("text_classification", 1, len(classes))
    return Manifest(
        task=kind, columns=(), splits={}, rows_per_group=4, positions=positions, outputs=outputs, details=found
    )


SEVERAL = manifest(["a", "b", "c", "d"], **TASKS[KIND].labelling(  # type: ignore[attr-defined]
    TASK.section.model_validate({"kind": KIND, "source": {"kind": "jsonl", "path": "x"}})).details)  # fmt: skip


def batch(rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 100, (rows, 16), generator=generator)
    tokens[rows // 2 :, 9:] = -1
    return {"tokens": tokens, "label": torch.randint(0, 2, (rows, 4), generator=generator)}


def test_losses_are_binary_ones() -> None:
    """Cross-entropy, the divergence at a temperature, and its gradient: of each label by itself."""
    student, teacher = (build_model(SMALL, SEVERAL, seed).eval() for seed in (0, 1))
    given = batch()
    prediction = TASK.predict(student, given)
    logits = prediction.logits_BPV[..., 1]
    expected = binary_cross_entropy_with_logits(logits, given["label"].float())
    found, _ = CrossEntropy(TASK.predict).loss(student, given)
    torch.testing.assert_close(found, expected)
    theirs = TASK.predict(teacher, given).logits_BPV.detach()
    p, q = torch.sigmoid(logits / 2), torch.sigmoid(theirs[..., 1] / 2)
    kl = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
    layout = TargetLayout(Dense(), "label", 4, 2, 2)
    cached = encode_targets(theirs, given["label"], Dense(), (1.0, 2.0))
    assert {name: layout.columns[name] for name in ("label", "logprobs")} == {
        "label": (np.dtype("<u2"), 4), "logprobs": (np.dtype("<f2"), 8)
    }  # fmt: skip
    targets = cached["logprobs"] / 2 - cached["logsumexp"][..., :1]
    terms = distillation_loss(prediction.logits_BPV, given["label"], prediction.mask_BP, None, targets, 2.0, 0.75)
    torch.testing.assert_close(terms.divergence, 4 * kl)
    torch.testing.assert_close(terms.cross_entropy, expected)
    terms.loss.backward()
    ours = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    again = TASK.predict(student, given).logits_BPV[..., 1]
    p = torch.sigmoid(again / 2)
    kl = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
    (3 * kl + 0.25 * binary_cross_entropy_with_logits(again, given["label"].float())).backward()
    for here, there in zip(ours, [p.grad for p in student.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(here, there, atol=1e-6, rtol=1e-4)
    reverse = distillation_loss(
        TASK.predict(student, given).logits_BPV, given["label"], prediction.mask_BP, None, targets, 2.0, 1.0,
        Divergence("reverse_kl"),
    ).divergence  # fmt: skip
    torch.testing.assert_close(reverse, 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())


def test_metrics_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    there, given = (rng.random((50, 6)) < share for share in (0.3, 0.4))
    there[:, 5] = given[:, 5] = False  # neither there nor given
    logprobs = np.log(rng.uniform(0.01, 0.99, (50, 6)).astype(np.float32))
    units, once = label_columns(there, given, logprobs), np.ones((1, 50))
    found = {metric.name: metric.value(units, once)[0] for metric in LABEL_METRICS}
    assert found["macro_f1"] == pytest.approx(f1_score(there[:, :5], given[:, :5], average="macro"))
    assert found["exact_match"] == pytest.approx(accuracy_score(there, given))
    errors = [
        calibration_error({"confidence": np.exp(p), "label": t, "choice": np.ones(50)}, once)[0]
        for p, t in zip(logprobs.T, there.T, strict=True)
    ]  # of each label by itself, as if that it is there were the choice
    assert found["classwise_calibration_error"] == pytest.approx(np.mean(errors))
    total, size = 2 * (there & given).sum(1), there.sum(1) + given.sum(1)
    assert MICRO_F1.value(total.sum(), size.sum()) == pytest.approx(f1_score(there, given, average="micro"))
    counts = np.bincount(rng.integers(0, 50, 50), minlength=50)  # a resample
    repeated = (np.repeat(values[:, :5], counts, 0) for values in (there, given))
    drawn = LABEL_METRICS[0].value(units, counts[None].astype(float))[0]
    assert drawn == pytest.approx(f1_score(*repeated, average="macro"))
    assert MICRO_F1.value(np.array([0.0, 1.0]), np.array([0, 4])).tolist() == [1.0, 0.25]  # nothing there, nothing said


def test_exports_tell_the_probability_of_each_label(tmp_path: Path) -> None:
    model = build_model(SMALL, SEVERAL, 0).eval()
    assert model_size(SMALL, shape_of(SEVERAL)).parameters == count_parameters(model)
    save_model(model, model.config, tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["problem_type"] == "multi_label_classification"
    export_onnx(tmp_path / "model", tmp_path / "fp32.onnx")
    quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    rows = batch()["tokens"].numpy().astype(np.float32)
    logits = TASK.predict(load_model(tmp_path / "model"), batch()).logits_BPV[..., 1]
    expected = torch.nn.functional.logsigmoid(logits).detach().numpy()
    np.testing.assert_allclose(OnnxRuntime(tmp_path / "fp32.onnx").logprobs(rows), expected, atol=1e-5)
    int8 = OnnxRuntime(tmp_path / "int8.onnx").logprobs(rows[:1])
    np.testing.assert_allclose(int8, Reference(tmp_path / "int8.onnx")(rows[:1]), atol=1e-4)
    np.testing.assert_allclose(int8, expected[:1], atol=0.3)


def test_a_head_for_one_class_is_not_one_for_several(tmp_path: Path) -> None:
    single = manifest(["a", "b", "c", "d"])
    for from_, to in ((single, SEVERAL), (SEVERAL, single)):
        model = build_model(SMALL, from_, 0)
        save_model(model, model.config, tmp_path / from_.task)
        same, other = (load_start(tmp_path / from_.task, each, 1).state_dict() for each in (from_, to))
        assert torch.equal(same["classifier.weight"], model.state_dict()["classifier.weight"])
        assert not torch.equal(other["classifier.weight"], model.state_dict()["classifier.weight"])
        assert load_start(tmp_path / from_.task, to, 1).config.problem_type == to.details.get("problem_type")
    teacher = Pretrained(path=str(tmp_path / KIND))
    found = student_size(TeacherLayers(layers=2), teacher, shape_of(SEVERAL))
    assert (found.predictions, found.outputs) == (4, 2)


def test_a_trained_model_is_cached_exported_and_scored(tmp_path: Path) -> None:
    """What the stages do with a task, in one process."""
    asked = recipe(tmp_path, jsonl(tmp_path), "cache.temperatures=[1.0, 2.0]", "cache.rows=null")
    draft = Store(asked.store).new_writer(asked.name, "prepare", "0" * 64, {}, {})
    prepare(StageContext(asked, {}, draft, no_progress))
    data = draft.commit({}, 0)
    root = data.local()
    found, shards = Manifest.read(root), Shards(root, "train")
    order = Order(found.groups, found.rows_per_group, 0)
    settings = Optimization(steps=60, batch_size=24, learning_rate=1e-2, validate_every=1000)
    model = build_model(Bert(hidden_size=32, intermediate_size=32, layers=1, heads=4, initializer_range=0.1), found, 0)
    batches = (to_tensors(shards.take(order.step_rows(step, 24))) for step in range(60))
    fit(TorchEngine(model, settings), CrossEntropy(TASK.predict), settings, batches, lambda: 0.0, lambda _: None)
    held_out = Shards(root, "validation")
    loss = validation_loss(model.eval(), TASK.predict, [to_tensors(held_out.take(np.arange(held_out.rows)))])
    assert loss < 0.5  # of a coin: 0.69
    draft = Store(asked.store).new_writer(asked.name, "train", "1" * 64, {}, {})
    with draft.directory() as folder:
        save_model(model, model.config, folder / "model", root / TOKENIZER)
    trained = draft.commit({}, 0)
    draft = Store(asked.store).new_writer(asked.name, "cache", "2" * 64, {}, {})
    index = TargetIndex.of(target_key(asked, data, trained), found, None)
    worker = TargetWorker(CaptureJob(asked.cache, index, data, trained, draft))
    reports = list(worker({"file": np.arange(len(index.files))}))
    assert not any(report["fault"][0] for report in reports)
    write_index(worker.job, {path: file.entry for path, file in finished_files(worker.job).items()})
    cached = draft.commit({}, 0).local()
    ids = np.arange(8)
    check_rows(cached, root, ids)
    kept = TargetCache(cached, ("label", "logprobs", "logsumexp")).take(ids)
    np.testing.assert_array_equal(kept["label"], shards.take(ids)["label"])
    with torch.inference_mode():
        expected = TASK.predict(model, to_tensors(shards.take(ids))).logits_BPV.log_softmax(-1).numpy()
    np.testing.assert_allclose(kept["logprobs"], expected, rtol=2e-3, atol=2e-3)
    export_onnx(trained.local() / "model", tmp_path / "fp32.onnx")
    units = TASK.units(root, None)
    scores = TASK.score(tmp_path / "fp32.onnx", root, units, asked.evaluate, "onnxruntime", FORMATS["onnx"], print)
    there = rows_of(root, "test")["label"]
    assert scores.choices_N.shape == there.ravel().shape
    assert (agreements(scores, scores) == 3).all()
    sums = PerExampleSums(scores.total, scores.size, agreements(scores, scores) / 1, scores.predictions)
    bootstrap = Bootstrap(200, 0.95, 0)
    (micro,) = (each["micro_f1"] for each in quality_metrics(TASK.quality, {"x": sums}, bootstrap)[0].values())
    chosen = scores.choices_N.reshape(there.shape)
    assert micro.value == pytest.approx(f1_score(there, chosen, average="micro"))
    assert micro.value > 0.7
    further = further_metrics(TASK.further, scores.columns, len(units), bootstrap)
    assert further["exact_match"].value == pytest.approx(accuracy_score(there, chosen))
    assert further["macro_f1"].value == pytest.approx(f1_score(there, chosen, average="macro"))
    assert all(0 <= each.low <= each.value <= each.high <= 1 for each in (micro, *further.values()))  # type: ignore[operator]
    texts = [text for text, names in TEXTS[:8]]
    rows = TASK.inputs(TASK.request(texts=texts), found.details, root)
    answers = TASK.answers(OnnxRuntime(tmp_path / "fp32.onnx").logprobs(rows), found.details)
    for answer in answers:
        assert answer["labels"] == [i for i, p in enumerate(answer["probabilities"]) if p >= 0.5]
        assert answer["names"] == [list(WORDS)[label] for label in answer["labels"]]
    assert any(sum(answer["probabilities"]) > 1.5 for answer in answers)
    line = TASK.describe_reply({"texts": texts}, {"data": answers})
    assert line.startswith(f"{texts[0]!r} is given ")
    assert TASK.agree(answers, [answer | {"names": answer["names"][::-1]} for answer in answers])
    assert not TASK.agree(answers, [answer | {"names": ["other"]} for answer in answers])
    card = TASK.card(found, asked.evaluate).intended_use
    assert "It gives any number of 3 classes (animal, food, plant) to a text" in card
    assert "those whose probability is 0.5 or more" in card
