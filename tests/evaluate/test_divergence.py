"""What is told of a file beside its quality: how far all its probabilities are from the teacher's, and its speed when
several ask at once; and the table that has everything.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from overproof.artifacts import Artifact
from overproof.config import Evaluate
from overproof.data.parquet_reader import Shards
from overproof.engines.probe import probe_text
from overproof.engines.probe_messages import TextRequest
from overproof.evaluate.metrics import MeasuredFile, Report
from overproof.evaluate.variant_table import markdown_lines, variant_table
from overproof.models.hf_directory import load_model
from overproof.registry import FORMATS, TASKS
from overproof.tasks import text_evaluation
from overproof.tasks.base import Metric
from overproof.tasks.divergence import of_distributions, of_labels

SETTINGS = Evaluate(threads=1)


def found(kind: str, engine: str, file: Path, teacher: Path, root: Path) -> Metric:
    format = FORMATS["gguf" if TASKS[kind].label_column == "tokens" else "onnx"]
    return TASKS[kind].divergence(file, teacher, root, SETTINGS, engine, format, lambda _: None)["divergence_nats"]


def test_of_distributions_and_of_labels() -> None:
    teacher, other = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    nats = of_distributions(np.log(teacher).astype(np.float32), np.log(other).astype(np.float32))
    assert nats == pytest.approx([0.25 * np.log(2), 0], abs=1e-6)
    logs = [np.log(values[:1]).astype(np.float32) for values in (teacher, other)]
    labels = sum(
        p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)) for p, q in zip(teacher[0], other[0], strict=True)
    )
    assert of_labels(*logs) == pytest.approx([labels], rel=1e-5)
    certain = np.log(np.array([[1.0, 1e-30]], np.float32))
    assert np.isfinite(of_labels(certain, certain[:, ::-1])).all()


def test_of_text_it_is_what_torch_says(text: dict[str, Artifact]) -> None:
    """Of the models that the files were made from: half precision is far less than what a student differs by."""
    exported, root = text["compress"].local(), text["prepare"].local()
    measured = found("language_modeling", "llama.cpp", exported / "student.gguf", exported / "teacher.gguf", root)
    rows = text_evaluation.TestDocuments.of(root)
    models = [load_model(text["train"].local() / "model"), load_model(text["sweep"].local() / "students/student")]
    total, places = 0.0, 0
    for tokens_S, length in zip(Shards(root, "test").take(rows.sample_ids)["tokens"], rows.lengths, strict=True):
        ids_1S = torch.from_numpy(tokens_S[None, :length].astype(np.int64))
        with torch.inference_mode():
            teacher_PV, student_PV = (model(input_ids=ids_1S).logits[0].log_softmax(-1) for model in models)
        total += float((teacher_PV.exp() * (teacher_PV - student_PV)).sum())
        places += int(length)
    assert measured.n == pytest.approx(1024, rel=0.2) if places > 1024 else measured.n == places
    assert measured.value == pytest.approx(total / places, rel=0.1)
    by_torch = found("language_modeling", "vllm", exported / "student.gguf", exported / "teacher.gguf", root)
    assert by_torch.n == measured.n  # of an engine that does not tell
    assert by_torch.value == pytest.approx(measured.value, rel=0.01)


def test_of_itself_it_is_nothing_and_of_fewer_bits_more(text: dict[str, Artifact], digits: dict[str, Artifact]) -> None:
    exported, root = text["compress"].local(), text["prepare"].local()
    student = exported / "student.gguf"
    itself, eight, four = (
        found("language_modeling", "llama.cpp", exported / name, student, root).value
        for name in ("student.gguf", "student-q8_0.gguf", "student-q4_0.gguf")
    )
    assert itself == pytest.approx(0, abs=1e-6)
    assert 0 < eight < four
    exported, root = digits["compress"].local(), digits["prepare"].local()
    rounded = found(
        "image_classification", "onnxruntime", exported / "student-int8.onnx", exported / "student.onnx", root
    )
    teacher = found("image_classification", "onnxruntime", exported / "student.onnx", exported / "teacher.onnx", root)
    assert 0 < rounded.value < teacher.value
    assert rounded.n == 256


def test_several_requests_at_once_are_timed_together(text: dict[str, Artifact]) -> None:
    told = {
        "engine": "llama.cpp", "file": str(text["compress"].local() / "student.gguf"), "threads": 1,
        "prompts": [[0, 40, 41]], "probe_tokens": 4, "texts": ["import os"], "timed_prompts": [[0, 40], [0, 41, 42]],
        "timed_requests": 3, "probe_s": 60.0, "decode_tokens": 16,
    }  # fmt: skip
    alone = probe_text(TextRequest.model_validate(told), lambda _: None)
    assert alone.streams_tokens_per_s == []
    several = probe_text(TextRequest.model_validate(told | {"streams": 5}), lambda _: None)
    assert 1 <= len(several.streams_tokens_per_s) <= 3
    assert min(several.streams_tokens_per_s) > 100


def test_a_table_reads_the_same_in_a_terminal_and_in_markdown() -> None:
    def metric(value: float, **ends: float) -> Metric:
        return Metric(value=value, unit="any", n=8, **ends)

    figures = {"bits_per_byte": metric(1.25, low=1.0, high=1.5), "streams_tokens_per_s": metric(4321.0)}
    files = (
        MeasuredFile(name="teacher", student=None, format="f16", size_bytes=10**7, sha256="", candidate=False,
                     metrics=figures),
        MeasuredFile(name="small-q4_0", student="small", format="q4_0", size_bytes=10**6, sha256="", candidate=True,
                     metrics=figures | {"divergence_nats": metric(0.03125), "parity_nats": metric(4.77e-7)}),
    )  # fmt: skip
    report = Report(task="language_modeling", quality="bits_per_byte", engine="any", computes_with="any",
                    confidence=0.95, measured=files, comparisons=())  # fmt: skip
    rows = variant_table(report, ("verdict", {"small-q4_0": "passed"}))
    assert rows[0] == ("variant", "against the teacher", "format", "MB", "bits per byte", "KL from teacher, nats",
                       "tokens/s, 8 at once", "parity, nats", "verdict")  # fmt: skip
    assert rows[2] == ("`teacher`", "", "f16", "10.00", "1.2500 (1.0000 to 1.5000)", "", "4,321", "", "")
    assert rows[3][4:] == ("1.2500 (1.0000 to 1.5000)", "0.0312", "4,321", "4.8e-07", "passed")
    lines = list(markdown_lines(rows))
    assert len({len(line) for line in lines}) == 1
    assert [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in (lines[0], lines[3])] == [
        [*rows[0]],
        [*rows[3]],
    ]
    assert set(lines[1]) == {"|", "-", " "}
