"""A whole recipe, and how one is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, model_validator

from overproof.config.base import Identifier, OneOf, Section
from overproof.config.data import BpeTokenizer, DataSection, TextData
from overproof.config.distillation import Cache, Generate, Student, Sweep
from overproof.config.evaluation import Evaluate, ExpectedAnswers, Gate, Smaller
from overproof.config.export import FormatSection, Speculate
from overproof.config.models import LayeredModel, Pretrained, Served, StagedModel
from overproof.config.overrides import set_override
from overproof.config.search import Tune
from overproof.config.serving import Serve
from overproof.config.student_models import OfTeacher
from overproof.config.training import Train
from overproof.errors import InputError, suggest_name
from overproof.registry import ENGINES, FAMILIES, FORMATS, TASKS

ATTENTION = "attention"  # the loss of tasks in whose rows each place may look at each
WRITES = "generated_text"  # the loss of tasks whose models write rows themselves
TOKENS = "tokens"  # the label column of tasks whose rows are tokens, each predicted from those before it


class Recipe(Section):
    """One run from data to replicas."""

    name: Identifier = Field(description="Folder of this run's artifacts in the store.")
    store: str = Field("store", description="Folder or URI (s3://, gs://, ...) that holds the artifacts.")
    seed: int = Field(0, ge=0, description="Seed of the order of rows, of initial weights and of the bootstrap.")
    data: Annotated[DataSection, OneOf(TASKS)]
    train: Train
    generate: Generate | None = Field(None, description="Text that the teacher writes for students to read.")
    cache: Cache = Cache()
    sweep: Sweep
    tune: Tune = Tune()
    compress: Annotated[FormatSection, OneOf(FORMATS)]
    evaluate: Evaluate = Evaluate()
    gate: Gate
    speculate: Speculate | None = Field(None, description="The teacher served with the student as its draft.")
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        self._kinds_fit()
        self._served_teacher_suffices()
        self._layers_are_there()
        self._losses_fit()
        self._rules_fit()
        self._candidate_may_be()
        self._prompts_fit()
        self._text_is_written()
        self.tune.check(self.sweep)
        missing = self.temperatures - set(self.cache.temperatures)
        if missing:
            raise ValueError(
                f"the sweep asks for temperature {min(missing):g}, which cache.temperatures "
                f"{list(self.cache.temperatures)} lacks; add it there"
            )
        other = self.divergences - {"forward_kl"}
        if other and self.cache.scheme.kind == "sampled":
            raise ValueError(
                f"the sweep asks for {min(other)}, and cache.scheme.kind is 'sampled', which lacks the teacher's "
                "probabilities of outputs that were not drawn; expected forward_kl, or scheme topk or dense"
            )
        if self.reads_cache:
            self._covers("cache.rows", self.rows_cached, "leave it out")
        names = {student.name for student in self.sweep.students}
        if twice := next((name for name in sorted(self._compressed_files()) if name in names), None):
            raise ValueError(f"a student is named {twice!r}, as a compressed file of another would be; rename it")
        self._roundings_fit()
        if self.train.steps == 0 and not isinstance(self.train.model, Pretrained | Served):
            raise ValueError("train.steps is 0; only a pretrained model, or a served one, may go untrained")
        return self

    def _kinds_fit(self) -> None:
        """Whether the families are for the task, and the format and its engine for the families."""
        models = {"train.model": self.train.model} | {
            f"sweep.students.{i}.model": student.model for i, student in enumerate(self.sweep.students)
        }
        fitting = {
            kind: family for kind, family in FAMILIES.items() if self.data.kind in family.tasks and family.section
        }
        written = FORMATS[self.compress.kind]
        for where, model in models.items():
            if model.kind not in FAMILIES:
                continue
            if model.kind not in fitting:
                needed = " or ".join(map(repr, fitting))
                raise ValueError(f"{where}.kind is {model.kind!r}; data.kind {self.data.kind!r} needs {needed}")
            if model.kind not in written.families:
                able = [kind for kind, each in FORMATS.items() if model.kind in each.families]
                raise ValueError(
                    f"compress.kind is {self.compress.kind!r}; {where}.kind {model.kind!r} needs "
                    f"{' or '.join(map(repr, able))}"
                )
        if self.engine not in written.engines:
            raise ValueError(
                f"evaluate.engine: found {self.engine!r}; compress.kind {self.compress.kind!r} is served by "
                f"{' or '.join(map(repr, written.engines))}"
            )
        asked = self.evaluate.kv_cache
        if asked != "f16" and asked not in (caches := ENGINES[self.engine].kv_caches):
            raise ValueError(
                f"evaluate.kv_cache: found {asked!r}; {self.engine} has "
                f"{' or '.join(map(repr, caches)) or 'none'}: leave it out"
            )
        if self.speculate is not None:
            if written.drafting_engine is None:
                raise ValueError(
                    f"speculate: compress.kind {self.compress.kind!r} holds models that write no text; expected none"
                )
            if self.engine != written.drafting_engine:
                raise ValueError(
                    f"evaluate.engine: found {self.engine!r} with speculate; expected {written.drafting_engine!r}, "
                    "which answers with a draft"
                )
            if self.compress.teacher:
                raise ValueError(
                    "speculate: its draft is a student, and compress.teacher may ship another; expected false"
                )
            if self.speculate.teacher in {student.name for student in self.sweep.students}:
                raise ValueError(f"a student is named {self.speculate.teacher!r}, as the teacher's file is; rename it")

    @property
    def engine(self) -> str:
        """What measures the exported files, and serves what passed."""
        return self.evaluate.engine or next(iter(FORMATS[self.compress.kind].engines))

    @property
    def needs_teacher_file(self) -> bool:
        """Whether the teacher is exported or cut down, and does not teach alone."""
        students = (student.model for student in self.sweep.students)
        return self.compress.teacher or self.speculate is not None or any(isinstance(s, OfTeacher) for s in students)

    @property
    def writes(self) -> bool:
        """Whether the task's models write rows themselves."""
        return WRITES in TASKS[self.data.kind].losses

    def _layers_are_there(self) -> None:
        """A directory's layers are counted when there is need to look into it."""
        if not isinstance(self.train.model, LayeredModel | StagedModel):
            return
        for index, student in enumerate(self.sweep.students):
            where, whole = f"sweep.students.{index}.model", self.train.model
            try:
                if isinstance(student.model, OfTeacher):
                    student.model.left_of(whole)
            except InputError as error:
                raise ValueError(f"{where}.{error}") from None

    def _served_teacher_suffices(self) -> None:
        if not isinstance(self.train.model, Served):
            return
        for beyond, expected in self._beyond_an_endpoint():
            raise ValueError(
                f"{beyond}: train.model.kind is 'served', and of a teacher an endpoint tells the likeliest tokens at "
                f"each place of a given row, at temperature 1, and text that it writes; expected {expected}"
            )

    def _beyond_an_endpoint(self) -> Iterator[tuple[str, str]]:
        """What of the recipe asks for more of its teacher than an endpoint tells, and what would do."""
        if TASKS[self.data.kind].label_column != TOKENS:
            yield f"data.kind {self.data.kind!r}", "language_modeling or chat"
        if isinstance(self.data, TextData) and isinstance(self.data.tokenizer, BpeTokenizer):
            yield "data.tokenizer.kind 'bpe'", "{kind: file, path: the served model's directory}"
        if self.speculate is not None:
            yield "speculate", "no such section"
        if self.compress.teacher:
            yield "compress.teacher", "false"
        if self.reads_cache and self.cache.scheme.kind != "topk":
            yield f"cache.scheme.kind {self.cache.scheme.kind!r}", "{kind: topk, k: 20}"
        if self.reads_cache and (other := (self.temperatures | set(self.cache.temperatures)) - {1.0}):
            yield (
                f"temperature {min(other):g}",
                ("1 for the cache and every student that reads it: what all other tokens weigh at another is not told"),
            )
        for index, student in enumerate(self.sweep.students):
            where = f"sweep.students.{index}"
            if isinstance(student.model, OfTeacher):
                yield (
                    f"{where}.model.kind {student.model.kind!r}",
                    "a model of its own, such as {kind: pretrained, path: ...}",
                )
            if student.teacher == "live":
                yield f"{where}.teacher 'live'", "'cached'"
            for name in ("relations", "states", "on_policy"):
                if getattr(student, name):
                    yield f"{where}.{name}", "none"
        for index, rule in enumerate(self.gate.rules):
            if isinstance(rule, Smaller) and rule.against == "teacher":
                yield (
                    f"gate.rules.{index}.against 'teacher', whose size is not known here",
                    "{kind: size, at_most_mb: ...}",
                )

    def _losses_fit(self) -> None:
        for index, student in enumerate(self.sweep.students):
            if student.relations is not None and ATTENTION not in TASKS[self.data.kind].losses:
                raise ValueError(
                    f"sweep.students.{index}.relations: models of {self.data.kind} are not compared by their "
                    "attention; expected none"
                )

    def _rules_fit(self) -> None:
        for index, rule in enumerate(self.gate.rules):
            if isinstance(rule, ExpectedAnswers) and not TASKS[self.data.kind].expects_answers:
                able = " or ".join(repr(kind) for kind, task in TASKS.items() if task.expects_answers)
                raise ValueError(
                    f"gate.rules.{index}.kind is 'expected'; records of {self.data.kind!r} do not say what an answer "
                    f"must be, those of {able} may"
                )

    def _compressed_files(self) -> list[str]:
        """Names of the files that the gate may choose from."""
        models = [student.name for student in self.sweep.students] + ["teacher"] * self.compress.teacher
        return [f"{model}-{format}" for model in models for format in self.compress.formats]

    def _candidate_may_be(self) -> None:
        """Trials of a search have the names of their students, with a number."""
        found = self.gate.candidate
        if found is None:
            return
        names = self._compressed_files()
        trial = re.sub(r"-\d{3,}-", "-", found)
        if found not in names and trial not in names:
            raise ValueError(
                f"gate.candidate: found {found!r}; expected one of {', '.join(names)}{suggest_name(trial, names)}"
            )

    def _roundings_fit(self) -> None:
        searched = self.tune.space.rounding
        asked = {f"sweep.students.{i}.rounding": student.rounding for i, student in enumerate(self.sweep.students)}
        asked |= {
            f"tune.space.rounding.values.{i}": value for i, value in enumerate(searched.values if searched else ())
        }
        for where, rounding in asked.items():
            if rounding is not None and rounding not in self.compress.trained_roundings:
                known = " or ".join(self.compress.trained_roundings) or "none: no variant of compress has one"
                raise ValueError(
                    f"{where}: found {rounding!r}; expected {known}, so that it learns in numbers that a file has"
                )

    def _prompts_fit(self) -> None:
        written = self.sweep.on_policy
        if written is None:
            return
        if not self.writes:
            raise ValueError(f"sweep.on_policy: models of {self.data.kind} write no rows; expected no such section")
        places = written.prompt_tokens + written.new_tokens
        if places > self.data.positions + 1:
            raise ValueError(
                f"sweep.on_policy: prompt_tokens {written.prompt_tokens} + new_tokens {written.new_tokens} = {places} "
                f"is more than a row of sequence_length {self.data.positions} + 1 tokens"
            )

    def _covers(self, field: str, rows: int | None, otherwise: str) -> None:
        needed = self.rows_read
        if rows is not None and needed > rows:
            raise ValueError(
                f"sweep reads {needed // self.largest_batch} x {self.largest_batch} = {needed} rows, and {field} "
                f"is {rows}; raise {field}, or {otherwise}"
            )

    def _text_is_written(self) -> None:
        """Whether what students read is there, and the cache is of the rows that its readers train on."""
        settings, students = self.generate, list(enumerate(self.sweep.students))
        readers = [student for _, student in students if student.text == "teacher"]
        if settings is None:
            if readers:
                raise ValueError(f"student {readers[0].name} has text: teacher; expected a section generate")
            return
        if not self.writes:
            raise ValueError(f"generate: models of {self.data.kind} write no rows; expected no such section")
        if settings.prompt_tokens >= self.data.positions:
            raise ValueError(
                f"generate.prompt_tokens is {settings.prompt_tokens}; expected less than data.sequence_length "
                f"{self.data.positions}"
            )
        if not readers:
            raise ValueError("generate: no student has text: teacher; give one that, or leave the section out")
        self._covers("generate.rows", settings.rows, "set it to null to write every row")
        if settings.rows is not None and (self.cache.rows == "all" or (self.cache.rows or 0) > settings.rows):
            raise ValueError(f"cache.rows is {self.cache.rows}, and generate.rows {settings.rows}; expected no more")
        for index, student in students:
            if self._reads_cache(student) and student.text == "data":
                raise ValueError(
                    f"sweep.students.{index}.text is 'data'; with a section generate the cache holds what the teacher "
                    "thinks of its own text: expected text: teacher, or teacher: live"
                )

    def _reads_cache(self, student: Student) -> bool:
        """Whether some trial of a student learns from the cached outputs."""
        searched = self.tune.space.teacher_weight is not None
        return student.teacher == "cached" and (searched or student.reads_cache)

    @property
    def reads_cache(self) -> bool:
        """Whether some trial of the sweep does."""
        return any(self._reads_cache(student) for student in self.sweep.students)

    @property
    def rows_cached(self) -> int | None:
        """Rows that the cache covers; None is every row."""
        if self.cache.rows is None:
            return self.generate.rows if self.generate else self.rows_read
        return None if self.cache.rows == "all" else self.cache.rows

    @property
    def scorer_temperatures(self) -> tuple[float, ...]:
        """Those at which teachers tell what they think of what students wrote."""
        listed = self.tune.space.temperature
        searched = listed.values if listed else [student.temperature for student in self.sweep.students]
        return tuple(sorted({1.0, *searched}))

    @property
    def temperatures(self) -> set[float]:
        """Those at which trials of the sweep read the cache."""
        listed, readers = self.tune.space.temperature, [s for s in self.sweep.students if self._reads_cache(s)]
        return set(listed.values) if listed and readers else {student.temperature for student in readers}

    @property
    def divergences(self) -> set[str]:
        """Those by which trials of the sweep learn from the cache."""
        listed, readers = self.tune.space.divergence, [s for s in self.sweep.students if self._reads_cache(s)]
        return set(listed.values) if listed and readers else {student.divergence for student in readers}

    @property
    def rows_read(self) -> int:
        """Rows in training order that a trial of the largest batch and the most steps reads."""
        return self.tune.most_steps(self.sweep) * self.largest_batch

    @property
    def largest_batch(self) -> int:
        """Rows in a batch, of any trial."""
        batches = self.tune.space.batch_size
        return max(batches.values) if batches else self.sweep.batch_size


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe from YAML and apply ``a.b=value`` overrides.

    Raises:
        InputError: the file cannot be read, is not YAML, or does not fit the schema.
    """
    tree = read_yaml_mapping(path, "a recipe, such as jobs/recipes/digits.yaml", "a mapping of sections")
    for override in overrides:
        set_override(tree, override, Recipe)
    return Recipe.parse(tree, str(path))


def read_yaml_mapping(path: str | Path, file: str, content: str) -> dict[str, Any]:
    """A YAML file that holds a mapping; ``file`` and ``content`` say what was expected.

    Raises:
        InputError: it cannot be read, is not YAML, or holds something else.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected {file}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: found {type(tree).__name__} at the top level, expected {content}")
    return tree
