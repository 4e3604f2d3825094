"""The sections that train: models, the teacher, its cache, the sweep."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from overproof.recipe.section import Count, Cpus, Name, Section


class Llama(Section):
    """A Llama-architecture language model with tied embeddings, from its configuration."""

    kind: Literal["llama"] = "llama"
    hidden_size: int = Field(ge=32, multiple_of=32, description="Width of the residual stream.")
    intermediate_size: int = Field(ge=32, multiple_of=32, description="Width of the feed-forward layer.")
    layers: Count = Field(description="Decoder layers.")
    heads: Count = Field(description="Query heads.")
    kv_heads: Count = Field(description="Key and value heads; divides heads.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over heads {self.heads} is "
                f"{self.hidden_size / self.heads:g}; expected an even whole number"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        return self


class Vit(Section):
    """A vision transformer for 8x8 grey images, from its configuration (arXiv 2010.11929)."""

    kind: Literal["vit"] = "vit"
    hidden_size: Count = Field(description="Width of the residual stream.")
    intermediate_size: Count = Field(description="Width of the feed-forward layer.")
    layers: Count = Field(description="Encoder layers.")
    heads: Count = Field(description="Attention heads; divides hidden_size.")
    patch_size: Literal[1, 2, 4] = Field(2, description="Patch edge in pixels.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads {self.heads} does not divide hidden_size {self.hidden_size}")
        return self


class Pretrained(Section):
    """A Hugging Face directory with safetensors and, for text, the tokenizer.json of the data."""

    kind: Literal["pretrained"] = "pretrained"
    path: str = Field(description="Local directory.")


Model = Annotated[Llama | Vit | Pretrained, Field(discriminator="kind")]


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
    validate_every: Count = Field(50, description="Steps between validation losses.")
    validation_rows: Count = Field(256, description="Rows of the validation split used each time.")


class Checkpoint(Section):
    """What a stopped run goes on from."""

    every_steps: Count = Field(
        100, description="Steps between checkpoints: what a kill may cost, and the steps made while one is written."
    )
    keep_last: Count = Field(2, description="Newest checkpoints kept.")
    keep_best: int = Field(0, ge=0, description="Further checkpoints kept, those of lowest validation loss.")


class Train(Optimization):
    """The teacher: DeepSpeed ZeRO (arXiv 1910.02054) under Ray Train."""

    model: Model
    workers: Count | tuple[Count, Count] = Field(2, description="Training processes, or [fewest, most] if elastic.")
    micro_batch_size: Count | None = Field(
        None, description="Most rows in a forward pass; more of a worker's share are accumulated. null: no limit."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="What is sharded: 1 optimizer, 2 gradients, 3 weights.")
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="What lies in CPU memory: the optimizer (stages 1 to 3), or weights too (stage 3)."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Number format of the forward pass.")
    activation_checkpointing: bool = Field(False, description="Compute activations again in the backward pass.")
    compile: bool = Field(False, description="Run the model through torch.compile.")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A loss or gradient that is not finite ends the run, or its step is left out."
    )
    checkpoint: Checkpoint = Checkpoint()
    result: Literal["last", "best"] = Field(
        "last", description="Weights given on: after the last step, or of the best checkpoint kept."
    )
    max_failures: Count = Field(8, description="Failures in a row without a new checkpoint that end the run.")
    cpus_per_worker: Cpus = Field(1, description="Logical CPUs reserved by each worker.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs reserved by each worker.")

    @property
    def fewest(self) -> int:
        """Workers that suffice."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Workers at most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def worlds(self) -> tuple[int, ...]:
        """The numbers of workers it may run on: those between the limits that divide the batch."""
        return tuple(n for n in range(self.fewest, self.most + 1) if self.batch_size % n == 0)

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
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload 'optimizer' needs zero_stage 1, 2 or 3; found 0")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(f"offload 'parameters' needs zero_stage 3; found {self.zero_stage}")
        if self.result == "best":
            if self.checkpoint.keep_best == 0:
                raise ValueError("result 'best' needs checkpoint.keep_best of at least 1; found 0")
            if self.checkpoint.every_steps % self.validate_every:
                raise ValueError(
                    f"result 'best' needs a validation loss at each checkpoint: checkpoint.every_steps "
                    f"{self.checkpoint.every_steps} is not a multiple of validate_every {self.validate_every}"
                )
        return self


class Cache(Section):
    """The teacher's targets, computed once and read by every trial."""

    k: Count = Field(32, description="Largest log-probabilities kept for each position.")
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,), min_length=1, description="Temperatures whose full-vocabulary logsumexp is kept."
    )
    rows: Count | None = Field(None, description="Rows covered, in training order; null covers every row.")
    batch_size: Count = Field(32, description="Rows in a forward pass.")
    actors: Count = Field(2, description="Teacher replicas in the actor pool.")
    cpus_per_actor: Cpus = Field(1, description="Logical CPUs reserved by each replica.")
    gpus_per_actor: float = Field(0, ge=0, description="GPUs reserved by each replica.")


class Student(Section):
    """One trial of the sweep."""

    name: Name
    model: Annotated[Llama | Vit, Field(discriminator="kind")]
    temperature: float = Field(1.0, gt=0, description="Softens both distributions (arXiv 1503.02531).")
    teacher_weight: float = Field(
        0.5, ge=0, le=1, description="Share of the teacher's loss; the rest is the labels' cross-entropy."
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="The teacher's loss: KL from it, KL from the student, or a mixture of both."
    )
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="Weight of the teacher in jsd (arXiv 2306.13649).")


class Asha(Section):
    """Asynchronous successive halving (arXiv 1810.05934)."""

    grace_steps: Count = Field(description="Steps every trial runs before it may be stopped.")
    reduction_factor: int = Field(2, ge=2, description="One trial in this many goes on at each rung.")


class Sweep(Optimization):
    """Students distilled from the one cache, and a control: the best student trained without the teacher."""

    students: tuple[Student, ...] = Field(min_length=1)
    asha: Asha
    concurrent_trials: Count = Field(2, description="Trials that run at the same time.")
    cpus_per_trial: Cpus = Field(1, description="Logical CPUs reserved by each trial.")
    gpus_per_trial: float = Field(0, ge=0, description="GPUs reserved by each trial.")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [student.name for student in self.students]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"students share the name {twice[0]!r}; expected every name once")
        if "control" in names:
            raise ValueError("a student is named 'control', the name of the one trained without the teacher; rename it")
        if self.steps == 0:
            raise ValueError("steps is 0; expected at least 1, since a student starts untrained")
        return self
