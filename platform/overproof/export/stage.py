"""The compress stage: trained models as files that serving engines read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter

from overproof.config import Gguf, Onnx, Recipe
from overproof.data.manifest import TOKENIZER
from overproof.export.gguf import export_gguf, read_gguf
from overproof.export.onnx import PIXELS, Reference, export_onnx, quantize_onnx
from overproof.models import hf_directory
from overproof.stage_context import StageContext, TaskProgress

EXPORTS = "exports.json"
PROBE_SHAPE = (2, 32)  # rows and tokens (or images) of the check after an export
# Half precision keeps 11 bits, fp32 24: measured on small models, 0.002 and 1e-6 nats.
F16_NATS, FP32_NATS = 0.1, 1e-4


class Export(BaseModel):
    """One exported file. Candidates are what the gate may choose from; the others are what they are held against.

    ``student`` is the one it was made from, None for teacher and control; its unquantised file bears its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    student: str | None
    file: str
    format: str
    size_bytes: int
    candidate: bool


AddExport = Callable[[str, str | None, Path, str], None]  # name, student, file, format
EXPORT_LIST = TypeAdapter(tuple[Export, ...])


def read_exports(root: Path) -> tuple[Export, ...]:
    """The exports of a finished compress stage."""
    return EXPORT_LIST.validate_json((root / EXPORTS).read_bytes())


def export_models(context: StageContext) -> dict[str, Any]:
    """Write teacher, control and every kept student unquantised, and those students in every format of the recipe.

    The teacher that is to answer with a draft is written in its own format, too.

    Raises:
        InputError: a model or tokenizer has a feature that the format does not cover.
        RuntimeError: an unquantised file, read back, is not the model it was made from.
    """
    swept, settings = context.parents["sweep"].local(), context.recipe.compress
    kept: list[str] = json.loads((swept / "trials.json").read_text(encoding="utf-8"))["kept"]
    references = {"teacher": context.parents["train"].local() / "model", "control": swept / "control"}
    students = {name: swept / "students" / name for name in kept}
    answering = context.recipe.speculate is not None and context.recipe.speculate.teacher not in references
    total = len(references) + len(students) * (1 + len(settings.formats)) + answering
    exports: list[Export] = []

    def add(name: str, student: str | None, file: Path, format: str) -> None:
        size_bytes, candidate = file.stat().st_size, student not in (None, name)
        exports.append(
            Export(
                name=name, student=student, file=file.name, format=format, size_bytes=size_bytes, candidate=candidate
            )
        )
        context.progress(TaskProgress("compress", len(exports), total, f"{file.name} {size_bytes / 1e6:.2f} MB"))

    context.progress(TaskProgress("compress", 0, total, f"teacher to {settings.kind}"))
    with context.draft.directory() as root:
        if isinstance(settings, Gguf):
            tokenizer = context.parents["prepare"].local() / TOKENIZER
            template = settings.chat_template or hf_directory.chat_template(references["teacher"])
            write = partial(export_gguf, tokenizer=tokenizer, chat_template=template)
            _export_text(references, students, settings, context.recipe, root, write, add)
            shutil.copyfile(tokenizer, root / TOKENIZER)
        else:
            _export_images(references, students, settings, root, add)
        (root / EXPORTS).write_text(json.dumps([e.model_dump() for e in exports], indent=1) + "\n", encoding="utf-8")
    return {"size_bytes": {export.name: export.size_bytes for export in exports}}


def _export_text(
    references: dict[str, Path],
    students: dict[str, Path],
    settings: Gguf,
    recipe: Recipe,
    root: Path,
    write: Callable[..., None],
    add: AddExport,
) -> None:
    for name, source in (references | students).items():
        file = root / f"{name}.gguf"
        write(source, path=file, format="f16", name=f"{recipe.name} {name}")
        check_gguf(source, file)
        add(name, name if name in students else None, file, "f16")
    for name, source in students.items():
        for format in settings.formats:
            file = root / f"{name}-{format}.gguf"
            write(source, path=file, format=format, name=f"{recipe.name} {name} {format}")
            add(f"{name}-{format}", name, file, format)
    drafted = recipe.speculate
    if drafted is not None and drafted.teacher not in references:
        file = root / f"{drafted.teacher}.gguf"
        write(references["teacher"], path=file, format=drafted.teacher_format, name=f"{recipe.name} {drafted.teacher}")
        add(drafted.teacher, None, file, drafted.teacher_format)


def _export_images(
    references: dict[str, Path], students: dict[str, Path], settings: Onnx, root: Path, add: AddExport
) -> None:
    for name, source in (references | students).items():
        file = root / f"{name}.onnx"
        export_onnx(source, file)
        check_onnx(source, file)
        add(name, name if name in students else None, file, "fp32")
    for name in students:
        for format in settings.formats:
            file = root / f"{name}-{format}.onnx"
            quantize_onnx(root / f"{name}.onnx", file)
            add(f"{name}-{format}", name, file, format)


def check_gguf(source: Path, file: Path) -> None:
    """Compare an f16 file, read back, with the model it was made from, on random tokens.

    Reader and writer could share a mistake, which this cannot see; the parity probe, which asks llama.cpp, can.
    """
    model = hf_directory.load_model(source)
    tokens_BS = torch.randint(model.config.vocab_size, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = (m(input_ids=tokens_BS).logits.log_softmax(-1) for m in (model, read_gguf(file)))
    _check(file, float((expected - found).abs().max()), F16_NATS)


def check_onnx(source: Path, file: Path) -> None:
    """Compare an fp32 file, run by ONNX's reference, with the model it was made from, on random images."""
    pixels_BD = np.random.default_rng(0).random((PROBE_SHAPE[0], PIXELS), np.float32)
    batch = {"pixels": torch.from_numpy(pixels_BD), "label": torch.zeros(len(pixels_BD), dtype=torch.int64)}
    with torch.inference_mode():
        expected_BPV = hf_directory.forward(hf_directory.load_model(source), batch).logits_BPV.log_softmax(-1)
    _check(file, float(np.abs(expected_BPV[:, 0].numpy() - Reference(file)(pixels_BD)).max()), FP32_NATS)


def _check(file: Path, found_nats: float, most_nats: float) -> None:
    if not found_nats <= most_nats:
        raise RuntimeError(
            f"{file}: read back, its log-probabilities are up to {found_nats:.3g} nats from the model's it was made "
            f"from; expected {most_nats:g} at most: the export is wrong"
        )
