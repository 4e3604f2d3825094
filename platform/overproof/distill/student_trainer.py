"""One student in training, on one process and without Ray, from one validation to the next."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from overproof.config.search import current_values
from overproof.data.manifest import START
from overproof.data.parquet_reader import Shards, planned_shards
from overproof.distill.distill_spec import DistillSpec
from overproof.distill.objectives import ON_POLICY
from overproof.distill.on_policy import Scorer, is_on_policy_step, sample_continuations
from overproof.distill.trial_job import CurveSegment, TrialJob, split_at_validations
from overproof.models.compute import start_compute
from overproof.models.hf_directory import Batch, count_parameters, save_model, to_tensors
from overproof.registry import TASKS
from overproof.stage_context import TaskProgress
from overproof.train.checkpoint import CURVE_FILE
from overproof.train.checkpoint_writer import AsyncCheckpointWriter
from overproof.train.engine import STATE_FILE, TorchEngine
from overproof.train.loop import CurveRow, LoopHooks, shard_batches, train_steps, validation_ids, validation_loss
from overproof.train.read_ahead import for_device
from overproof.train.train_job import ResumePoint

TELL_EVERY_S = 2.0  # how far it is, between validations

# Files of each checkpoint, in addition to the engine's state and the curve:
SECONDS_FILE = "seconds"  # of training and of CPU time, in all attempts
VALUES_FILE = "values.json"  # settings that training goes on with
STATE_FILES = (STATE_FILE, CURVE_FILE, SECONDS_FILE, VALUES_FILE)


class StudentTrainer:
    """Trains a student on the rows of the planned order; every trial of a sweep reads the same ones."""

    def __init__(self, job: TrialJob, scorer: Scorer | None = None) -> None:
        """``scorer`` scores what the student writes, where it writes."""
        torch.set_num_threads(job.threads)
        self.scorer = scorer
        self.job = job
        validation = Shards(job.prepared, "validation")
        self.manifest = validation.manifest
        self.train = planned_shards(job.prepared)
        self.order = self.manifest.order(job.seed)
        self.spec = DistillSpec(job)
        ids = validation_ids(validation.rows, job.settings.validation_rows)
        batches = shard_batches(ids, job.settings.batch_size, rank=0, world=1)
        self.validation = [to_tensors(validation.take(batch)) for batch in batches]
        self.faults: list[str] = []  # of checkpoints that could not be used
        start = ResumePoint(job.checkpoints.newest_sound(lambda event: self.faults.append(event.text)))
        self.checkpoint_writer = AsyncCheckpointWriter(job.checkpoints, start.attempt, rank=0, world=1)
        checkpoint = start.checkpoint
        with checkpoint.local() if checkpoint else nullcontext() as folder:
            if folder:
                self.job = job.with_values(json.loads((folder / VALUES_FILE).read_text()))
                self.spec = DistillSpec(self.job)
            self.resumed_step = int(_curve_in(folder)[-1]["step"]) if folder else 0
            self._build(self.spec.model(self.manifest, self.job.seed, self._rounds_before(self.resumed_step)))
            self._start_from(0, [])
            if folder:
                self.load_state(folder)
                segments = list(split_at_validations(self._curve))
                self._replayed = segments if job.replay_history else segments[-1:]

    def _build(self, model: PreTrainedModel) -> None:
        settings = self.job.settings
        where = start_compute(settings.gpus_per_trial, settings.precision)
        self.model = model
        self.projection = self._projection()
        self.engine = TorchEngine(self.model, settings, where, self.job.seed, self.projection)
        self.objective = self.spec.objective(TASKS[self.manifest.task], self.engine.device, self.projection)

    def _start_from(self, step: int, curve: list[CurveRow], spent: tuple[float, float] = (0.0, 0.0)) -> None:
        self._begin, self._curve = step, curve
        self.seconds, self.cpu_seconds = spent
        self._replayed = list[CurveSegment]()
        hooks = LoopHooks(step, extra_validation_steps=self.job.rungs | {*self._further_steps})
        batches = self._batches()
        rows = train_steps(self.engine, self.objective, self.job.settings, batches, self._validate, hooks)
        self._rows = self._told(rows)

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    def run_to_validation(self) -> CurveSegment:
        """Train up to the next validation: every ``validate_every`` steps, at each rung, and after the last step.

        The segments of an attempt that was killed are given first, one by one, without being trained again.

        Raises:
            InputError: the loss is no longer finite, or a checkpoint could not be written.
        """
        if self._replayed:
            return self._replayed.pop(0)
        began, cpu_began = time.perf_counter(), time.process_time()
        segment = next(split_at_validations(self._rows))
        self._curve += segment.curve
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu_began
        self.checkpoint_writer.save(segment.steps, segment.validation_loss, self.engine.save, self._extra_files())
        self._prune_after(segment.steps)
        return segment

    @property
    def _further_steps(self) -> tuple[int, ...]:
        """After which the student loses a further part."""
        return self.job.student.further_steps(self.job.settings.steps)

    def _rounds_before(self, step: int) -> int:
        """Rounds of pruning that a checkpoint of a step has behind it: one that follows the step comes after it."""
        return 1 + sum(each < step for each in self._further_steps)

    def _prune_after(self, step: int) -> None:
        """Go on with a smaller student, where a part goes after this step; its optimizer begins anew."""
        if step in self._further_steps:
            self._build(self.spec.pruned_further(self.model, self._rounds_before(step) + 1))
            self.engine.steps_done = step
            self._start_from(step, self._curve, (self.seconds, self.cpu_seconds))

    def _told(self, rows: Iterator[CurveRow]) -> Iterator[CurveRow]:
        """The rows; now and then the job's progress is told of one."""
        told_s = time.monotonic()
        for row in rows:
            if "loss" in row and time.monotonic() - told_s > TELL_EVERY_S:
                told_s, note = time.monotonic(), f"loss {row['loss']:.3f}"
                self.job.progress(TaskProgress(self.job.name, int(row["step"]), self.job.settings.steps, note))
            yield row

    def save_weights(self) -> None:
        """Write a Hugging Face directory into the job's folder of the draft.

        Raises:
            InputError: the last checkpoint could not be written.
        """
        self.checkpoint_writer.wait()
        tokenizer = self.manifest.tokenizer(self.job.prepared)
        with self.job.draft.directory(self.job.folder) as folder:
            save_model(self.model, self.model.config, folder, tokenizer)

    def write_state(self, folder: Path) -> None:
        """The state as it is, for another trial to go on from."""
        self.engine.save(lambda name, value: torch.save(value, folder / name))
        for name, content in self._extra_files().items():
            (folder / name).write_bytes(content)

    def load_state(self, folder: Path) -> None:
        """Go on from the state in a folder, its own or another trial's, under this trial's name and settings."""
        curve = _curve_in(folder)
        self.resumed_step = int(curve[-1]["step"])
        self.engine.load(folder, self.resumed_step)
        seconds, cpu_seconds = map(float, (folder / SECONDS_FILE).read_text().split())
        self._start_from(self.resumed_step, curve, (seconds, cpu_seconds))
        self._prune_after(self.resumed_step)

    def _extra_files(self) -> dict[str, bytes]:
        """What a checkpoint holds in addition to the engine's state."""
        lines = "".join(json.dumps(row) + "\n" for row in self._curve)
        values = json.dumps(current_values(self.job.settings, self.job.student))
        return {
            CURVE_FILE: lines.encode(),
            SECONDS_FILE: f"{self.seconds} {self.cpu_seconds}".encode(),
            VALUES_FILE: values.encode(),
        }

    def _projection(self) -> nn.Linear | None:
        """From the width of the student's states to the teacher's; learned, and no part of the student."""
        teacher = self.spec.teacher
        if teacher is None or self.job.student.states is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.job.seed)
            return nn.Linear(self.model.config.hidden_size, teacher.config.hidden_size, bias=False)

    def _batches(self) -> Iterator[Batch]:
        share = self.job.student.on_policy if self.job.distilled else 0.0
        batches = for_device(self._planned_batches(), self.engine.device)
        for step, batch in enumerate(batches, self._begin):
            yield self._on_policy_batch(batch, step) if is_on_policy_step(step, share) else batch

    def _planned_batches(self) -> Iterator[Batch]:
        settings, pinned = self.job.settings, self.engine.device.type == "cuda"
        for columns in self.train.steps(self.order, settings.batch_size, self._begin, settings.steps):
            columns |= self.spec.columns(columns.pop("sample_id"))
            yield to_tensors(columns, pinned)

    def _on_policy_batch(self, batch: Batch, step: int) -> Batch:
        """What the student, before the step, writes after the rows' prompts, and the teacher's scores of it."""
        settings = self.job.settings.on_policy
        assert settings
        assert self.scorer
        rows = {name: batch[name].to(self.engine.device) for name in ("tokens", START) if name in batch}
        prompts_BQ, start_B = rows["tokens"][:, : settings.prompt_tokens], rows.get(START)
        wanted = (settings.new_tokens, self.job.seed, step)
        tokens_BS = sample_continuations(self.model, prompts_BQ, *wanted, start_B).cpu()
        length_B = torch.full((len(tokens_BS),), tokens_BS.shape[1] - 1)
        scores = to_tensors(self.scorer.score(tokens_BS.numpy()))
        written = {"tokens": tokens_BS, "length": length_B, ON_POLICY: torch.ones_like(length_B)}
        if start_B is not None:
            written[START] = start_B.cpu()
        return written | {f"teacher_{name}": values for name, values in scores.items()}

    def _validate(self) -> float:
        with self.engine.eval_mode() as model:
            return validation_loss(model, TASKS[self.manifest.task].predict, self.validation)


def _curve_in(folder: Path) -> list[CurveRow]:
    return [json.loads(line) for line in (folder / CURVE_FILE).read_text().splitlines()]
