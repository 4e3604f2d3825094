"""`overproof plan`: what a run would do, hold and ask for, one line a finding, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from overproof import pipeline
from overproof.artifacts import Artifact, Store
from overproof.cluster import cluster_checks, preflight, recipe_checks
from overproof.cluster.placement import resource_requests
from overproof.cluster.recipe_checks import Finding, Throughput
from overproof.config import Recipe, Served
from overproof.console import out
from overproof.data.columns import row_bytes
from overproof.data.manifest import Manifest
from overproof.distill.target_codec import TargetLayout
from overproof.distill.teacher_text import generate_settings, text_cache_schema
from overproof.engines.base import ScoringLoader
from overproof.errors import InputError
from overproof.export.base import SizedFormat
from overproof.models import stage_memory, zero_memory
from overproof.models.base import DataShape
from overproof.models.sizes import FP32_BYTES, ModelSize, trained_size
from overproof.registry import ENGINES, FORMATS, TASKS
from overproof.units import format_bytes, format_count, format_seconds

WRITE_COST = (
    4  # a token that is written takes the time of so many that are looked at; measured at 32 rows (9 at 8 rows)
)
COLOURS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "refused": "[red]refused[/]"}


@dataclass(frozen=True)
class PlanOptions:
    """What `plan` was asked beside the recipe."""

    cluster_file: Path | None = None
    tokens_per_s: float | None = None
    rows_per_s: float | None = None


def plan(recipe: Recipe, options: PlanOptions) -> int:
    """Print the plan and return 0 where the recipe can run.

    Raises:
        InputError: what was asked makes no sense, or the recipe could never run there, with the arithmetic.
    """
    capacity, attached = cluster_checks.target_capacity(options.cluster_file)
    stored = cluster_checks.check_storage(recipe, capacity, attached)
    if stored.state == "refused":  # nor can it be looked up what is done
        raise InputError(f"storage: {stored.text}")
    steps = pipeline.resolve_stages(recipe, Store(recipe.store))
    prepared = next(step.artifact for step in steps if step.stage.name == "prepare")
    shape = preflight.data_shape(recipe, prepared)
    rate = _given_rate(recipe, options, shape.positions) or recipe_checks.measured_rate(recipe)
    out.print(_stages(recipe, steps, shape.positions))
    preflight.require_trainable(recipe)
    exported = preflight.require_exportable(recipe)
    out.print()
    students = preflight.student_sizes(recipe, shape)
    findings = [
        *recipe_checks.check_source(recipe),
        *exported,
        *cluster_checks.check_placement(recipe, capacity),
        stored,
        *recipe_checks.check_gate(recipe),
        *recipe_checks.warn_for_study(recipe),
        *recipe_checks.check_precision(recipe),
        *recipe_checks.check_learning_rates(recipe),
        *recipe_checks.check_first_comparison(recipe),
    ]
    served, model = recipe.train.model, None
    if isinstance(served, Served):
        out.print(f"teacher: {served.model}, served at {served.url}")
        out.print(_students(students))
        if text := _teacher_text(recipe, shape.positions, shape.outputs, prepared, None):
            out.print(text)
    else:
        model = trained_size(recipe.train, shape)
        _print_teacher(recipe, model, students, prepared, rate)
        parameters = {name: size.parameters for name, size in students.items()}
        findings += recipe_checks.warn_not_smaller(parameters, model.parameters)
        if not attached and options.cluster_file is None and not recipe.train.gpus_per_worker:
            findings.append(cluster_checks.check_local_memory(_worker_bytes(recipe, model), recipe.train.fewest))
    out.print(_largest(recipe, model, students, preflight.starting_sizes(recipe, shape)))
    if line := _teacher_targets(recipe, shape, prepared, rate):
        out.print(line)
    out.print(f"\n{capacity.where}")
    findings += [cluster_checks.check_upload(Path.cwd()), recipe_checks.training_time(recipe, rate, shape.positions)]
    out.print(_findings(findings))
    refused = [finding for finding in findings if finding.state == "refused"]
    if refused:
        raise InputError("\n".join(f"{finding.about}: {finding.text}" for finding in refused))
    return 0


def _print_teacher(
    recipe: Recipe, model: ModelSize, students: dict[str, ModelSize], prepared: Artifact | None, rate: Throughput | None
) -> None:
    for line in _model(recipe, model, students, known=prepared is not None):
        out.print(line)
    out.print(_memory(recipe, model))
    out.print(_activations(recipe, model))
    text = _teacher_text(recipe, model.predictions, model.outputs, prepared, rate)
    for line in filter(None, (text, _live_teacher(recipe, model))):
        out.print(line)


def _students(students: dict[str, ModelSize]) -> str:
    return "students: " + ", ".join(f"{name} {size.parameters:,}" for name, size in students.items()) + " parameters"


def _given_rate(recipe: Recipe, options: PlanOptions, positions: int) -> Throughput | None:
    unit = TASKS[recipe.data.kind].unit
    if options.tokens_per_s is not None and unit != "token":
        raise InputError(f"--tokens-per-s {options.tokens_per_s:g}: the data is {unit}s; give --rows-per-s")
    for name, value in (("--tokens-per-s", options.tokens_per_s), ("--rows-per-s", options.rows_per_s)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name} {value:g}: expected a rate above 0")
    if options.tokens_per_s is not None:
        return Throughput(options.tokens_per_s, "as given")
    if options.rows_per_s is not None:
        return Throughput(options.rows_per_s * positions, "as given")
    return None


def _stages(recipe: Recipe, steps: list[pipeline.PlannedStage], positions: int) -> Table:
    requests = {need.stage: need for need in resource_requests(recipe)}
    table = Table("stage", "state", "work", "CPUs", "GPUs", "for", "artifact", box=None, pad_edge=False)
    for step in steps:
        name = step.stage.name
        need = requests.get(name)
        asks = (
            (f"{need.cpus_of(need.bundles):g}", f"{need.gpus_of(need.bundles):g}", need.why)
            if need
            else ("", "", "this process")
        )
        state = f"[dim]done in {step.artifact.record.seconds:.1f} s[/]" if step.artifact else "[bold]to do[/]"
        table.add_row(name, state, _work(recipe, name, positions), *asks, f"{name}-{step.fingerprint[:8]}")
    return table


def _work(recipe: Recipe, stage: str, positions: int) -> str:
    unit = f"{TASKS[recipe.data.kind].unit}s"
    train, sweep = recipe.train, recipe.sweep
    if stage == "train":
        read = train.steps * train.batch_size * positions
        return f"{format_count(train.steps, 'step')}, {read:,} {unit}, ZeRO {train.zero_stage}"
    if stage == "generate":
        written = generate_settings(recipe)
        rows = "every row" if written.rows is None else f"{written.rows:,} rows"
        return f"{rows} from {written.prompt_tokens} tokens on, temperature {written.temperature:g}"
    if stage == "cache":
        rows = "every row" if recipe.rows_cached is None else f"{recipe.rows_cached * positions:,} {unit}"
        return f"{rows}, {recipe.cache.scheme.description}"
    if stage == "sweep":
        search, most = recipe.tune, recipe.rows_read * positions
        how = f"{format_count(search.trials(sweep), 'trial')} ({search.search.kind}, {search.scheduler.kind}) + control"
        return f"{how}, {format_count(search.most_steps(sweep), 'step')}, {most:,} {unit} each at most"
    if stage == "compress":
        return ", ".join(recipe.compress.formats)
    if stage == "gate":
        return format_count(len(recipe.gate.rules), "rule")
    return ""


def _model(recipe: Recipe, model: ModelSize, students: dict[str, ModelSize], known: bool) -> list[str]:
    train = recipe.train
    most = "" if known or model.predictions == 1 else f" (with all {model.outputs:,} entries of the vocabulary)"
    adapters = f", {sum(model.adapters):,} more in adapters, which alone are trained" if model.adapters else ""
    workers = format_count(train.most, "worker")
    workers = workers if train.fewest == train.most else f"{train.fewest} to {workers}"
    return [
        f"teacher: {model.parameters:,} parameters{most}{adapters}; {workers}, "
        f"{train.precision}, ZeRO {train.zero_stage}, offload {train.offload}",
        _students(students),
        f"each of {format_count(train.fewest, 'worker')} holds at most, by ZeRO stage:",
    ]


def _memory(recipe: Recipe, model: ModelSize) -> Table:
    train = recipe.train
    device = "GPU" if train.gpus_per_worker else "in all"
    offloads = train.offload != "none"
    columns = ["ZeRO", "weights", "gradients", "optimizer", "buffers", device]
    table = Table(*columns, *(["in CPU memory"] if offloads else []), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in range(4):
        held = zero_memory.state_memory(model, train, stage, train.fewest)
        parts = (
            held.device.weights,
            held.device.gradients,
            held.device.optimizer,
            held.device.buffers,
            held.device.total,
        )
        here = stage == train.zero_stage
        row = [f"{stage}{' ◄ this recipe' if here else ''}", *map(format_bytes, parts)]
        table.add_row(*row, *([format_bytes(held.host.total)] if offloads else []), style="bold" if here else "dim")
    return table


def _activations(recipe: Recipe, model: ModelSize) -> str:
    train = recipe.train
    rows = train.batch_size // train.fewest // train.accumulation(train.fewest)
    kept = zero_memory.activation_memory(model, train, train.fewest)
    outputs = rows * model.predictions * zero_memory.logits_memory(model.outputs, 2 if train.computes_in_half else 4)
    checkpointed = "layers' inputs alone" if train.activation_checkpointing else "every layer's"
    where = "GPU" if train.gpus_per_worker else "worker"
    device = zero_memory.peak_worker_memory(model, train, train.fewest)
    return (
        f"and activations of {format_count(rows, 'row')} of {model.predictions:,} ({checkpointed}): about "
        f"{format_bytes(kept)}, {format_bytes(outputs)} of it logits; at most {format_bytes(device)} a {where}, and "
        "what the libraries take"
    )


def _largest(
    recipe: Recipe, teacher: ModelSize | None, students: dict[str, ModelSize], starting: dict[str, ModelSize]
) -> str:
    """What the largest process of each stage holds, on a machine without a GPU; without a teacher that is served.
    ``starting`` are the students as they begin.
    """
    train, sweep, exported = recipe.train, recipe.sweep, list(students.values())
    written, engine, found = FORMATS[recipe.compress.kind], ENGINES[recipe.engine], dict[str, int]()
    if teacher is not None:
        exported.append(teacher)
        found["train"] = stage_memory.teacher_memory(teacher, train, train.fewest)
        if recipe.reads_cache:
            found["cache"] = stage_memory.capture_memory(teacher, recipe.cache)
    longest = sweep.model_copy(update={"steps": recipe.tune.most_steps(sweep)})
    found["sweep"] = max(stage_memory.student_memory(size, longest) for size in starting.values())
    if isinstance(written, SizedFormat):
        unquantised = recipe.compress.model_copy(update={"formats": ()})  # as the teacher is written
        found["compress"] = max(
            written.export_memory(
                unquantised if size is teacher and not recipe.compress.teacher else recipe.compress, size
            )
            for size in exported
        )
    scoring = engine.scoring_memory if isinstance(engine, ScoringLoader) else stage_memory.torch_scoring_memory
    if engine.kv_caches:  # of language models
        scored = [scoring(size, size.predictions) for size in exported]
        found["evaluate"] = max(scored) + (scored[-1] if teacher is not None else 0)  # held beside the teacher's
    held = {stage: stage_memory.LIBRARIES_BYTES + bytes_ for stage, bytes_ in found.items()}
    told = ", ".join(f"{stage} {format_bytes(bytes_)}" for stage, bytes_ in held.items())
    return f"without a GPU the largest process of a stage holds, beside what it maps from files: {told}"


def _teacher_text(
    recipe: Recipe, positions: int, outputs: int, prepared: Artifact | None, rate: Throughput | None
) -> str | None:
    """What the teacher's text takes, and how long it writes."""
    if recipe.generate is None:
        return None
    each = positions + 1 - recipe.generate.prompt_tokens
    rows = _rows(recipe.generate.rows, prepared)
    if rows is None:
        return f"text of the teacher: {each:,} tokens of every row, once the data is prepared"
    bytes_ = rows * row_bytes(text_cache_schema(positions, outputs))
    held = f"text of the teacher: {rows:,} rows, {rows * each:,} tokens to be written, {format_bytes(bytes_)}"
    if rate is None:
        return held
    return f"{held}; the teacher writes for about {format_seconds(WRITE_COST * rows * each / (3 * rate.per_s))}"


