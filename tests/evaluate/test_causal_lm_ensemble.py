"""Several language models as one teacher: what it says is what they say together, wherever it is asked, and no file is
made of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_runner import artifact_of
from test_served_teacher import RECIPE

from overproof.artifacts import Artifact, Store
from overproof.cli.main import main
from overproof.cluster.preflight import require_exportable
from overproof.config import Pretrained, Recipe, load_recipe
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.distill.text_worker import generate
from overproof.errors import InputError
from overproof.evaluate.metrics import Report
from overproof.evaluate.stage import evaluate_exports
from overproof.evaluate.variant_table import variant_table
from overproof.export.stage import export_models
from overproof.models.base import shape_of
from overproof.models.compute import CPU, Compute
from overproof.models.hf_directory import load_model, load_start, save_model
from overproof.models.sizes import student_size
from overproof.registry import TASKS
from overproof.stage_context import StageContext, no_progress
from overproof.tasks import text_evaluation
from overproof.tasks.base import spread_units
from overproof.train.ensemble import fit_weights, write_ensemble

WEIGHTS = (0.75, 0.25)


def members(text: dict[str, Artifact]) -> list[Path]:
    return [text["train"].local() / "model", text["sweep"].local() / "students/student"]


@pytest.fixture
def both(text: dict[str, Artifact], tmp_path: Path) -> Path:
    write_ensemble(members(text), tmp_path / "both", "probabilities", WEIGHTS)
    return tmp_path / "both"


def first_rows(text: dict[str, Artifact], rows: int = 3) -> torch.Tensor:
    return torch.from_numpy(Shards(text["prepare"].local(), "test").take(np.arange(rows))["tokens"].astype(np.int64))


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_it_says_what_its_members_say_together(text: dict[str, Artifact], tmp_path: Path, combine: str) -> None:
    """As it is read back, trained on, and in bf16, where each member's matrices are multiplied in it."""
    write_ensemble(members(text), tmp_path / "both", combine, WEIGHTS)  # type: ignore[arg-type]
    manifest, tokens_BS = Manifest.read(text["prepare"].local()), first_rows(text)
    with torch.inference_mode():
        each = [load_model(member)(input_ids=tokens_BS).logits.log_softmax(-1) for member in members(text)]
        if combine == "probabilities":
            expected = sum(weight * one.exp() for weight, one in zip(WEIGHTS, each, strict=True))
        else:
            product = sum(weight * one for weight, one in zip(WEIGHTS, each, strict=True))
            expected = torch.softmax(product, -1)  # type: ignore[arg-type]
        for model in (load_model(tmp_path / "both"), load_start(tmp_path / "both", manifest, 0)):
            found = model(input_ids=tokens_BS, use_cache=False).logits.exp()
            np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-6)
        rough = Compute(CPU, "bf16").place(load_model(tmp_path / "both"))
        found = rough(input_ids=tokens_BS, use_cache=False).logits
    assert found.dtype == torch.float32
    assert 0 < (found.exp() - expected).abs().max() < 0.05


def test_a_vocabulary_that_is_padded_further_is_cut_to_the_others(text: dict[str, Artifact], tmp_path: Path) -> None:
    (first, second), tokens_BS = members(text), first_rows(text)
    padded = load_model(second)
    padded.resize_token_embeddings(padded.config.vocab_size + 8)
    save_model(padded, padded.config, tmp_path / "padded", second / "tokenizer.json")
    for name, other in (("plain", second), ("cut", tmp_path / "padded")):
        write_ensemble([first, other], tmp_path / name, "probabilities", WEIGHTS)
    with torch.inference_mode():
        plain, cut = (load_model(tmp_path / name)(input_ids=tokens_BS).logits for name in ("plain", "cut"))
    assert torch.equal(plain, cut)


def test_its_size_is_that_of_all(text: dict[str, Artifact], both: Path) -> None:
    shape = shape_of(Manifest.read(text["prepare"].local()))
    alone = [
        student_size(Pretrained(path=str(member)), Pretrained(path=str(member)), shape) for member in members(text)
    ]
    whole = student_size(Pretrained(path=str(both)), Pretrained(path=str(both)), shape)
    model = load_model(both)
    assert whole.parameters == sum(size.parameters for size in alone) == sum(p.numel() for p in model.parameters())
    assert whole.layers == 3


