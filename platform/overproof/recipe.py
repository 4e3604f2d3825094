"""The recipe: one typed schema behind validation, command-line help, editor completion and fingerprints.

YAML is only its serialised form. Python users build ``Recipe(...)`` directly; every value is frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from overproof.errors import InputError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Cpus = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A frozen part of a recipe that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, tree: Any, where: str = "") -> Self:
        """Validate a plain mapping.

        Raises:
            InputError: naming each field that does not fit, what was found and what was expected.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            prefix = f"{where or cls.__name__.lower()}: "
            raise InputError("\n".join(prefix + _explain(e) for e in error.errors())) from None


# --- data -----------------------------------------------------------------------------------------


class StdlibSource(Section):
    """The source files of the running Python's standard library, without its tests."""

    kind: Literal["stdlib"] = "stdlib"


class FolderSource(Section):
    """Every file below a folder that matches a pattern; one file is one document."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="Folder, or a URI such as s3://bucket/folder.")
    pattern: str = Field("*.txt", description="File name pattern, as in fnmatch.")


class JsonlSource(Section):
    """JSON Lines; one line is one document."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(description="A .jsonl file or a folder of them.")
    field: str = Field("text", description="Key that holds the text.")


class ParquetSource(Section):
    """Parquet; one row is one document."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="A .parquet file or a folder of them.")
    field: str = Field("text", description="Column that holds the text.")


TextSource = Annotated[StdlibSource | FolderSource | JsonlSource | ParquetSource, Field(discriminator="kind")]


class BpeTokenizer(Section):
    """A byte-level BPE tokenizer trained on the train split."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(2048, ge=288, le=65536, multiple_of=32, description="Entries.")


class TokenizerFile(Section):
    """An existing byte-level BPE tokenizer."""

    kind: Literal["file"] = "file"
    path: str = Field(description="A tokenizer.json of the `tokenizers` library.")


class Splits(Section):
    """How rows are split and laid out in shards."""

    validation_fraction: Fraction = Field(0.05, description="Share of documents held out for validation.")
    test_fraction: Fraction = Field(0.05, description="Share of documents held out for the gate.")
    shards: Count = Field(4, description="Train shards written.")
    rows_per_group: Count = Field(16, description="Rows in every Parquet row group.")

    @model_validator(mode="after")
    def _leaves_train(self) -> Self:
        held_out = self.validation_fraction + self.test_fraction
        if held_out >= 1:
            raise ValueError(
                f"validation_fraction + test_fraction is {held_out:g}; expected less than 1, "
                "so that a train split is left"
            )
        return self


class TextData(Splits):
    """Documents, cleaned, split by content hash, tokenised and packed to one length."""

    kind: Literal["text"] = "text"
    source: TextSource = StdlibSource()
    tokenizer: BpeTokenizer | TokenizerFile = Field(BpeTokenizer(), discriminator="kind")
    sequence_length: int = Field(128, ge=8, le=1_048_576, description="Predicted tokens in a row.")


class DigitsData(Splits):
    """scikit-learn's bundled handwritten digits: 1,797 grey images of 8x8 pixels, ten classes."""

    kind: Literal["digits"] = "digits"


# --- models ---------------------------------------------------------------------------------------


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


# --- training -------------------------------------------------------------------------------------


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


class Train(Optimization):
    """The teacher: DeepSpeed ZeRO (arXiv 1910.02054) under Ray Train."""

    model: Model
    workers: Count = Field(2, description="Training processes.")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="What is sharded: 1 optimizer, 2 gradients, 3 weights.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Number format of the forward pass.")
    cpus_per_worker: Cpus = Field(1, description="Logical CPUs reserved by each worker.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs reserved by each worker.")

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of workers {self.workers}; "
                "every worker takes an equal share"
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


# --- compression, proof, serving ------------------------------------------------------------------


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


class Recipe(Section):
    """One run from data to replicas."""

    name: Name = Field(description="Folder of this run's artifacts in the store.")
    store: str = Field("store", description="Folder or URI (s3://, gs://, ...) that holds the artifacts.")
    seed: int = Field(0, ge=0, description="Seed of the order of rows, of initial weights and of the bootstrap.")
    data: TextData | DigitsData = Field(discriminator="kind")
    train: Train
    cache: Cache = Cache()
    sweep: Sweep
    compress: Gguf | Onnx = Field(discriminator="kind")
    evaluate: Evaluate = Evaluate()
    gate: Gate
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        text = isinstance(self.data, TextData)
        model, fmt = ("llama", "gguf") if text else ("vit", "onnx")
        found = {"train.model": self.train.model.kind, "compress": self.compress.kind} | {
            f"sweep.students.{i}.model": s.model.kind for i, s in enumerate(self.sweep.students)
        }
        for where, kind in found.items():
            expected = fmt if where == "compress" else model
            if kind not in (expected, "pretrained"):
                raise ValueError(f"{where}.kind is {kind!r}; data.kind {self.data.kind!r} needs {expected!r}")
        missing = {s.temperature for s in self.sweep.students} - set(self.cache.temperatures)
        if missing:
            raise ValueError(
                f"sweep.students ask for temperature {min(missing):g}, which cache.temperatures "
                f"{list(self.cache.temperatures)} lacks; add it there"
            )
        needed = self.sweep.steps * self.sweep.batch_size
        if self.cache.rows is not None and needed > self.cache.rows:
            raise ValueError(
                f"sweep reads {self.sweep.steps} x {self.sweep.batch_size} = {needed} rows, and cache.rows "
                f"is {self.cache.rows}; raise cache.rows, or set it to null to cover every row"
            )
        if self.train.steps == 0 and not isinstance(self.train.model, Pretrained):
            raise ValueError("train.steps is 0; only a pretrained model may go untrained")
        return self


# --- reading --------------------------------------------------------------------------------------


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe from YAML and apply ``a.b=value`` overrides.

    Raises:
        InputError: the file cannot be read, is not YAML, or does not fit the schema.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a recipe, such as jobs/recipes/digits.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: found {type(tree).__name__} at the top level, expected a mapping of sections")
    for override in overrides:
        _set(tree, override)
    return Recipe.parse(tree, str(path))


def _explain(error: Any) -> str:
    tags = {
        "text",
        "digits",
        "llama",
        "vit",
        "pretrained",
        "gguf",
        "onnx",
        "stdlib",
        "folder",
        "jsonl",
        "parquet",
        "bpe",
        "file",
        "regression",
        "improvement",
        "smaller",
        "agreement",
        "parity",
    }
    path = ".".join(str(part) for part in error["loc"] if part not in tags) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown field; `overproof schema --text` lists the fields there are"
    if error["type"] == "missing":
        return f"{path}: missing; expected a value"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if error["loc"] else message
    return f"{path}: found {error['input']!r}; {message[0].lower()}{message[1:]}"


def _set(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set {override}: expected a.b=value, such as train.steps=200")
    *parents, last = path.split(".")
    node: Any = tree
    for i, part in enumerate([*parents, last]):
        key: Any = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise InputError(f"--set {override}: {part!r} is no index of a list of {len(node)}")
            key = int(part)
        elif not isinstance(node, dict):
            raise InputError(f"--set {override}: {'.'.join(path.split('.')[:i])} holds {node!r}, not a section")
        if i == len(parents):
            try:
                node[key] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise InputError(f"--set {override}: the value is not YAML: {error}") from None
        else:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
