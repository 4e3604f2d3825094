"""The whole product on one page: the stages in order, what each depends on, and how what is done is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from overproof import console
from overproof.artifacts import Artifact, Store, compute_fingerprint
from overproof.cluster import cluster_checks, preflight, ray_cluster, recipe_checks
from overproof.cluster.placement import require_placeable
from overproof.cluster.progress_relay import relay_progress
from overproof.config import Pretrained, Recipe, Section, Train
from overproof.errors import InputError, suggest_name
from overproof.evaluate.gate import requests_needed
from overproof.files import read_json, storage_fault
from overproof.models.pretrained import directory_identity
from overproof.package.signature import signer_identity
from overproof.registry import ENGINES, TASKS
from overproof.stage_context import StageContext, TaskProgress, no_progress
from overproof.units import format_number


@dataclass(frozen=True)
class Stage:
    """One step of the loop. Its identity is its name, its format, its part of the recipe and its parents."""

    name: str
    entry_point: str  # "module:function"
    parents: tuple[str, ...]
    part: Callable[[Recipe], Any]  # what of a recipe its result follows from
    format: int = 1
    used_by: Callable[[Recipe], bool] = lambda _: True
    on_cluster: bool = True  # or in the process that runs the recipe, which then needs no Ray

    def function(self) -> Callable[[StageContext], dict[str, Any]]:
        """Import what the stage runs; torch and Ray are not loaded before they are needed."""
        module, name = self.entry_point.split(":")
        return getattr(import_module(module), name)  # type: ignore[no-any-return]


def _dump(section: Section | None) -> Any:
    return None if section is None else section.without_resources()


def _train_inputs(train: Train) -> dict[str, Any]:
    """What else the teacher follows from: the files it starts from, and which checkpoints may be the best."""
    starting = {"model_files": directory_identity(train.model.path)} if isinstance(train.model, Pretrained) else {}
    return starting | ({"checkpoint": _dump(train.checkpoint)} if train.result == "best" else {})


def _sweep_inputs(recipe: Recipe) -> dict[str, Any]:
    """What else the students follow from: the files that some start from, and what trials run on where time counts."""
    students = recipe.sweep.students
    found = {s.name: directory_identity(s.model.path) for s in students if isinstance(s.model, Pretrained)}
    starting = {"student_files": found} if found else {}
    return starting | ({"bundles": recipe.sweep.bundles} if "seconds" in recipe.tune.objectives else {})


def _compress_inputs(recipe: Recipe) -> dict[str, Any]:
    """What else is exported."""
    return {} if recipe.speculate is None else {"teacher_format": recipe.speculate.teacher_format}


def _evaluate_inputs(recipe: Recipe) -> dict[str, Any]:
    """What else the figures follow from: the rules, where they say how many test units or timed requests are enough."""
    if recipe.evaluate.narrow is not None:
        return {"gate": _dump(recipe.gate)}
    needed = requests_needed(recipe.gate.rules, recipe.evaluate.confidence)
    return {"timed_requests": needed} if needed > recipe.evaluate.timed_requests else {}


STAGES = (
    Stage("prepare", "overproof.data.prepare:prepare", (),
          lambda r: {"seed": r.seed, "data": _dump(r.data), "source": TASKS[r.data.kind].source_digest(r.data)},
          format=11),
    Stage("train", "overproof.train.ray_trainer:train_teacher", ("prepare",),
          lambda r: {"seed": r.seed, "train": _dump(r.train), **_train_inputs(r.train)}),
    Stage("generate", "overproof.distill.teacher_stages:generate_text", ("prepare", "train"),
          lambda r: {"seed": r.seed, "generate": _dump(r.generate)}, used_by=lambda r: r.generate is not None),
    Stage("cache", "overproof.distill.teacher_stages:cache_targets", ("prepare", "train", "generate"),
          lambda r: {"seed": r.seed, "cache": {**_dump(r.cache), "rows": r.rows_cached}},
          format=3, used_by=lambda r: r.reads_cache),
    Stage("sweep", "overproof.distill.sweep:sweep", ("prepare", "train", "generate", "cache"),
          lambda r: {"seed": r.seed, "sweep": _dump(r.sweep), "tune": _dump(r.tune), **_sweep_inputs(r)},
          format=3),
    Stage("compress", "overproof.export.stage:export_models", ("prepare", "train", "sweep"),
          lambda r: {"compress": _dump(r.compress), **_compress_inputs(r)}, format=5, on_cluster=False),
    Stage("evaluate", "overproof.evaluate.stage:evaluate_exports", ("prepare", "train", "compress"),
          lambda r: {"seed": r.seed, "evaluate": _dump(r.evaluate), **_evaluate_inputs(r)}, format=10),
    Stage("gate", "overproof.evaluate.stage:judge_report", ("train", "sweep", "evaluate"),
          lambda r: {"gate": _dump(r.gate)}, format=5, on_cluster=False),
    Stage("report", "overproof.report.stage:write_report",
          ("prepare", "train", "generate", "cache", "sweep", "evaluate", "gate"),
          lambda r: {"name": r.name}, format=3, on_cluster=False),
    Stage("package", "overproof.package.package:build_package",
          ("prepare", "train", "generate", "cache", "sweep", "compress", "evaluate", "gate"),
          lambda r: {"name": r.name, **signer_identity()}, format=4, on_cluster=False),
    Stage("speculate", "overproof.package.speculative_stage:pack_with_draft",
          ("prepare", "compress", "evaluate", "package"),
          lambda r: {"speculate": _dump(r.speculate), "threads": r.evaluate.threads},
          used_by=lambda r: r.speculate is not None),
)  # fmt: skip
NO_SECTION = "the recipe has no such section"
WHY_UNUSED = {"generate": NO_SECTION, "cache": "no student of the sweep reads it", "speculate": NO_SECTION}


def stages_of(recipe: Recipe, until: str | None = None) -> list[Stage]:
    """Those that a recipe uses, up to ``until``.

    Raises:
        InputError: there is no such stage, or the recipe has no use for it.
    """
    used = [stage for stage in STAGES if stage.used_by(recipe)]
    if until is None:
        return used
    names = [stage.name for stage in used]
    if until not in names:
        why = WHY_UNUSED.get(until, "there is no such stage" + suggest_name(until, names))
        raise InputError(f"{until}: {why}; expected one of {', '.join(names)}")
    return used[: names.index(until) + 1]


@dataclass(frozen=True)
class PlannedStage:
    """A stage of one recipe: its fingerprint, and its artifact where it is done."""

    stage: Stage
    config: Any
    fingerprint: str
    parents: Mapping[str, str]
    artifact: Artifact | None


def resolve_stages(recipe: Recipe, store: Store, until: str | None = None) -> list[PlannedStage]:
    """The stages up to ``until``, and which of them are done. Starts nothing.

    Raises:
        InputError: the source of the data is missing or empty, or the recipe has no use for that stage.
    """
    steps: dict[str, PlannedStage] = {}
    for stage in stages_of(recipe, until):
        parents = {name: steps[name].fingerprint for name in stage.parents if name in steps}
        config = stage.part(recipe)
        fingerprint = compute_fingerprint(stage.name, stage.format, config, parents)
        steps[stage.name] = PlannedStage(
            stage, config, fingerprint, parents, store.lookup(recipe.name, stage.name, fingerprint)
        )
    return list(steps.values())


def run(recipe: Recipe, until: str | None = None, done: dict[str, Artifact] | None = None) -> dict[str, Artifact]:
    """Run what is not done yet, up to and including ``until``; ``done`` gets each stage's artifact as it is there, also
    where the run ends with an error.

    Raises:
        InputError: bad input, before anything starts where it can be known.
        GateRefused: no candidate passed, or the draft does not pay; every stage before that is done and stays.
    """
    if any(stage.name == "gate" for stage in stages_of(recipe, until)):
        for finding in recipe_checks.check_gate(recipe):
            console.notice(f"{finding.about}: {finding.text}")
    store, done = Store(recipe.store), {} if done is None else done
    steps = resolve_stages(recipe, store, until)
    if all(step.artifact for step in steps):  # nothing is written: no lock, so that it may be looked at beside a run
        return _run_steps(steps, recipe, store, done)
    with store.lock():
        # Another run may have ended meanwhile. The data are not looked at again: to list them may take long.
        steps = [replace(step, artifact=store.lookup(recipe.name, step.stage.name, step.fingerprint)) for step in steps]
        for finding in (*recipe_checks.check_precision(recipe), *recipe_checks.warn_for_study(recipe)):
            console.notice(f"{finding.about}: {finding.text}")
        if any(step.stage.name == "compress" and step.artifact is None for step in steps):
            for finding in preflight.require_exportable(recipe):
                console.notice(f"{finding.about}: {finding.text}")
        if any(step.stage.name == "train" and step.artifact is None for step in steps):
            preflight.require_served(recipe)
        if any(step.stage.name in ("train", "sweep") and step.artifact is None for step in steps):
            preflight.require_trainable(recipe)
        if not ray_cluster.is_remote():
            require_placeable(recipe, ray_cluster.local_capacity())
            ENGINES[recipe.engine].require()
        return _run_steps(steps, recipe, store, done)


def _run_steps(
    steps: Sequence[PlannedStage], recipe: Recipe, store: Store, done: dict[str, Artifact]
) -> dict[str, Artifact]:
    connected, verified = False, set[str]()
    for step in steps:
        if step.stage.name == "package":
            _require_pass(done["gate"])
        if step.artifact:
            done[step.stage.name] = step.artifact
            console.out.print(f"[dim]· {step.stage.name:<9} done before   {step.artifact.id}[/]")
            continue
        if not connected and (step.stage.on_cluster or not store.local):  # of others the lock is an actor
            with console.waiting("starting Ray"):
                capacity = ray_cluster.connect()
            require_placeable(recipe, capacity)
            if capacity.count > 1:
                cluster_checks.require_nodes(recipe, capacity)
            connected = True
        if store.local:  # of a remote one, each process verifies what it fetches
            for parent in sorted(step.parents.keys() - verified):
                done[parent].verify()
            verified |= {*step.parents, step.stage.name}  # the latter was hashed as it was written
        done[step.stage.name] = run_stage(step, recipe, store, done)
    return done


def run_stage(step: PlannedStage, recipe: Recipe, store: Store, done: Mapping[str, Artifact]) -> Artifact:
    """Run one stage, or take the artifact that another job of this cluster has finished meanwhile.

    A local store is locked for the whole run. Others have no locks: there the cluster lets one job at a time write an
    artifact; when a job is killed, the next one goes on from what it has finished.
    """
    if store.local:
        return _run_and_commit(step, recipe, store, done)
    with ray_cluster.cluster_lock(store.uri, f"{recipe.name}/{step.stage.name}-{step.fingerprint[:8]}", console.notice):
        artifact = store.lookup(recipe.name, step.stage.name, step.fingerprint)
        if artifact is None:
            return _run_and_commit(step, recipe, store, done)
    console.out.print(f"[dim]· {step.stage.name:<9} done by another job   {artifact.id}[/]")
    return artifact


def _run_and_commit(step: PlannedStage, recipe: Recipe, store: Store, done: Mapping[str, Artifact]) -> Artifact:
    name = step.stage.name
    parents = {parent: done[parent] for parent in step.parents}
    draft = store.new_writer(recipe.name, name, step.fingerprint, step.config, step.parents)
    began = time.monotonic()
    try:
        metrics = _run_function(step.stage, StageContext(recipe, parents, draft, no_progress))
        artifact = draft.commit(metrics, time.monotonic() - began)
    except OSError as error:
        fault = storage_fault(error)
        if fault is None:
            raise
        raise InputError(
            f"{name}: {store.uri}, or a disk on the way to it: {fault}; expected one that has room and answers; what "
            "is finished stays: run again to go on"
        ) from error
    console.out.print(
        f"[green]✓[/] {name:<9} {artifact.record.seconds:6.1f} s      {artifact.id}  [dim]{_one_line(metrics)}[/]"
    )
    return artifact


def _run_function(stage: Stage, context: StageContext) -> dict[str, Any]:
    """The stage's metrics; what it wrote is deleted where it fails."""
    try:
        with console.progress_bars() as show, relay_progress(show) as progress:
            show(TaskProgress(stage.name, 0, 1, "starting"))
            return stage.function()(replace(context, progress=progress))
    except BaseException:
        with suppress(OSError):  # of a store that fails; the next attempt deletes what is left
            context.draft.discard()
        raise


def _one_line(metrics: Mapping[str, Any]) -> str:
    flat = (
        (k, format_number(v, 4) if isinstance(v, float) else str(v))
        for k, v in metrics.items()
        if isinstance(v, int | float | str)
    )
    return " · ".join(f"{key} {value}" for key, value in flat)


def _require_pass(gate: Artifact) -> None:
    from overproof.evaluate.gate import VERDICT, Verdict
    from overproof.package.package import require_pass

    require_pass(read_json(Verdict, gate.local() / VERDICT))