def test_it_writes_with_a_cache_for_each_member(text: dict[str, Artifact], both: Path) -> None:
    """What it writes is what it would have written had it read all from the beginning at each token."""
    model, tokens_BS = load_model(both), first_rows(text)[:, :5]
    uniform = torch.from_numpy(np.random.default_rng(0).random((3, 9), np.float32))
    written = generate(model, tokens_BS, uniform, temperature=0)
    with torch.inference_mode():
        for _ in range(9):
            likeliest = model(input_ids=tokens_BS, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens_BS = torch.cat([tokens_BS, likeliest], 1)
    assert written.tolist() == tokens_BS.tolist()


@pytest.fixture
def validated(text: dict[str, Artifact], tmp_path: Path) -> Artifact:
    """The prepared texts, whose test rows are validation rows, too."""
    root = text["prepare"].local()

    def write(folder: Path) -> None:
        shutil.copytree(root, folder, dirs_exist_ok=True)
        manifest = Manifest.read(root)
        splits = dict(manifest.splits) | {"validation": manifest.splits["test"]}
        (folder / "manifest.json").write_text(manifest.model_copy(update={"splits": splits}).model_dump_json())

    return artifact_of("prepare", write, tmp_path)


def test_members_are_weighed_by_what_helps(text: dict[str, Artifact], validated: Artifact) -> None:
    """Which of all weights is best, a search along the line between two says as well."""
    root, fitted = validated.local(), fit_weights(members(text), validated, lambda _: None)
    shards = Shards(root, "test")
    columns = shards.take(np.arange(shards.rows))
    tokens_BS, each = torch.from_numpy(columns["tokens"].astype(np.int64)), list[np.ndarray]()
    counts_BP = np.arange(tokens_BS.shape[1] - 1) < columns["length"][:, None]
    for member in members(text):
        with torch.inference_mode():
            logprobs_BPV = load_model(member)(input_ids=tokens_BS[:, :-1]).logits.log_softmax(-1)
        each.append(logprobs_BPV.gather(-1, tokens_BS[:, 1:, None])[..., 0].double().exp().numpy()[counts_BP])
    shares = np.linspace(0, 1, 1001)
    likely = [np.log(share * each[0] + (1 - share) * each[1]).mean() for share in shares]
    assert fitted.tolist() == pytest.approx([shares[np.argmax(likely)], 1 - shares[np.argmax(likely)]], abs=2e-3)
    assert 0 < fitted[0] < 1


def recipe_of(folder: Path, both: Path, *changes: str) -> Recipe:
    shape = "kind: llama, hidden_size: 64, intermediate_size: 96, layers: 1, heads: 2, kv_heads: 1"
    sets = (
        f"store={folder}/store", f"data.tokenizer={{kind: file, path: {both}}}",
        "data.sequence_length=64",
        f"train={{model: {{kind: pretrained, path: {both}}}, steps: 0, batch_size: 2, learning_rate: 1}}",
        f"sweep.students=[{{name: student, model: {{{shape}}}}}]", "tune={}", "sweep.steps=2",
        "gate.rules=[{kind: keep, against: teacher, at_least: 0.5}]", "compress={kind: gguf, formats: [q8_0]}",
        "evaluate={max_documents: 4, bootstrap_samples: 100, threads: 1, decode_tokens: 4, timed_requests: 4}",
    )  # fmt: skip
    return load_recipe(RECIPE, (*sets, *changes))


@pytest.mark.usefixtures("ray_cluster")
def test_its_students_are_held_against_it_and_no_file_is_made_of_it(
    text: dict[str, Artifact], both: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, both)
    [found] = [finding for finding in require_exportable(recipe) if finding.about == "train.model"]
    assert found.state == "warning"
    assert "OverproofEnsembleForCausalLM is not written as gguf: it teaches, and torch measures its bits" in found.text

    def taken_over(folder: Path) -> None:
        shutil.copytree(both, folder / "model")
        (folder / "curve.jsonl").touch()

    store, parents = Store(recipe.store), {"prepare": text["prepare"], "sweep": text["sweep"]}
    parents["train"] = artifact_of("train", taken_over, tmp_path)
    draft = store.new_writer(recipe.name, "compress", "cd" * 32, {}, {})
    metrics = export_models(StageContext(recipe, parents, draft, no_progress))
    assert sorted(metrics["size_bytes"]) == ["control", "student", "student-q8_0"]
    parents["compress"] = draft.commit(metrics, 0.0)
    draft = store.new_writer(recipe.name, "evaluate", "ef" * 32, {}, {})
    evaluate_exports(StageContext(recipe, parents, draft, no_progress))
    report = Report.model_validate_json((Path(draft.uri) / "report.json").read_bytes())
    teacher = report.unwritten_teacher
    assert teacher is not None
    assert (teacher.model, teacher.runs, len(teacher.weights)) == ("causal_lm_ensemble", "in torch", 64)
    root, task = text["prepare"].local(), TASKS["language_modeling"]
    documents = task.units(root, 4)
    shards = Shards(root, "test", ("document", "tokens", "length"))
    columns = shards.take(np.arange(shards.rows))
    model, nats = load_model(both), 0.0
    for tokens_S, length, document in zip(columns["tokens"], columns["length"], columns["document"], strict=True):
        if document in documents:
            ids_S = torch.from_numpy(tokens_S[: length + 1].astype(np.int64))
            with torch.inference_mode():
                logprobs_PV = model(input_ids=ids_S[None, :-1], use_cache=False).logits[0]
            nats -= float(logprobs_PV.gather(1, ids_S[1:, None]).sum())
    quality = teacher.metrics["bits_per_byte"]
    size = sum(row["size_bytes"] for row in documents_of(root) if row["document"] in documents)
    assert quality.value == pytest.approx(nats / np.log(2) / size, rel=1e-4)
    compared = report.compare("student-q8_0", "teacher")
    assert compared is not None
    student = next(m for m in report.measured if m.name == "student-q8_0").metrics["bits_per_byte"].value
    assert compared.value == pytest.approx(student / quality.value - 1, abs=1e-3)
    by_name = {measured.name: measured.metrics["divergence_nats"] for measured in report.measured}
    rows = text_evaluation.TestDocuments.of(root, 4)
    reading = spread_units(rows.sample_ids, round(1024 / float(rows.lengths.mean())))
    alone, total, places = load_model(members(text)[1]), 0.0, 0
    for tokens_S, counts_P in text_evaluation.test_rows(shards, reading, None):
        ids_S = torch.from_numpy(tokens_S[None, :-1].astype(np.int64))
        with torch.inference_mode():
            whole_PV, student_PV = (each(input_ids=ids_S).logits[0].log_softmax(-1) for each in (model, alone))
        total += float((whole_PV.exp() * (whole_PV - student_PV)).sum())
        places += len(counts_P)
    assert by_name["student"].n == places
    assert by_name["student"].value == pytest.approx(total / places, rel=0.05)
    _, _, first, *_ = variant_table(report)
    assert first[:3] == ("`teacher`", "", "in torch")


def documents_of(root: Path) -> list[dict[str, int]]:
    import pyarrow.parquet as pq

    return pq.read_table(root / "documents.parquet").to_pylist()


@pytest.mark.parametrize(
    "needed",
    [
        "compress.teacher=true",
        "sweep.students=[{name: student, model: {kind: teacher_layers, layers: 1}}]",
        "speculate={draft_tokens: 3}",
    ],
)
def test_a_recipe_that_needs_a_file_of_it_is_refused(
    text: dict[str, Artifact], both: Path, tmp_path: Path, needed: str
) -> None:
    with pytest.raises(InputError, match="can be trained and not be written as gguf"):
        require_exportable(recipe_of(tmp_path, both, needed))


def test_models_that_do_not_go_together_are_refused(
    text: dict[str, Artifact], digits: dict[str, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = members(text)
    classifier = digits["train"].local() / "model"
    assert main(["ensemble", str(tmp_path / "both"), str(first), str(classifier)]) == 2
    assert "a vit does not go with" in "".join(capsys.readouterr())
    assert main(["ensemble", str(tmp_path / "both"), str(first), str(second), "--combine", "votes"]) == 2
    told = "".join("".join(capsys.readouterr()).split())
    assert "--combine:foundvotes;oflanguagemodels" in told
    assert main(["ensemble", str(tmp_path / "both"), str(first), str(second)]) == 0
    assert "as a teacher" in "".join(capsys.readouterr())
    assert main(["ensemble", str(tmp_path / "again"), str(first), str(tmp_path / "both")]) == 2
    assert "a causal_lm_ensemble does not go with" in "".join(capsys.readouterr()).replace("\n", " ")
    assert not (tmp_path / "again").exists()
