"""GGUF, the file format of llama.cpp, for language models; the file itself is written and read in ``gguf_file``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from overproof.config.export import FormatSection
from overproof.data.manifest import TOKENIZER
from overproof.export.base import ExportContext
from overproof.models.base import GgufFamily
from overproof.registry import FAMILIES

CHECKED_ROWS, CHECKED_TOKENS = 2, 32
HALF_PRECISION_NATS = 0.1  # half precision keeps 11 bits: measured on small models, 0.002


class Gguf(FormatSection):
    """llama.cpp's file format, for language models."""

    kind: Literal["gguf"] = "gguf"
    formats: tuple[Literal["q8_0", "q4_0"], ...] = Field(("q8_0", "q4_0"), min_length=1)
    chat_template: str | None = Field(
        None,
        description="Jinja text that makes a prompt of chat messages; null takes the teacher's own, if any.",
    )


class GgufFormat:
    """See ``Format``."""

    section = Gguf
    suffix = ".gguf"
    unquantised = "f16"
    engines = ("llama.cpp", "vllm")
    library = "gguf"
    drafting_engine = "llama.cpp"

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(kind for kind, family in FAMILIES.items() if isinstance(family, GgufFamily))

    def check_tokenizer(self, text: str, where: object) -> None:
        from overproof.export.gguf_vocabulary import read_vocabulary

        read_vocabulary(text, where)

    def write(self, source: Path, file: Path, variant: str, context: ExportContext, unquantised: Path) -> None:
        del unquantised
        from overproof.export.gguf_file import export_gguf
        from overproof.models.hf_directory import chat_template

        assert context.tokenizer is not None
        template = context.settings.chat_template or chat_template(context.teacher)
        name = f"{context.recipe} {file.stem}"
        export_gguf(source, context.tokenizer, file, format=variant, name=name, chat_template=template)  # type: ignore[arg-type]

    def difference_nats(self, source: Path, file: Path) -> tuple[float, float]:
        """Of llama.cpp, which reads the file in its own way."""
        import numpy as np
        import torch

        from overproof.engines.llamacpp_logits import LlamaCppLogits
        from overproof.models.hf_directory import load_model

        model = load_model(source)
        generator = torch.Generator().manual_seed(0)
        tokens_BS = torch.randint(model.config.vocab_size, (CHECKED_ROWS, CHECKED_TOKENS), generator=generator)
        engine = LlamaCppLogits(file, CHECKED_TOKENS, exact_cache=True)
        logits_BSV = [np.concatenate([part.copy() for part in engine.batches(row_S)]) for row_S in tokens_BS.numpy()]
        engine.close()
        with torch.inference_mode():
            expected_BSV = model(input_ids=tokens_BS).logits.log_softmax(-1)
        found_BSV = torch.from_numpy(np.stack(logits_BSV)).log_softmax(-1)
        return float((expected_BSV - found_BSV).abs().max()), HALF_PRECISION_NATS

    def read_back(self, file: Path) -> Any:
        """The torch model that the file holds, dequantised to fp32."""
        from overproof.export.gguf_file import read_gguf

        return read_gguf(file)

    def companions(self, context: ExportContext) -> Mapping[str, Path]:
        assert context.tokenizer is not None
        return {TOKENIZER: context.tokenizer}


FORMAT = GgufFormat()
