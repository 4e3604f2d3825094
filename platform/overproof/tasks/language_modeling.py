"""Language modeling: documents as packed rows of tokens, judged by bits per byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from overproof.config.data import BpeTokenizer, TextData
from overproof.models.base import DataShape, Prediction
from overproof.tasks.base import CardWords, FileScores, FurtherMetric, Loss, Metric, QualityMetric, ScoringTime, Tell

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from overproof.config import Evaluate
    from overproof.data.manifest import Manifest
    from overproof.data.source_files import FileListing
    from overproof.engines.base import LogitsReader, TextScorer
    from overproof.engines.probe import Say
    from overproof.export.base import Format
    from overproof.stage_context import StageContext
    from overproof.tasks.recognition import ColumnFlags, DataLook, Recognised

    Batch = dict[str, Tensor]

BITS_PER_NAT = 1.4426950408889634


class LanguageModelingData(TextData):
    """Documents, cleaned, split by content hash, tokenised and packed to one length."""

    kind: Literal["language_modeling"] = "language_modeling"


class CausalTask:
    """See ``Task``: what every task of rows of tokens has whose models predict each from those before it."""

    quality = QualityMetric(
        name="bits_per_byte",
        title="bits per byte",
        unit="bits/byte",
        higher_is_better=False,
        relative=True,
        scale=BITS_PER_NAT,  # of nats over bytes
    )
    further: tuple[FurtherMetric, ...] = ()
    speed, speed_unit = "decode_tokens_per_s", "tokens/s"
    expects_answers = False
    label_column = "tokens"  # each predicts the next
    pipeline_tag = "text-generation"
    counted: str | None = None

    def units(self, root: Path, most: int | None) -> NDArray[np.int64]:
        """Documents, or conversations, numbered in the order of their contents' hashes."""
        from overproof.tasks.text_evaluation import TestDocuments

        return TestDocuments.of(root, most).documents

    def clusters(self, root: Path, units: NDArray[np.int64]) -> NDArray[np.int64]:
        from overproof.tasks.text_evaluation import document_clusters

        return document_clusters(root, units)

    def score(
        self, file: Path, root: Path, units: NDArray[np.int64], settings: Evaluate, engine: str, format: Format,
        tell: Tell,
    ) -> FileScores:  # fmt: skip
        from overproof.files import file_sha256
        from overproof.tasks.text_evaluation import open_scorer

        threads, gpus = settings.scoring_threads, settings.gpus_per_task
        scorer = open_scorer(file, root, engine, format, threads, gpus, settings.precision, kv_cache=settings.kv_cache)
        return self.score_by(scorer, file_sha256(file), root, units, settings, tell)

    def score_by(
        self, scorer: TextScorer, sha256: str, root: Path, units: NDArray[np.int64], settings: Evaluate, tell: Tell
    ) -> FileScores:
        from overproof.tasks.text_evaluation import score_text

        try:
            return score_text(sha256, root, units, scorer, tell, ScoringTime(settings.score_s), self.counted)
        finally:
            scorer.close()

    def probe(
        self, file: Path, root: Path, settings: Evaluate, engine: str, format: Format, say: Say
    ) -> dict[str, Metric]:
        from overproof.tasks.text_evaluation import measure_text

        return measure_text(file, root, settings, engine, format, say)

    def divergence(
        self, file: Path, teacher: Path, root: Path, settings: Evaluate, engine: str, format: Format, say: Say
    ) -> dict[str, Metric]:
        from overproof.data.manifest import Manifest
        from overproof.tasks.text_evaluation import open_logits

        beside = open_logits(teacher, Manifest.read(root).positions, settings, engine, format)
        return self.divergence_by(beside, file, root, settings, engine, format, say)

    def divergence_by(
        self, teacher: LogitsReader, file: Path, root: Path, settings: Evaluate, engine: str, format: Format, say: Say
    ) -> dict[str, Metric]:
        from overproof.tasks.divergence import text_divergence

        return text_divergence(file, teacher, root, settings, engine, format, self.counted, say)


class LanguageModeling(CausalTask):
    """See ``Task``."""

    section = LanguageModelingData
    unit, test_unit = "token", "document"
    losses: frozenset[Loss] = frozenset({"outputs", "attention", "hidden_states", "generated_text"})
    route = "/v1/completions"
    template = "language_modeling.yaml"

    def recognise(self, look: DataLook, model: Mapping[str, Any] | None, flags: ColumnFlags) -> Recognised:
        from overproof.tasks.text_recognition import recognise_text

        return recognise_text(look, model, flags)

    def source_files(self, data: LanguageModelingData) -> FileListing:
        from overproof.data.sources import list_text_files

        return list_text_files(data)

    def source_digest(self, data: LanguageModelingData) -> str:
        from overproof.data.sources import text_digest

        return text_digest(data)

    def shape(self, data: LanguageModelingData) -> DataShape:
        if isinstance(data.tokenizer, BpeTokenizer):
            return DataShape(data.kind, data.tokenizer.vocab_size, data.positions, apart=data.apart)
        from overproof.data.text_tokenizer import read_tokenizer

        return DataShape(data.kind, read_tokenizer(data.tokenizer).outputs, data.positions, apart=data.apart)

    def check_export(self, data: LanguageModelingData, format: Format) -> Sequence[str]:
        if isinstance(data.tokenizer, BpeTokenizer):
            return ()
        from overproof.data.text_tokenizer import read_tokenizer

        return format.check_tokenizer(read_tokenizer(data.tokenizer).json, "data.tokenizer")

    def prepare(self, context: StageContext) -> Manifest:
        from overproof.data.prepare import prepare_documents

        assert isinstance(context.recipe.data, TextData)
        return prepare_documents(context, context.recipe.data)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """A causal model on the columns ``tokens`` (B, P + 1), ``length`` (B) and, perhaps, ``start`` (B)."""
        from overproof.tasks.text_evaluation import predict

        return predict(model, batch)

    def segments(self, batch: Batch, states_BPD: Tensor) -> Tensor:
        import torch

        from overproof.data.manifest import START
        from overproof.models.documents import starts_of_documents

        places_P = torch.arange(states_BPD.shape[1], device=states_BPD.device)
        held_BP = places_P < batch["length"][:, None]
        if START not in batch:
            return held_BP
        return (1 + starts_of_documents(batch["tokens"][:, :-1], batch[START]).cumsum(1)) * held_BP

    def example(self, details: Mapping[str, Any]) -> dict[str, Any]:
        return {"prompt": details.get("example", "The "), "max_tokens": 48, "temperature": 0.7, "seed": 0}

    def describe_reply(self, body: Mapping[str, Any], reply: Mapping[str, Any]) -> str:
        return f"{body['prompt']}{reply['choices'][0]['text']}"

    def card(self, manifest: Manifest, settings: Evaluate) -> CardWords:
        return CardWords(
            summary="A language model",
            intended_use=(
                "It continues text that resembles its training data. It follows no instructions, and repeats what lies "
                "in that data, with its licences and its errors. It was measured on contexts of "
                f"{manifest.positions} tokens; longer ones are accepted and were not measured. It was not tested for "
                "harmful output."
            ),
            latency=f"32 prompt tokens at most, {settings.decode_tokens} generated at most",
        )


TASK = LanguageModeling()