def _teacher_targets(
    recipe: Recipe, shape: DataShape, prepared: Artifact | None, rate: Throughput | None
) -> str | None:
    """What the teacher's cache takes, and how long the teacher looks: a forward pass is a third of a step's FLOPs."""
    if not recipe.reads_cache:
        return None
    cache, task = recipe.cache, TASKS[recipe.data.kind]
    unit, temperatures = task.unit, len({1.0, *cache.temperatures})
    layout = TargetLayout(cache.scheme, task.label_column, shape.positions, shape.outputs, temperatures)
    each = layout.row_bytes / shape.positions
    kept = f"targets of the teacher, {cache.scheme.description}: {each:,.1f} bytes a {unit}"
    rows = _rows(recipe.rows_cached, prepared)
    if rows is None:
        return f"{kept}; of every row, once the data is prepared"
    held = f"{kept}, {rows * shape.positions:,} {unit}s, {format_bytes(rows * layout.row_bytes)}"
    return (
        f"{held}; the teacher looks for about {format_seconds(rows * shape.positions / (3 * rate.per_s))}"
        if rate
        else held
    )


def _live_teacher(recipe: Recipe, model: ModelSize) -> str | None:
    """What the teacher takes in a trial where it runs at each step: its weights, and a batch's logits."""
    names = ", ".join(student.name for student in recipe.sweep.students if student.needs_live_teacher)
    if not names:
        return None
    batch = recipe.largest_batch
    number = zero_memory.HALF_BYTES if recipe.sweep.live_precision == "bf16" else FP32_BYTES
    logits = FP32_BYTES * batch * model.predictions * model.outputs
    return (
        f"the teacher runs beside {names}: each of these trials also holds its weights, "
        f"{format_bytes(number * model.parameters)}, and at each step its logits, {format_bytes(logits)}"
    )


def _rows(rows: int | None, prepared: Artifact | None) -> int | None:
    """Train rows that are covered, where that is known; None is every row."""
    if prepared is None:
        return rows
    train = Manifest.read(prepared).splits["train"].rows
    return min(rows or train, train)


def _worker_bytes(recipe: Recipe, model: ModelSize) -> int:
    train = recipe.train
    return stage_memory.LIBRARIES_BYTES + stage_memory.teacher_memory(model, train, train.fewest)


def _findings(findings: list[Finding]) -> Table:
    table = Table("check", "", "", box=None, pad_edge=False, show_header=False)
    for finding in findings:
        table.add_row(f"{finding.about}", COLOURS[finding.state], escape(finding.text))
    return table
