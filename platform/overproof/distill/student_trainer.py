"""One student in training, on one process and without Ray, a chunk of steps at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from overproof.config.search import current_values
from overproof.data.manifest import TOKENIZER
from overproof.data.parquet_reader import Columns as Read
from overproof.data.parquet_reader import Shards, planned_shards
from overproof.distill.distill_spec import DistillSpec
from overproof.distill.objectives import ON_POLICY
from overproof.distill.on_policy import Scorer, is_on_policy_step, sample_continuations
from overproof.distill.trial_job import CurveSegment, TrialJob, split_at_validations
from overproof.models.hf_directory import Batch, count_parameters, save_model, to_tensors
from overproof.train.checkpoint import CURVE_FILE
from overproof.train.checkpoint_writer import AsyncCheckpointWriter
from overproof.train.engine import TorchEngine
from overproof.train.loop import CurveRow, LoopHooks, shard_batches, train_steps, validation_ids, validation_loss
from overproof.train.train_job import ResumePoint

SECONDS = "seconds"  # of training and of CPU time, in all attempts: a file of each checkpoint
VALUES = "values.json"  # settings that training goes on with: the same


class StudentTrainer:
    """Trains a student on the rows of the planned order; every trial of a sweep reads the same ones."""

    def __init__(self, job: TrialJob, asked: Scorer | None = None) -> None:
        """``asked`` judges what the student writes, where it writes."""
        torch.set_num_threads(job.threads)
        self.asked = asked
        self.job, self.root = job, job.prepared.local()
        validation = Shards(self.root, "validation")
        self.manifest = validation.manifest
        self.train = planned_shards(self.root)
        self.order = self.manifest.order(job.seed)
        self.lesson = DistillSpec(job)
        ids = validation_ids(validation.rows, job.settings.validation_rows)
        parts = shard_batches(ids, job.settings.batch_size, rank=0, world=1)
        self.validation = [to_tensors(validation.take(part)) for part in parts]
        self.faults: list[str] = []  # of checkpoints that could not be used
        start = ResumePoint(job.checkpoints.newest_sound(lambda event: self.faults.append(event.text)))
        self.saver = AsyncCheckpointWriter(job.checkpoints, start.attempt, rank=0, world=1)
        found = start.checkpoint
        with found.local() if found else nullcontext() as folder:
            if folder:
                self.job = job.changed(json.loads((folder / VALUES).read_text()))
                self.lesson = DistillSpec(self.job)
            self._build()
            self._go_on(0, [])
            if folder:
                self.load(folder)
                past = list(split_at_validations(self._curve))
                self._past = past if job.retold else past[-1:]

    def _build(self) -> None:
        self.model = self.lesson.model(self.manifest, self.job.seed)
        self.projection = self._projection()
        self.engine = TorchEngine(self.model, self.job.settings, seed=self.job.seed, auxiliary=self.projection)
        self.objective = self.lesson.objective(self.engine.device, self.projection)

    def _go_on(self, step: int, curve: list[CurveRow], spent: tuple[float, float] = (0.0, 0.0)) -> None:
        self.began_at, self._curve = step, curve
        self.seconds, self.cpu_seconds = spent
        self._past = list[CurveSegment]()
        batches, hooks = self._batches(), LoopHooks(step, extra_validation_steps=self.job.rungs)
        self._rows = train_steps(self.engine, self.objective, self.job.settings, batches, self._validate, hooks)

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    def advance(self) -> CurveSegment:
        """Train up to the next validation: every ``validate_every`` steps, at each rung, and after the last step.

        What an attempt that was killed has done is given again first, chunk by chunk, without being done again.

        Raises:
            InputError: the loss is no longer finite, or a checkpoint could not be written.
        """
        if self._past:
            return self._past.pop(0)
        began, busy_s = time.perf_counter(), time.process_time()
        part = next(split_at_validations(self._rows))
        self._curve += part.curve
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - busy_s
        self.saver.save(part.steps, part.validation_loss, self.engine.save, self._beside())
        return part

    def save(self) -> None:
        """Write a Hugging Face directory into the job's folder of the draft.

        Raises:
            InputError: the last checkpoint could not be written.
        """
        self.saver.wait()
        tokenizer = self.root / TOKENIZER if self.manifest.kind == "text" else None
        with self.job.draft.directory() as folder:
            save_model(self.engine.state_dict(), self.model.config, folder / self.job.folder, tokenizer)

    def write(self, folder: Path) -> None:
        """The state as it is, for another trial to go on from."""
        self.engine.save(lambda name, value: torch.save(value, folder / name))
        for name, content in self._beside().items():
            (folder / name).write_bytes(content)

    def load(self, folder: Path) -> None:
        """Go on from the state in a folder, under this trial's own name and, where it is not its own, settings."""
        curve = [json.loads(line) for line in (folder / CURVE_FILE).read_text().splitlines()]
        step = int(curve[-1]["step"])
        self.engine.load(folder, step)
        seconds, cpu_seconds = map(float, (folder / SECONDS).read_text().split())
        self._go_on(step, curve, (seconds, cpu_seconds))

    def _beside(self) -> dict[str, bytes]:
        """What a checkpoint holds beside the engine's state."""
        lines = "".join(json.dumps(row) + "\n" for row in self._curve)
        values = json.dumps(current_values(self.job.settings, self.job.student))
        return {
            CURVE_FILE: lines.encode(),
            SECONDS: f"{self.seconds} {self.cpu_seconds}".encode(),
            VALUES: values.encode(),
        }

    def _projection(self) -> nn.Linear | None:
        """From the width of the student's states to the teacher's; learned, and no part of the student."""
        teacher = self.lesson.teacher
        if teacher is None or self.job.student.states is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.job.seed)
            return nn.Linear(self.model.config.hidden_size, teacher.config.hidden_size, bias=False)

    def _batches(self) -> Iterator[Batch]:
        settings, share = self.job.settings, self.job.student.on_policy if self.job.distilled else 0.0
        steps = self.train.steps(self.order, settings.batch_size, self.began_at, settings.steps)
        for step, columns in enumerate(steps, self.began_at):
            columns |= self.lesson.columns(columns.pop("sample_id"))
            yield self._written(columns, step) if is_on_policy_step(step, share) else to_tensors(columns)

    def _written(self, columns: Read, step: int) -> Batch:
        """What the student makes of the rows' prompts, judged. Its weights are those before the step."""
        settings = self.job.settings.on_policy
        assert settings
        assert self.asked
        prompts_BQ = to_tensors(columns)["tokens"][:, : settings.prompt_tokens].to(self.engine.device)
        tokens_BS = sample_continuations(self.model, prompts_BQ, settings.new_tokens, self.job.seed, step).cpu()
        length_B = torch.full((len(tokens_BS),), tokens_BS.shape[1] - 1)
        judged = to_tensors(self.asked.judge(tokens_BS.numpy()))
        written = {"tokens": tokens_BS, "length": length_B, ON_POLICY: torch.ones_like(length_B)}
        return written | {f"teacher_{name}": values for name, values in judged.items()}

    def _validate(self) -> float:
        with self.engine.eval_mode() as model:
            return validation_loss(model, self.validation)
