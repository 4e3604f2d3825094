"""GGUF, the file format of llama.cpp, for language models; the file itself is written and read in ``gguf_file``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from overproof.config.base import Section
from overproof.config.export import Calibration, FormatSection
from overproof.data.manifest import TOKENIZER
from overproof.errors import InputError
from overproof.export import llama_cpp_converter
from overproof.export.base import MOST_FISHER_ROWS, OWN_BYTES, Difference, ExportContext, calibration_memory
from overproof.models.base import ComposedFamily, GgufFamily
from overproof.models.sizes import FP32_BYTES, ModelSize, family_of
from overproof.registry import FAMILIES

SHORT_ROW, LONG_ROW = 32, 1024  # tokens that a file is held against its model on
MOST_TOKENS = 8192  # of such a row, which bounds what it takes
CHECKED_PLACES = 64  # of each row, whose logits are compared
WRITTEN_TASK = "language_modeling"  # whose models a GGUF file holds
LONGER_NAME_BYTES = 64  # by which the name in a file of a variant may be longer, with padding
PlainVariant = Literal["q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]
LEAST_BYTES = 18 / 32  # of a number in a block of Q4_0
HALF_PRECISION_NATS = 0.1  # half precision keeps 11 bits: measured on SmolLM2-135M, 0.007


class Mixed(Section):
    """Of the variant ``mixed-gptq``: each matrix has the type that a file of its size is best with, by what rounding
    costs on the calibration's rows. One of the two says how large.
    """

    as_large_as: PlainVariant | None = Field(
        None, description="Each file as large as one of its model in this variant."
    )
    at_most_mb: float | None = Field(None, gt=0, description="Size of each file (1 MB = 1,000,000 bytes).")

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.as_large_as is None) == (self.at_most_mb is None):
            raise ValueError("mixed: expected as_large_as or at_most_mb, and not both")
        return self


class Gguf(FormatSection):
    """llama.cpp's file format, for language models.

    Variants are named as in llama.cpp, with how they are rounded: by itself each number goes to the nearest; with
    ``-imatrix`` errors count as much as the inputs that meet them; with ``-gptq`` later columns make up for earlier
    ones, too (arXiv 2210.17323), in a file of the same size.
    """

    kind: Literal["gguf"] = "gguf"
    by_quality: ClassVar[tuple[str, ...]] = ("q8_0", "q6_k", "q5_k_m-gptq", "q4_k_m-gptq", "q4_0-gptq", "q4_0")
    formats: tuple[
        Literal[
            "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q6_k-imatrix", "q5_k_m-imatrix", "q4_k_m-imatrix",
            "q4_0-imatrix", "q5_k_m-gptq", "q4_k_m-gptq", "q4_0-gptq", "mixed-gptq",
        ],
        ...,
    ] = Field(("q8_0", "q4_0"), min_length=1)  # fmt: skip
    calibration: Calibration = Calibration()
    mixed: Mixed | None = None
    chat_template: str | None = Field(
        None,
        description="Jinja text that makes a prompt of chat messages; null takes the teacher's own, if any.",
    )

    @property
    def most_mb(self) -> float | None:
        return None if self.mixed is None else self.mixed.at_most_mb

    @property
    def trained_roundings(self) -> tuple[str, ...]:
        return tuple(variant for variant in ("q8_0", "q4_0") if variant in self.formats)

    @property
    def calibration_rows(self) -> int:
        """Each calibrated variant reads all three times; what rounding costs a matrix is told by gradients."""
        calibrated = sum("-" in variant for variant in self.formats)
        return 3 * calibrated * self.calibration.rows + 3 * min(MOST_FISHER_ROWS, self.calibration.rows) * (
            "mixed-gptq" in self.formats
        )

    @model_validator(mode="after")
    def _mixed_has_a_size(self) -> Self:
        if "mixed-gptq" in self.formats and self.mixed is None:
            raise ValueError("formats has mixed-gptq, whose size nothing says; expected mixed: {as_large_as: q4_0}")
        return self


class GgufFormat:
    """See ``Format``."""

    section = Gguf
    suffix = ".gguf"
    unquantised = "f16"
    engines: Mapping[str, str] = {
        "llama.cpp": OWN_BYTES,
        "vllm": "the file's weights unpacked to fp16, not its own bytes",
    }
    library = "gguf"
    further_families = llama_cpp_converter.HOW
    drafting_engine = "llama.cpp"

    @property
    def families(self) -> tuple[str, ...]:
        """Those that llama.cpp runs and overproof writes; with a checkout of llama.cpp any other decoder, too."""
        further = llama_cpp_converter.is_configured()
        return tuple(
            kind
            for kind, family in FAMILIES.items()
            if isinstance(family, GgufFamily)
            or (further and WRITTEN_TASK in family.tasks and not isinstance(family, ComposedFamily))
        )

    def check_tokenizer(self, text: str, where: object) -> tuple[str, ...]:
        from overproof.export.gguf_vocabulary import read_vocabulary

        return read_vocabulary(text, where).left_out

    def check_template(self, settings: Gguf, directory: str | None) -> None:
        from overproof.engines.chat_template import require_default_template

        require_default_template(settings.chat_template, directory)

    def check_model(
        self, config: Mapping[str, Any], positions: int, where: object, variants: Sequence[str] = ()
    ) -> None:
        from overproof.export.gguf_check import check_model

        check_model(config, positions, where, variants)

    def write(self, source: Path, file: Path, variant: str, context: ExportContext, unquantised: Path) -> None:
        from overproof.engines.chat_template import require_chat_template
        from overproof.engines.gguf_tokens import read_gguf_header
        from overproof.export.calibration import CalibrationRows
        from overproof.export.gguf_check import require_plain
        from overproof.export.gguf_file import export_gguf
        from overproof.export.gguf_name import written_name
        from overproof.export.gguf_rewrite import convert_gguf
        from overproof.models.hf_directory import chat_template, read_config

        assert context.tokenizer is not None
        rows = CalibrationRows.of(context)
        template = context.settings.chat_template or chat_template(context.teacher)
        name = f"{context.recipe} {file.stem}"
        if not isinstance(family_of(read_config(source), source)[1], GgufFamily):
            require_plain([variant], source)
            name = written_name(name, context.tokenizer.read_text(encoding="utf-8"))
            convert_gguf(source, unquantised, file, variant, name, template)  # type: ignore[arg-type]
        else:
            export_gguf(
                source, context.tokenizer, file, format=variant, name=name, chat_template=template, rows=rows,  # type: ignore[arg-type]
                tell=lambda at: context.tell(f"{file.stem}: {at}"), budget=self._budget(context, unquantised),
            )  # fmt: skip
        if variant == self.unquantised:  # the others of its model have the same
            require_chat_template(read_gguf_header(file), file.name)

    def _budget(self, context: ExportContext, unquantised: Path) -> int | PlainVariant:
        """Bytes that matrices of a mixed file may take: beside them it has what the unquantised one has; or what has as
        many.
        """
        import gguf

        from overproof.export.ggml_blocks import aligned

        mixed: Mixed | None = context.settings.mixed
        if mixed is None or not unquantised.is_file():
            return 0
        if mixed.at_most_mb is None:
            assert mixed.as_large_as is not None
            return mixed.as_large_as
        tensors = gguf.GGUFReader(unquantised).tensors
        matrices = (each for each in tensors if each.tensor_type is not gguf.GGMLQuantizationType.F32)
        beside = unquantised.stat().st_size - sum(aligned(int(each.n_bytes)) for each in matrices) + LONGER_NAME_BYTES
        return round(1e6 * mixed.at_most_mb) - beside

    def difference(self, source: Path, file: Path) -> Difference:
        """Of llama.cpp, which reads the file in its own way, at places spread over a short row and over a long one.

        The long row goes half as far again as a sliding window that llama.cpp knows, so that what the window leaves out
        counts: ``LONG_ROW`` tokens at least, and never past the context that the file names, which ends with a window
        that it does not know. What the model holds for impossible does not count: half precision moves it most.
        """
        import numpy as np
        import torch

        from overproof.engines.gguf_tokens import read_gguf_header
        from overproof.engines.llamacpp_logits import LlamaCppLogits
        from overproof.models.hf_directory import load_model, read_config

        model = load_model(source)
        _, family = family_of(read_config(source), source)
        context = read_gguf_header(file).context_length
        slides = not isinstance(family, GgufFamily) or family.gguf.slides
        window = (model.config.to_dict().get("sliding_window") or 0) if slides else 0
        longest = min(context, max(LONG_ROW, window + window // 2), MOST_TOKENS)
        engine = LlamaCppLogits(file, longest, threads=torch.get_num_threads(), kv_cache="f32")
        generator, differences = torch.Generator().manual_seed(0), list[float]()
        for tokens in sorted({min(SHORT_ROW, longest), longest}):
            tokens_S = torch.randint(model.config.vocab_size, (tokens,), generator=generator)
            places_P = np.unique(np.linspace(0, tokens - 1, CHECKED_PLACES).round().astype(np.int64))
            found_PV = torch.from_numpy(engine.logits_at(tokens_S.numpy(), places_P)).log_softmax(-1)
            with torch.inference_mode():
                logits_PV = model(
                    input_ids=tokens_S[None], use_cache=False, logits_to_keep=torch.from_numpy(places_P)
                ).logits[0]
            model_PV = logits_PV.log_softmax(-1)
            differences.append(float((model_PV.exp() * (model_PV - found_PV).abs()).sum(-1).max()))
        engine.close()
        return Difference(float(np.max(differences)), HALF_PRECISION_NATS, longest)  # NaN stays what it is

    def require_same_weights(self, file: Path, unquantised: Path) -> None:
        """See ``WeighedFormat``: by the error of each tensor, relative to its numbers."""
        from overproof.export.gguf_weights import require_same_weights

        require_same_weights(file, unquantised)

    def read_back(self, file: Path) -> Any:
        """The torch model that the file holds, dequantised to fp32."""
        from overproof.export.gguf_file import read_gguf

        return read_gguf(file)

    def require_size(self, settings: Gguf, size: ModelSize, where: str) -> None:
        """See ``SizedFormat``: with every matrix in the smallest type, and nothing else."""
        most_mb, least_mb = settings.most_mb, size.parameters * LEAST_BYTES / 1e6
        if most_mb is not None and most_mb < least_mb:
            raise InputError(
                f"compress.mixed.at_most_mb: found {most_mb:g}; {where} takes {least_mb:.2f} MB at least: give more, "
                "or a smaller student"
            )

    def export_memory(self, settings: Gguf, size: ModelSize) -> int:
        """See ``SizedFormat``: of a tensor that is quantised, both libraries on a long row, or a calibrated model."""
        from overproof.engines.llamacpp_memory import context_memory

        # A layer in torch, and one in llama.cpp.
        layers = 2 * LONG_ROW * FAMILIES[size.family].layer_memory(size, FP32_BYTES)
        compared = 5 * CHECKED_PLACES * size.outputs * FP32_BYTES  # logits and log-probabilities of both, and a product
        context = context_memory(size, LONG_ROW, CHECKED_PLACES, FP32_BYTES)
        calibrated = 0
        if any("-" in variant for variant in settings.formats):
            calibrated = calibration_memory(size, settings.calibration.rows)
        if "mixed-gptq" in settings.formats:  # weights, gradients and their squares, and a row's backward pass
            row = size.predictions * (3 * FP32_BYTES * size.outputs + size.layers * layers // (2 * LONG_ROW))
            calibrated = max(calibrated, 3 * FP32_BYTES * size.parameters + row)
        return max(FP32_BYTES * max(size.tensors), context + layers + compared, calibrated)

    def companions(self, context: ExportContext) -> Mapping[str, Path]:
        assert context.tokenizer is not None
        return {TOKENIZER: context.tokenizer}


FORMAT = GgufFormat()
