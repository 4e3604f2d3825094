"""The sections that train a model: optimisation, checkpoints, groups of workers, the teacher."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from overproof.config.base import RESOURCE, Count, Cpus, Precision, Section
from overproof.config.models import Model, Pretrained, Served

VALIDATIONS = 8  # of a training, where the recipe does not say how often


class Optimization(Section):
    """AdamW (arXiv 1711.05101) under a learning-rate schedule with linear warm-up."""

    steps: int = Field(ge=0, description="Optimizer steps; 0 keeps the starting weights.")
    batch_size: Count = Field(description="Rows in a global batch.")
    learning_rate: float = Field(gt=0, description="Peak rate.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape after warm-up.")
    final_fraction: float = Field(0.1, ge=0, le=1, description="Last rate as a share of the peak.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled decay of matrices; vectors are not decayed.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the gradient average.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the squared-gradient average.")
    clip_norm: float = Field(1.0, gt=0, description="Largest global gradient norm.")
    validate_every: Count = Field(
        default_factory=lambda given: max(1, given.get("steps", 0) // VALIDATIONS),
        description=f"Steps between validation losses; left out: a {VALIDATIONS}th of the steps.",
    )
    validation_rows: Count = Field(256, description="Rows of the validation split used each time.")


class CheckpointPolicy(Section):
    """What a stopped run goes on from."""

    every_steps: Count = Field(
        100, description="Steps between checkpoints: what a kill may cost, and the steps made while one is written."
    )
    keep_last: Count = Field(2, description="Newest checkpoints kept.")
    keep_best: int = Field(0, ge=0, description="Further checkpoints kept, those of lowest validation loss.")


class ZeroSettings(Section):
    """How each worker of a group trains: DeepSpeed ZeRO (arXiv 1910.02054)."""

    micro_batch_size: Annotated[Count | None, RESOURCE] = Field(
        None, description="Most rows in a forward pass; more of a worker's share are accumulated. null: no limit."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="What is sharded: 1 optimizer, 2 gradients, 3 weights.")
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="What lies in CPU memory: the optimizer (stages 1 to 3), or weights too (stage 3)."
    )
    precision: Precision | Literal["fp16"] = Field(
        "fp32", description="Number format of the forward pass. tf32: fp32, and GPUs may round what they multiply."
    )
    attention: Literal["sdpa", "varlen"] = Field(
        "sdpa",
        description="How rows of several texts are attended within each: by a mask, or by the texts' lengths, which on "
        "GPUs is FlashAttention and takes bf16 or fp16.",
    )
    grad_accum_dtype: Literal["fp32", "bf16"] | None = Field(
        None,
        description="Number format in which the gradients of bf16 are summed over micro-batches. null: fp32 at stages "
        "2 and 3, but bf16 where stage 2 offloads: fp32 would stay on the GPU. Stages without a choice: 1 sums in "
        "bf16, 0 in fp32.",
    )
    bucket_elements: Annotated[Count, RESOURCE] = Field(
        500_000_000,
        description="Most gradients or weights in a collective of stages 1 to 3, as DeepSpeed has it; a buffer as "
        "large lies beside the weights, or as large as all that is trained.",
    )
    overlap_comm: Annotated[bool | None, RESOURCE] = Field(
        None,
        description="Reduce gradients while the backward pass goes on; takes a second buffer below stage 3. null: at "
        "stage 3 alone, as DeepSpeed has it.",
    )
    hpz_partition_size: Annotated[Count, RESOURCE] = Field(
        1,
        description="Workers, those of a node, that hold a second copy of all weights between them, from which the "
        "backward pass gathers (ZeRO++, arXiv 2306.10209): stage 3. 1: none.",
    )
    activation_checkpointing: bool = Field(False, description="Compute activations again in the backward pass.")
    compile: bool = Field(False, description="Run the model through torch.compile.")
    cpus_per_worker: Annotated[Cpus, RESOURCE] = Field(1, description="Logical CPUs reserved by each worker.")
    gpus_per_worker: Annotated[float, RESOURCE] = Field(0, ge=0, description="GPUs reserved by each worker.")

    @property
    def computes_in_half(self) -> bool:
        """Whether a number of the forward pass takes 16 bits."""
        return self.precision in ("bf16", "fp16")

    @model_validator(mode="after")
    def _offload_fits(self) -> Self:
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload 'optimizer' needs zero_stage 1, 2 or 3; found 0")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(f"offload 'parameters' needs zero_stage 3; found {self.zero_stage}")
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        if self.attention == "sdpa":
            return self
        if self.gpus_per_worker and not self.computes_in_half:
            raise ValueError(
                f"attention 'varlen' takes 16 bits on GPUs; found precision {self.precision!r}: expected bf16 or fp16, "
                "or attention 'sdpa'"
            )
        if self.compile:
            raise ValueError(
                "attention 'varlen' has shapes that follow from the texts; found compile true: expected false"
            )
        return self

    @model_validator(mode="after")
    def _communication_fits(self) -> Self:
        if self.grad_accum_dtype is not None and (self.precision != "bf16" or self.zero_stage < 2):
            raise ValueError(
                f"grad_accum_dtype {self.grad_accum_dtype!r} is a choice under precision bf16 at zero_stage 2 or 3; "
                f"found precision {self.precision!r}, zero_stage {self.zero_stage}: expected null"
            )
        if self.overlap_comm and self.zero_stage == 0:
            raise ValueError("overlap_comm true needs zero_stage 1, 2 or 3; found 0")
        if self.hpz_partition_size > 1 and (self.zero_stage != 3 or self.offload == "parameters"):
            raise ValueError(
                f"hpz_partition_size {self.hpz_partition_size} keeps a second copy of the weights of zero_stage 3 on "
                f"the device; found zero_stage {self.zero_stage}, offload {self.offload!r}: expected 1"
            )
        return self

    def require_whole_partitions(self, workers: int) -> None:
        """Raises ValueError unless ``hpz_partition_size`` divides the number of workers."""
        if workers % self.hpz_partition_size:
            raise ValueError(
                f"hpz_partition_size {self.hpz_partition_size} does not divide workers {workers}; expected the workers "
                "of one node, as many on each"
            )

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced while the backward pass goes on."""
        return self.zero_stage == 3 if self.overlap_comm is None else self.overlap_comm

    @property
    def accumulates_fp32(self) -> bool:
        """Whether DeepSpeed is to sum gradients of bf16 in fp32."""
        if self.precision != "bf16" or self.zero_stage < 2:
            return False
        if self.grad_accum_dtype is None:
            return self.zero_stage == 3 or self.offload == "none"
        return self.grad_accum_dtype == "fp32"


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685): the weights stay as they are, and a product of two thin matrices beside
    each is trained, which is merged into it when training ends.
    """

    rank: Count = Field(8, description="Width between the two matrices of an adapter.")
    alpha: float = Field(16.0, gt=0, description="What an adapter adds counts alpha / rank times.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of an adapter's inputs that is dropped in training.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        min_length=1,
        description="Layers with an adapter: all-linear, every linear one but the output layer; or ends of their "
        "names, such as [q_proj, v_proj].",
    )


class Training(Optimization, ZeroSettings):
    """A model trained by a group of workers."""

    lora: Lora | None = Field(None, description="Adapters that are trained in place of the weights; null trains all.")

    workers: Annotated[Count | tuple[Count, Count], RESOURCE] = Field(
        2, description="Training processes, or [fewest, most] if elastic."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A loss or gradient that is not finite ends the run, or its step is left out."
    )
    checkpoint: Annotated[CheckpointPolicy, RESOURCE] = CheckpointPolicy()
    result: Literal["last", "best"] = Field(
        "last", description="Weights given on: after the last step, or of the best checkpoint kept."
    )
    max_failures: Annotated[Count, RESOURCE] = Field(
        8, description="Failures in a row without a new checkpoint that end the run."
    )

    @property
    def fewest(self) -> int:
        """Workers that suffice."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Workers at most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def scored_checkpoints(self) -> frozenset[int]:
        """Steps of checkpoints that need a validation loss, so that the best can be told."""
        every = self.checkpoint.every_steps
        return frozenset(range(every, self.steps, every)) if self.result == "best" else frozenset()

    @property
    def worlds(self) -> tuple[int, ...]:
        """The numbers of workers it may run on: between the limits, dividing the batch, in whole partitions."""
        numbers = range(self.fewest, self.most + 1)
        return tuple(n for n in numbers if self.batch_size % n == 0 and n % self.hpz_partition_size == 0)

    def accumulation(self, world: int) -> int:
        """Forward passes in a step: the fewest equal ones within ``micro_batch_size``."""
        share = self.batch_size // world
        limit = self.micro_batch_size or share
        return next(count for count in range(1, share + 1) if share % count == 0 and share // count <= limit)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.fewest > self.most:
            raise ValueError(f"workers {list(self.workers)} starts above its end; expected [fewest, most]")  # type: ignore[arg-type]
        for world in (self.fewest, self.most):
            if self.batch_size % world:
                raise ValueError(
                    f"batch_size {self.batch_size} is not a multiple of workers {world}; "
                    "every worker takes an equal share"
                )
            self.require_whole_partitions(world)
        if self.result == "best" and self.checkpoint.keep_best == 0:
            raise ValueError("result 'best' needs checkpoint.keep_best of at least 1; found 0")
        return self


class Train(Training):
    """The teacher: DeepSpeed ZeRO under Ray Train."""

    model: Model

    @model_validator(mode="after")
    def _model_fits(self) -> Self:
        if isinstance(self.model, Served) and (self.steps or self.lora):
            raise ValueError("model.kind is 'served', whose weights are not here; expected steps 0 and no lora")
        if self.lora is not None and not isinstance(self.model, Pretrained):
            raise ValueError(
                f"lora: model.kind is {self.model.kind!r}, whose weights are drawn at random and would stay so; "
                "expected a pretrained model, or no lora"
            )
        return self
