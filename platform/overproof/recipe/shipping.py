"""The sections that ship: compression, measurement, policy, serving."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from overproof.recipe.section import Count, Cpus, Fraction, Section


class Gguf(Section):
    """llama.cpp's file format, for language models."""

    kind: Literal["gguf"] = "gguf"
    formats: tuple[Literal["q8_0", "q4_0"], ...] = Field(("q8_0", "q4_0"), min_length=1)


class Onnx(Section):
    """ONNX for ONNX Runtime, for classifiers; int8 is dynamic, per output channel."""

    kind: Literal["onnx"] = "onnx"
    formats: tuple[Literal["int8"], ...] = Field(("int8",), min_length=1)


class Evaluate(Section):
    """What is measured on each exported file."""

    max_documents: Count | None = Field(None, description="Test documents used; null uses all.")
    concurrent_tasks: Count = Field(2, description="Exported files scored at the same time.")
    bootstrap_samples: int = Field(2000, ge=100, description="Resamples behind each interval.")
    confidence: Fraction = Field(0.95, description="Coverage of each interval.")
    probe_prompts: Count = Field(4, description="Test documents (or images) the parity probe asks the engine about.")
    probe_tokens: Count = Field(16, description="Tokens the parity probe generates for each prompt.")
    decode_tokens: Count = Field(128, description="Tokens generated for each speed measurement.")
    threads: Count = Field(2, description="Engine threads while measuring.")


class Regression(Section):
    """The quality metric may be worse than the reference's by this much, at the far end of the interval."""

    kind: Literal["regression"] = "regression"
    against: Literal["student", "teacher", "control"] = "student"
    at_most: float = Field(
        ge=0,
        description="Bits per byte: relative increase (0.03 is 3 %). Accuracy: drop (0.02 is two points).",
    )


class Improvement(Section):
    """The quality metric must beat the reference's by more than this, at the near end of the interval."""

    kind: Literal["improvement"] = "improvement"
    against: Literal["student", "teacher", "control"] = "control"
    at_least: float = Field(0.0, ge=0, description="In the units of the regression rule.")


class Smaller(Section):
    """The file must be this many times smaller than the reference's."""

    kind: Literal["smaller"] = "smaller"
    against: Literal["student", "teacher", "control"] = "teacher"
    at_least: float = Field(gt=0, description="Times smaller.")


class Agreement(Section):
    """Top-1 agreement with the teacher, at the near end of the interval."""

    kind: Literal["agreement"] = "agreement"
    at_least: float = Field(ge=0, le=1, description="Share of predictions.")


class Parity(Section):
    """The serving engine must give the torch reference's log-probabilities of the same file."""

    kind: Literal["parity"] = "parity"
    at_most: float = Field(gt=0, description="Largest absolute difference of a log-probability, nats.")


Rule = Annotated[Regression | Improvement | Smaller | Agreement | Parity, Field(discriminator="kind")]


class Gate(Section):
    """The policy: a candidate passes when every rule holds; the smallest that passes is packaged."""

    rules: tuple[Rule, ...] = Field(min_length=1)


class Serve(Section):
    """Autoscaling replicas behind HTTP."""

    host: str = Field("127.0.0.1", description="Address to listen on; any but loopback needs OVERPROOF_API_KEY.")
    port: int = Field(8000, ge=0, le=65535, description="Port; 0 takes a free one.")
    min_replicas: Count = 1
    max_replicas: Count = 2
    cpus_per_replica: Cpus = Field(1, description="Logical CPUs reserved by each replica.")
    threads: Count = Field(1, description="Engine threads in each replica.")
    slots: Count = Field(4, description="Sequences a replica decodes at once.")
    max_tokens: Count = Field(256, description="Most tokens a completion may ask for.")

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self
