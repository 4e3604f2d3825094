"""Packages of a chosen size for the benchmarks: fresh weights, really exported, behind a report and a verdict by hand.

What such a model says is worth nothing; how long it takes to say it is what a trained one takes.
"""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from overproof.artifacts import TOOLS
from overproof.config import Gate, Parity
from overproof.data.manifest import TOKENIZER, Manifest, Split
from overproof.data.tokenization import END, train_bpe
from overproof.evaluate.gate import judge
from overproof.evaluate.metrics import MeasuredFile, Report
from overproof.export.gguf_file import GgufVariant, export_gguf
from overproof.export.onnx_file import export_onnx
from overproof.files import file_sha256
from overproof.models import hf_directory
from overproof.models.llama import Llama
from overproof.models.vit import Vit
from overproof.package.contents import CARD, PACKAGE, REPORT, VERDICT, PackageContents, list_parts
from overproof.package.package import open_package
from overproof.registry import FORMATS, TASKS
from overproof.tasks.base import Metric

VOCABULARY, LENGTH, SEED = 8192, 512, 1
TaskKind = Literal["language_modeling", "image_classification"]
HUGGING_FACE = "hugging-face"  # the folder beside the package with the same weights in fp32
LLAMA = Llama(hidden_size=768, intermediate_size=2048, layers=12, heads=12, kv_heads=4)  # 82 million parameters
DEEP = Vit(hidden_size=256, intermediate_size=1024, layers=4, heads=4)  # 17 tokens of an image, 13 MB
WIDE = Vit(hidden_size=1536, intermediate_size=6144, layers=2, heads=8, patch_size=4)  # 5 tokens of an image, 227 MB


def texts() -> list[str]:
    """Modules of the standard library, which every machine has."""
    return [file.read_text(encoding="utf-8") for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]


def forge_text(folder: Path, config: Llama = LLAMA, format: GgufVariant = "q8_0") -> Path:
    """A language model's package, and beside it the same weights as a Hugging Face directory.

    The token that ends a text, and those that are no whole ASCII characters have rows of zeros: they are never the
    likeliest, so every text is as long as it may be, and each token shows as soon as it is there.
    """
    source = folder / HUGGING_FACE
    source.mkdir(parents=True)
    tokenizer = train_bpe(texts(), VOCABULARY)
    tokenizer.save(str(folder / TOKENIZER))
    end = tokenizer.token_to_id(END)
    model = hf_directory.build_model(config, _manifest("language_modeling", end), SEED)
    with torch.no_grad():
        silent = [end, *(i for i in range(VOCABULARY) if not tokenizer.decode([i]).isascii())]
        model.get_input_embeddings().weight[silent] = 0
    hf_directory.save_model(model, model.config, source, folder / TOKENIZER)
    package = folder / "package"
    package.mkdir()
    export_gguf(source, folder / TOKENIZER, package / "model.gguf", format, "forged")
    shutil.copyfile(folder / TOKENIZER, package / TOKENIZER)
    return _seal(package, "language_modeling", "model.gguf", format)


def forge_digits(folder: Path, config: Vit = DEEP) -> Path:
    """A classifier's package, fp32."""
    source, package = folder / HUGGING_FACE, folder / "package"
    model: PreTrainedModel = hf_directory.build_model(config, _manifest("image_classification"), SEED)
    hf_directory.save_model(model, model.config, source)
    package.mkdir()
    export_onnx(source, package / "model.onnx")
    return _seal(package, "image_classification", "model.onnx", "fp32")


def _manifest(task: TaskKind, end_id: int | None = None) -> Manifest:
    text = task == "language_modeling"
    return Manifest(
        task=task,
        columns=(),
        splits={name: Split(shards=(), rows=0, predictions=0, documents=0) for name in ("train", "validation", "test")},
        rows_per_group=1,
        positions=LENGTH if text else 1,
        outputs=VOCABULARY if text else 10,
        tokenizer_sha256="" if text else None,
        start_id=end_id,
        end_id=end_id,
        bos_id=end_id,
        details={} if text else {"channels": 1, "height": 8, "width": 8, "classes": [str(n) for n in range(10)]},
    )


def _seal(package: Path, task: TaskKind, model: str, format: str) -> Path:
    """Write what proves a model file, as if its gate had passed it."""
    file = package / model
    measured = MeasuredFile(
        name="forged",
        student="forged",
        format=format,
        size_bytes=file.stat().st_size,
        sha256=file_sha256(file),
        candidate=True,
        metrics={"parity_nats": Metric(value=0.0, unit="nats", n=1)},
    )
    format_kind = "gguf" if task == "language_modeling" else "onnx"
    engine = next(iter(FORMATS[format_kind].engines))
    report = Report(
        task=task,
        quality=TASKS[task].quality.name,
        engine=engine,
        computes_with=FORMATS[format_kind].engines[engine],
        confidence=0.95,
        tokenizer_sha256=file_sha256(package / TOKENIZER) if task == "language_modeling" else None,
        measured=(measured,),
        comparisons=(),
    )
    gate = Gate(rules=(Parity(at_most=1.0),))
    (package / REPORT).write_text(report.model_dump_json(), encoding="utf-8")
    (package / VERDICT).write_text(judge(gate, report).model_dump_json(), encoding="utf-8")
    (package / CARD).write_text("Forged for a benchmark; nothing was measured.\n", encoding="utf-8")
    content = PackageContents(
        id=f"forged/package/{hashlib.sha256(measured.sha256.encode()).hexdigest()[:12]}",
        name="forged",
        task=task,
        details=_manifest(task).details,
        companions=(TOKENIZER,) if task == "language_modeling" else (),
        candidate="forged",
        model=model,
        model_format=format,
        policy=gate,
        files=list_parts(package),
        parents={},
        shards={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=dict.fromkeys(TOOLS, "0"),
    )
    (package / PACKAGE).write_text(content.model_dump_json(indent=1), encoding="utf-8")
    return open_package(package).path
