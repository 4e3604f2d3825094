"""A classifier of texts, untrained, behind the HTTP API in this process."""

from __future__ import annotations

import asyncio
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from overproof.data.manifest import Manifest
from overproof.engines.base import EngineSettings
from overproof.export.onnx_file import export_onnx
from overproof.models.hf_directory import load_start, save_model
from overproof.package.private_copy import PrivateCopy
from overproof.registry import ENGINES
from overproof.serve.async_engine import ThreadedEngine
from overproof.serve.middleware import Access
from overproof.serve.model_registry import SingleModel
from overproof.serve.response_builder import ServedModel
from overproof.serve.responses import ModelInfo, Provenance
from overproof.serve.routes import build_app
from text_classes import write_base


def classify_app(folder: Path, task: str, details: dict[str, Any], positions: int, outputs: int) -> Any:
    """The application that answers by an exported BERT, whose head is of these classes and untrained."""
    base = write_base(folder / "base")
    manifest = Manifest(
        task=task, columns=(), splits={}, rows_per_group=8, positions=positions, outputs=outputs, details=details
    )
    model = load_start(base, manifest, 0)
    save_model(model, model.config, folder / "model")
    export_onnx(folder / "model", folder / "model.onnx")
    shutil.copy(base / "tokenizer.json", folder)
    engine = ENGINES["onnxruntime"].load(folder / "model.onnx", EngineSettings())
    made = Provenance(
        task=task, details=details, package="p", candidate="c", format="fp32", sha256="0" * 64, size_bytes=1,
        verdict=[], parents={},
    )  # fmt: skip
    served = ServedModel(
        ModelInfo(id="topics", created=0, overproof=made), ThreadedEngine(engine, 1), 1, partial(PrivateCopy, folder)
    )
    return build_app(SingleModel(served), Access(None))


def ask(app: Any, method: str, path: str, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, path, **request)

    return asyncio.run(send())


def classify(app: Any, **body: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/classify", json=body)
