"""compressed-tensors, which vLLM reads as it is; the file itself is written in ``compressed_tensors_file``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from overproof.config.export import Calibration, FormatSection
from overproof.data.manifest import TOKENIZER
from overproof.errors import InputError
from overproof.export.base import OWN_BYTES, Difference, ExportContext, calibration_memory
from overproof.models.base import GgufFamily
from overproof.models.sizes import FP32_BYTES, ModelSize, most_positions
from overproof.registry import FAMILIES

CHECKED_TOKENS = 128  # that a file is held against its model on
BFLOAT16_NATS = 0.2  # eight bits of each number: measured on SmolLM2-135M, itself trained in them, 0.02


class CompressedTensors(FormatSection):
    """compressed-tensors, which vLLM computes with as it is: for GPUs.

    ``int8`` rounds weights and, as it runs, activations to eight bits, ``fp8`` to eight bits of floating point (e4m3,
    arXiv 2209.05433), ``int4`` weights alone to four, a scale for each 32 to 128; with ``-gptq`` later columns make up
    for earlier ones (arXiv 2210.17323). Tables and the output layer are in bfloat16.
    """

    kind: Literal["compressed_tensors"] = "compressed_tensors"
    by_quality: ClassVar[tuple[str, ...]] = ("int8", "fp8", "int4-gptq", "int4")
    formats: tuple[Literal["int8", "fp8", "int4", "int4-gptq"], ...] = Field(("int8",), min_length=1)
    calibration: Calibration = Calibration()
    chat_template: str | None = Field(
        None,
        description="Jinja text that makes a prompt of chat messages; null takes the teacher's own, if any.",
    )

    @property
    def calibration_rows(self) -> int:
        """A calibrated variant reads all three times."""
        return 3 * self.calibration.rows * sum("-" in variant for variant in self.formats)


class CompressedTensorsFormat:
    """See ``Format``."""

    section = CompressedTensors
    suffix = ".safetensors"
    unquantised = "bf16"
    engines: Mapping[str, str] = {"vllm": OWN_BYTES}
    library = "transformers"
    further_families = ""
    drafting_engine = None

    @property
    def families(self) -> tuple[str, ...]:
        """The decoders whose vocabularies engines are told by GGUF's names of them."""
        return tuple(kind for kind, family in FAMILIES.items() if isinstance(family, GgufFamily))

    def check_tokenizer(self, text: str, where: object) -> tuple[str, ...]:
        """vLLM is given token ids; which bytes each stands for has to be known."""
        from overproof.export.gguf_vocabulary import read_vocabulary

        read_vocabulary(text, where)
        return ()

    def check_template(self, settings: CompressedTensors, directory: str | None) -> None:
        from overproof.engines.chat_template import require_default_template

        require_default_template(settings.chat_template, directory)

    def check_model(
        self, config: Mapping[str, Any], positions: int, where: object, variants: Sequence[str] = ()
    ) -> None:
        from overproof.export.compressed_tensors_file import configuration, linear_weights
        from overproof.export.compressed_tensors_schemes import LEAST_GROUP, group_size

        read, family = configuration(dict(config), where)
        columns = linear_weights(read, family)
        if not columns:
            raise InputError(
                f"{where}/config.json: the layers of a {type(read).__name__} hold none that compressed-tensors calls "
                "Linear; expected a model of another family, or compress.kind gguf"
            )
        if any(variant.startswith("int4") for variant in variants) and group_size(columns.values()) is None:
            name, width = next((n, c) for n, c in columns.items() if c % LEAST_GROUP)
            raise InputError(
                f"{where}: compress.formats: int4 of {name}, which has {width} columns; expected a multiple of "
                f"{LEAST_GROUP} that share a scale: leave int4 out"
            )
        most = most_positions(config)
        if most is not None and positions > most:
            raise InputError(
                f"{where}/config.json: rows of {positions} tokens (data.sequence_length), and the model has {most} "
                f"positions: lower data.sequence_length to {most}"
            )

    def write(self, source: Path, file: Path, variant: str, context: ExportContext, unquantised: Path) -> None:
        from overproof.export.calibration import CalibrationRows
        from overproof.export.compressed_tensors_file import write_compressed
        from overproof.models.hf_directory import chat_template

        del unquantised
        rows = CalibrationRows.of(context)
        template = context.settings.chat_template or chat_template(context.teacher)
        write_compressed(source, file, variant, template, rows, lambda at: context.tell(f"{file.stem}: {at}"))

    def difference(self, source: Path, file: Path) -> Difference:
        """On a row of random tokens; what the model holds for impossible does not count."""
        import torch

        from overproof.models.hf_directory import load_model

        models = [load_model(source), self.read_back(file)]
        tokens = min(CHECKED_TOKENS, most_positions(models[0].config.to_dict()) or CHECKED_TOKENS)
        tokens_BS = torch.randint(models[0].config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            logits = [each(input_ids=tokens_BS, use_cache=False).logits[0] for each in models]
        model_SV, found_SV = (each_SV.log_softmax(-1) for each_SV in logits)
        nats_S = (model_SV.exp() * (model_SV - found_SV).abs()).sum(-1)
        return Difference(float(nats_S.max()), BFLOAT16_NATS, tokens)

    def require_same_weights(self, file: Path, unquantised: Path) -> None:
        """See ``WeighedFormat``."""
        from overproof.export.compressed_tensors_file import require_same_weights

        require_same_weights(file, unquantised)

    def read_back(self, file: Path) -> Any:
        """The torch model that the file holds, which rounds activations where its engine does."""
        from overproof.export.compressed_tensors_file import read_compressed

        return read_compressed(file)

    def require_size(self, settings: CompressedTensors, size: ModelSize, where: str) -> None:
        """See ``SizedFormat``: no variant is made to a size."""

    def export_memory(self, settings: CompressedTensors, size: ModelSize) -> int:
        """See ``SizedFormat``: two models that are compared, or one that is calibrated and what is made of it."""
        compared = FP32_BYTES * (2 * size.parameters + 7 * CHECKED_TOKENS * size.outputs)
        calibrated = any("-" in variant for variant in settings.formats)
        written = 2 * size.parameters
        return max(compared, written + calibration_memory(size, settings.calibration.rows) if calibrated else 0)

    def companions(self, context: ExportContext) -> Mapping[str, Path]:
        assert context.tokenizer is not None
        return {TOKENIZER: context.tokenizer}


FORMAT = CompressedTensorsFormat()
