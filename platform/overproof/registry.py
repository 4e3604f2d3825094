"""What is open: tasks, model families, export formats and engines. A new one is one file, and one line here.

Each line names a kind and the object that implements it, which is imported when it is first asked for. What such an
object offers is a protocol: ``tasks/base.py``, ``models/base.py``, ``export/base.py`` and ``engines/base.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Generic, TypeVar

from overproof.errors import InputError, suggest_name

if TYPE_CHECKING:
    from overproof.engines.base import EngineLoader
    from overproof.export.base import Format
    from overproof.models.base import ModelFamily
    from overproof.tasks.base import Task

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Implementations by kind. Iterating gives the kinds and imports nothing."""

    def __init__(self, what: str, where: Mapping[str, str]) -> None:
        """``where`` maps a kind to ``package.module:object``, below ``overproof``."""
        self.what, self._where = what, dict(where)

    def __getitem__(self, kind: str) -> T:
        if kind not in self._where:
            near = suggest_name(kind, self._where)
            raise InputError(f"{self.what} {kind!r}: there is none{near}; expected one of {', '.join(self._where)}")
        module, name = self._where[kind].split(":")
        found: T = getattr(import_module(f"overproof.{module}"), name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, kind: object) -> bool:
        return kind in self._where


TASKS: Registry[Task] = Registry(
    "task",
    {
        "language_modeling": "tasks.language_modeling:TASK",
        "chat": "tasks.chat:TASK",
        "image_classification": "tasks.image_classification:TASK",
        "tabular_classification": "tasks.tabular:CLASSIFICATION",
        "tabular_regression": "tasks.tabular:REGRESSION",
        "text_classification": "tasks.text_classification:TASK",
        "multi_label_text_classification": "tasks.multi_label_text_classification:TASK",
    },
)

FAMILIES: Registry[ModelFamily] = Registry(
    "model family",
    {
        "llama": "models.llama:FAMILY",
        "mistral": "models.mistral:FAMILY",
        "qwen2": "models.qwen2:FAMILY",
        "qwen3": "models.qwen3:FAMILY",
        "smollm3": "models.smollm3:FAMILY",
        "granite": "models.granite:FAMILY",
        "olmo2": "models.olmo2:FAMILY",
        "gemma2": "models.gemma2:FAMILY",
        "gemma3": "models.gemma3:FAMILY",
        "phi3": "models.phi3:FAMILY",
        "gpt2": "models.gpt2:FAMILY",
        "falcon": "models.falcon:FAMILY",
        "causal_lm_ensemble": "models.causal_lm_ensemble:FAMILY",
        "causal_lm": "models.causal_lm:FAMILY",  # any other decoder: after those
        "vit": "models.vit:FAMILY",
        "resnet": "models.resnet:FAMILY",
        "mlp": "models.mlp:FAMILY",
        "bert": "models.bert:FAMILY",
        "distilbert": "models.distilbert:FAMILY",
        "roberta": "models.roberta:FAMILY",
        "modernbert": "models.modernbert:FAMILY",
        "deberta_v2": "models.deberta_v2:FAMILY",
        "ensemble": "models.ensemble:FAMILY",
    },
)

FORMATS: Registry[Format] = Registry(
    "export format",
    {
        "gguf": "export.gguf:FORMAT",
        "onnx": "export.onnx:FORMAT",
        "compressed_tensors": "export.compressed_tensors:FORMAT",
    },
)

ENGINES: Registry[EngineLoader] = Registry(
    "engine",
    {
        "llama.cpp": "engines.llamacpp:ENGINE",
        "vllm": "engines.vllm:ENGINE",
        "onnxruntime": "engines.onnx_runtime:ENGINE",
    },
)
