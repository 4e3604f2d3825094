"""What can be known of a run before anything starts: its size, its memory, its time, and what would stop it.

Every check gives one `Finding`; nothing here prints, and only `check_storage` looks beyond this machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from overproof import console
from overproof.artifacts import Artifact, Store
from overproof.cluster import node_checks, ray_cluster, store_probe, upload
from overproof.cluster.machine import memory_bytes
from overproof.cluster.placement import Capacity, ResourceRequest, resource_requests, why_unplaceable
from overproof.config import (
    Masked,
    ModelSection,
    OfTeacher,
    Pretrained,
    Recipe,
    Served,
    TeacherLayers,
    ZeroSettings,
)
from overproof.config.search import Asha, Choice, Hyperband, Median, Pbt
from overproof.data.manifest import Manifest
from overproof.data.source_files import describe_skipped
from overproof.data.tokenizer_match import require_possible_tokenizer
from overproof.engines.base import ScoringLoader
from overproof.engines.endpoint import Endpoint
from overproof.errors import InputError, suggest_name
from overproof.export.base import SizedFormat
from overproof.export.check_models import check_models
from overproof.files import join_uri
from overproof.models.base import ConvolutionalFamily, DataShape, shape_of
from overproof.models.sizes import (
    ModelSize,
    directory_config,
    family_of,
    left_config,
    model_size,
    require_apart,
    require_varlen,
    student_size,
)
from overproof.registry import ENGINES, FAMILIES, FORMATS, TASKS
from overproof.tasks.base import TokenTask
from overproof.units import format_bytes, format_count, format_seconds

HIGH_RATE = 0.1  # of AdamW, for models that begin with random weights; a tenth of it for others


@dataclass(frozen=True)
class Finding:
    """One line of the plan."""

    about: str
    state: Literal["ok", "warning", "refused"]
    text: str


@dataclass(frozen=True)
class Throughput:
    """Predictions in a second, and how that is known."""

    per_s: float
    source: str


def data_shape(recipe: Recipe, prepared: Artifact | None) -> DataShape:
    """What models must fit. Until the data is prepared its source is looked at, and a vocabulary is the recipe's limit.

    Raises:
        InputError: the source cannot be read.
    """
    if prepared is None:
        with console.waiting("looking at the data"):
            return TASKS[recipe.data.kind].shape(recipe.data)
    return shape_of(Manifest.read(prepared))


def check_source(recipe: Recipe) -> Iterator[Finding]:
    """How many files the data come from, and a warning of those that are left out.

    Raises:
        InputError: there are none.
    """
    listing = TASKS[recipe.data.kind].source_files(recipe.data)
    if listing.files:
        size = format_bytes(sum(file.size_bytes for file in listing.files))
        yield Finding("data", "ok", f"{format_count(len(listing.files), 'file')}, {size}")
    for line in describe_skipped(listing.skipped):
        yield Finding("data", "warning", line)


def require_exportable(recipe: Recipe) -> list[Finding]:
    """Ask the recipe's format about the tokenizer, the chat template and every model that a directory describes, before
    anything is trained: any decoder can be trained, not all exported. What the recipe itself describes has been held
    against the format as it was read. Gives a warning for what the format's engines leave out.

    Raises:
        InputError: it cannot hold one, a line for each, or a directory's files cannot be read.
    """
    format = FORMATS[recipe.compress.kind]
    with console.waiting("looking at the tokenizer"):
        left_out = TASKS[recipe.data.kind].check_export(recipe.data, format)
        teacher = recipe.train.model.path if isinstance(recipe.train.model, Pretrained) else None
        format.check_template(recipe.compress, teacher)
    findings = [Finding("tokenizer", "warning", line) for line in left_out]
    taught, quality = recipe.train.model, TASKS[recipe.data.kind].quality.title
    models = {"train.model": taught} | {f"student {s.name}": s.model for s in recipe.sweep.students}
    kind, asked, tokenizer = recipe.compress.kind, dict[str, dict[str, Any]](), getattr(recipe.data, "tokenizer", None)
    for where, model in models.items():
        if model is taught and isinstance(model, Pretrained) and _only_teaches(recipe, model):
            named = directory_config(model.path)["architectures"][0]
            findings.append(Finding(
                "train.model", "warning",
                f"architecture {named} is not written as {kind}: it teaches, and torch measures its {quality}; its "
                "size, speed and KL are not known",
            ))  # fmt: skip
        elif isinstance(model, Pretrained):
            asked[f"{where}: {model.path}"] = _config_of_a_known_family(model.path, kind, where)
        elif isinstance(model, OfTeacher) and isinstance(taught, Pretrained):
            config = _config_of_a_known_family(taught.path, kind, where)
            _, family = family_of(config, taught.path)
            part = f"{model.count} layers" if isinstance(model, TeacherLayers) else "what is left"
            try:
                asked[f"{where}: {part} of {taught.path}"] = left_config(config, model, family)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
    if asked:
        with console.waiting(f"asking {kind} about {format_count(len(asked), 'model')}"):
            check_models(kind, recipe.data.positions, asked, recipe.compress.formats)
    # Of a teacher that is no directory sizes follow from the data.
    if recipe.compress.most_mb is not None and isinstance(format, SizedFormat) and isinstance(taught, Pretrained):
        shape = data_shape(recipe, None)
        for student in recipe.sweep.students:
            format.require_size(recipe.compress, student_size(student.model, taught, shape), f"student {student.name}")
        if recipe.compress.teacher:
            format.require_size(recipe.compress, model_size(taught, shape), "the teacher")
    for named, config in asked.items() if recipe.data.apart else ():
        require_apart(config, named)
    for model in models.values():
        if isinstance(model, Pretrained) and tokenizer is not None:
            require_possible_tokenizer(tokenizer, model.path)
    return findings


def require_served(recipe: Recipe) -> None:
    """Ask the endpoint of a teacher that is served whether it has the model.

    Raises:
        InputError: it has not, or cannot be asked now.
    """
    if isinstance(recipe.train.model, Served):
        Endpoint(recipe.train.model.model_copy(update={"retry_s": 0.0})).model_entry()


def _only_teaches(recipe: Recipe, teacher: Pretrained) -> bool:
    """Whether no file is made of a teacher, and none could be."""
    if recipe.needs_teacher_file or not isinstance(TASKS[recipe.data.kind], TokenTask):
        return False
    kind, _ = family_of(directory_config(teacher.path), teacher.path)
    return kind not in FORMATS[recipe.compress.kind].families


def _config_of_a_known_family(path: str, format: str, where: str) -> dict[str, Any]:
    config = directory_config(path)
    kind, _ = family_of(config, path)
    families = FORMATS[format].families
    if kind not in families:
        held = [name for family in families for name in FAMILIES[family].architectures if not name.startswith("!")]
        [named, *_] = config["architectures"]
        raise InputError(
            f"{where}: {path}/config.json: architecture {named} can be trained and not be written as "
            f"{format}{suggest_name(named, held)}; expected {' or '.join(held)}{FORMATS[format].further_families}"
        )
    return config


def require_trainable(recipe: Recipe) -> None:
    """Look whether models can be trained as they are asked to: by lengths, where they find several texts in a row.

    Raises:
        InputError: they cannot, or a row holds one text.
    """
    asked: list[tuple[str, ZeroSettings | None, list[ModelSection]]] = [
        ("train", recipe.train, [recipe.train.model]),
        ("sweep.group", recipe.sweep.group, [student.model for student in recipe.sweep.students]),
    ]
    for where, settings, models in asked:
        if settings is None:
            continue
        sources = [recipe.train.model if isinstance(model, OfTeacher) else model for model in models]
        kinds = [_family_kind(source) for source in sources if not isinstance(source, Served)]
        for family in map(FAMILIES.__getitem__, kinds):
            if isinstance(family, ConvolutionalFamily):
                family.require_training(settings, where)
        if settings.attention == "sdpa":
            continue
        if not recipe.data.apart:
            raise InputError(
                f"{where}.attention: varlen: goes by texts that are kept apart in a row; rows of this data are read as "
                "one text: expected sdpa"
            )
        for kind in kinds:
            require_varlen(kind, where)


def _family_kind(model: ModelSection) -> str:
    return family_of(directory_config(model.path), model.path)[0] if isinstance(model, Pretrained) else model.kind


def student_sizes(recipe: Recipe, shape: DataShape) -> dict[str, ModelSize]:
    """Of each student, by name.

    Raises:
        InputError: one cannot be made from what it names.
    """
    sizes = {}
    for student in recipe.sweep.students:
        try:
            sizes[student.name] = student_size(student.model, recipe.train.model, shape)
        except InputError as error:
            raise InputError(f"student {student.name}: {error}") from None
    return sizes


def starting_sizes(recipe: Recipe, shape: DataShape) -> dict[str, ModelSize]:
    """Of each student as it begins, at most: one that is pruned in rounds counts as its teacher does."""
    sizes = student_sizes(recipe, shape)
    slow = [student.name for student in recipe.sweep.students if student.rounds > 1]
    return sizes | (dict.fromkeys(slow, model_size(recipe.train.model, shape)) if slow else {})


def warn_not_smaller(sizes: Mapping[str, int], teacher: int) -> Iterator[Finding]:
    """A warning for each student that is no smaller than its teacher."""
    for name, size_ in sizes.items():
        if size_ >= teacher:
            yield Finding(
                f"student {name}", "warning", f"{size_:,} parameters are not fewer than the teacher's {teacher:,}"
            )


def warn_for_study(recipe: Recipe) -> Iterator[Finding]:
    """A warning for each student that is experimental."""
    for student in recipe.sweep.students:
        if isinstance(student.model, Masked):
            yield Finding(
                f"student {student.name}", "warning",
                "kind masked is experimental, for study: its files are no smaller and no faster than without zeros",
            )  # fmt: skip


def check_gate(recipe: Recipe) -> Iterator[Finding]:
    """A warning where a file of any quality could pass."""
    quality = TASKS[recipe.data.kind].quality
    if not recipe.gate.bounds_quality(quality.higher_is_better, quality.relative):
        yield Finding(
            "gate", "warning",
            f"no rule holds a file's {quality.title} close to the teacher's, or to a figure: one far worse than "
            "the teacher could ship. Add {kind: keep, against: teacher, at_least: 0.97} to gate.rules, or {kind: "
            "quality, limit: ...}",
        )  # fmt: skip


def check_precision(recipe: Recipe) -> Iterator[Finding]:
    """A warning for each stage that may compute in bf16 on CPUs.

    Raises:
        InputError: the recipe says how torch scores files, and their engine scores them itself.
    """
    train, sweep, evaluate, engine = recipe.train, recipe.sweep, recipe.evaluate, ENGINES[recipe.engine]
    if not isinstance(TASKS[recipe.data.kind], TokenTask) or isinstance(engine, ScoringLoader):
        for field in ("precision", "gpus_per_task"):
            found = getattr(evaluate, field)
            if found != type(evaluate).model_fields[field].default:
                raise InputError(
                    f"evaluate.{field}: found {found!r}; {recipe.engine} scores its files itself, on CPUs: leave it out"
                )
    asked: dict[str, tuple[str, float]] = {"train": (train.precision, train.gpus_per_worker)}
    for name, pool in (("generate", recipe.generate), ("cache", recipe.cache if recipe.reads_cache else None)):
        if pool is not None:
            asked[name] = pool.precision, pool.gpus_per_actor
    if sweep.group is not None:
        asked["sweep.group"] = sweep.group.precision, sweep.group.gpus_per_worker
    else:
        asked["sweep"] = sweep.precision, sweep.gpus_per_trial
    if sweep.teacher_pool is not None:
        asked["sweep.on_policy"] = sweep.teacher_pool.precision, sweep.teacher_pool.gpus_per_actor
    asked["evaluate"] = evaluate.precision, evaluate.gpus_per_task
    for name, (precision, gpus) in asked.items():
        if precision == "bf16" and not gpus:
            yield Finding(
                f"{name}.precision", "warning",
                "bf16 without a GPU: CPUs with neither avx512_bf16 nor amx_bf16 take many times as long as in fp32",
            )  # fmt: skip


def check_learning_rates(recipe: Recipe) -> Iterator[Finding]:
    """A warning for each rate at which AdamW hardly ever learns."""
    given = {"train.learning_rate": recipe.train.learning_rate if recipe.train.steps else 0.0}
    searched = recipe.tune.space.learning_rate
    if searched is None:
        given["sweep.learning_rate"] = recipe.sweep.learning_rate
    else:
        given["tune.space.learning_rate"] = max(searched.values) if isinstance(searched, Choice) else searched.high
    for field, rate in given.items():
        goes_on = field == "train.learning_rate" and isinstance(recipe.train.model, Pretrained)
        most, usual = (HIGH_RATE / 10, "1e-5 to 3e-4") if goes_on else (HIGH_RATE, "1e-4 to 1e-2")
        if rate > most:
            yield Finding(field, "warning", f"{rate:g} is far above what models learn with: {usual} is usual")


def check_first_comparison(recipe: Recipe) -> Iterator[Finding]:
    """A warning where no trial is compared with others before its end, so that none is stopped early."""
    steps = recipe.sweep.steps
    match recipe.tune.scheduler:
        case Pbt(interval_steps=given):
            field = "interval_steps"
        case Asha(grace_steps=given) | Median(grace_steps=given) | Hyperband(grace_steps=given):
            field = "grace_steps"
        case _:
            return
    if given is not None and given >= steps:
        yield Finding(
            f"tune.scheduler.{field}", "warning",
            f"{given:,}, and trials end after sweep.steps, {steps:,}: they are first compared then, and none is "
            "stopped before; give fewer, or leave it out",
        )  # fmt: skip


def measured_rate(recipe: Recipe) -> Throughput | None:
    """The rate at which this recipe's newest teacher of the same model trained, out of its record."""
    model = recipe.train.model.model_dump(mode="json")
    with suppress(InputError, OSError):
        for artifact in reversed(Store(join_uri(Store(recipe.store).uri, recipe.name)).artifacts()):
            record = artifact.record
            if record.stage != "train" or record.config["train"]["model"] != model:
                continue
            metrics = record.metrics
            steps, seconds = metrics.get("steps"), metrics.get("seconds_per_step")
            predictions = metrics.get(f"{TASKS[recipe.data.kind].unit}s")
            if steps and seconds and predictions:
                return Throughput(predictions / steps / seconds, f"measured by {artifact.id}")
    return None


def training_time(recipe: Recipe, rate: Throughput | None, positions: int) -> Finding:
    """How long the teacher trains, of rows with so many predictions."""
    unit = f"{TASKS[recipe.data.kind].unit}s"
    flag = "--tokens-per-s" if unit == "tokens" else "--rows-per-s"
    steps = recipe.train.steps
    if steps == 0:
        return Finding("time", "ok", "the teacher is taken as it is: it is not trained")
    total = steps * recipe.train.batch_size * positions
    work = f"{total:,} {unit} in {format_count(steps, 'step')}"
    if rate is None:
        few = f"`overproof train RECIPE --set train.steps=20 --set store={Path('trial')}`"
        return Finding(
            "time", "ok", f"{work}; give {flag} N for the hours, or measure: {few}, then plan with that store"
        )
    return Finding(
        "time", "ok", f"{work} at {rate.per_s:,.0f} {unit}/s ({rate.source}): {format_seconds(total / rate.per_s)}"
    )


def check_placement(recipe: Recipe, capacity: Capacity) -> Iterator[Finding]:
    """Whether each stage can ever start on a cluster, and how much of what it wants it gets."""
    for need in resource_requests(recipe):
        if need.stage in ("prepare", "evaluate") and capacity.fits(need) >= need.wanted:
            continue  # one CPU each
        refused = why_unplaceable(need, capacity)
        if refused:
            yield Finding(need.stage, "refused", refused.removeprefix(f"{need.stage}: "))
            continue
        yield _sufficient(need, capacity, recipe)
    yield _together(recipe, capacity)


def _sufficient(need: ResourceRequest, capacity: Capacity, recipe: Recipe) -> Finding:
    found = capacity.fits(need)
    bundles = min(found, need.wanted)
    if need.stage == "train":
        bundles = max(world for world in recipe.train.worlds if world <= bundles)
    beside = " + 1" if need.reader else ""
    cpus = f"{bundles} x {need.cpus:g}{beside} = {need.cpus_of(bundles):g} of {capacity.cpus:g} CPUs"
    gpus = f", {bundles} x {need.gpus:g} = {need.gpus_of(bundles):g} of {capacity.gpus:g} GPUs" if need.gpus else ""
    nodes = capacity.nodes_for(need, bundles)
    text = f"{need.why}: {cpus}{gpus}, on {format_count(nodes, 'node')} or more"
    if bundles < need.wanted:
        return Finding(need.stage, "warning", f"{text}; {need.wanted} do not fit: {bundles} at a time")
    return Finding(need.stage, "ok", text)


def _together(recipe: Recipe, capacity: Capacity) -> Finding:
    """Replicas that go on serving take their CPUs from the next run."""
    by_stage = {need.stage: need for need in resource_requests(recipe)}
    serve = by_stage.pop("serve")
    largest = max(by_stage.values(), key=lambda need: need.cpus_of(need.bundles))
    taken, wanted = serve.cpus_of(serve.bundles), largest.cpus_of(largest.bundles)
    sum_ = f"{largest.stage} {wanted:g} + serve {taken:g} = {wanted + taken:g} of {capacity.cpus:g} CPUs"
    if wanted + taken <= capacity.cpus:
        return Finding("together", "ok", f"a run beside replicas that serve: {sum_}")
    return Finding("together", "warning", f"{sum_}: a run while replicas serve would wait; stop them first")


def check_storage(recipe: Recipe, capacity: Capacity, attached: bool) -> Finding:
    """Whether the store can be written, and seen wherever it must be."""
    uri = Store(recipe.store).uri
    local = not _remote(uri)
    try:
        with store_probe.probe_store(uri) as (file, text):
            if attached and capacity.count > 1:
                node_checks.require_alike(uri, node_checks.ask_nodes(file, text))
                return Finding("storage", "ok", f"{uri}: written and read, and seen from every node up now")
    except InputError as error:
        return Finding("storage", "refused", str(error))
    if local and not attached and capacity.count > 1:
        return Finding(
            "storage", "warning",
            f"{uri}: written and read here; on {capacity.count} nodes it must be a folder that all of them share, or a "
            "URI such as s3://bucket/store",
        )  # fmt: skip
    return Finding("storage", "ok", f"{uri}: written, read and emptied again")


def _remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def require_nodes(recipe: Recipe, capacity: Capacity) -> None:
    """Have every node of the connected cluster look at the store and at its versions, where there are several.

    Raises:
        InputError: one does not see it, or has others.
    """
    found = check_storage(recipe, capacity, attached=True)
    if found.state == "refused":
        raise InputError(f"storage: {found.text}")


def check_upload(folder: Path) -> Finding:
    """What `ray job submit --working-dir .` would upload from here."""
    found = upload.measure_upload(folder)
    limit = format_bytes(upload.LIMIT_BYTES)
    about = f"{format_bytes(found.size_bytes)} of at most {limit} (100 MiB), in {format_count(found.files, 'file')}"
    if found.fits:
        return Finding("upload", "ok", f"`ray job submit --working-dir .` from here sends {about}")
    named = ", ".join(f"{name} {format_bytes(bytes_)}" for name, bytes_ in found.largest)
    more = "" if found.complete else f"more than {upload.MOST_FILES:,} files, at least "
    return Finding(
        "upload", "warning",
        f"`ray job submit --working-dir .` from here would be turned away: {more}{about}; the largest: {named}. List "
        "what no job needs in .rayignore",
    )  # fmt: skip


def check_local_memory(bytes_: int, workers: int) -> Finding:
    """Whether this machine's memory holds the workers of a local run."""
    total, sum_ = memory_bytes(), bytes_ * workers
    text = f"{workers} x {format_bytes(bytes_)} = {format_bytes(sum_)} of this machine's {format_bytes(total)}"
    return Finding("memory", "ok" if sum_ < total else "warning", text + ("" if sum_ < total else ": too much"))


def target_capacity(file: Path | None) -> tuple[Capacity, bool]:
    """The cluster to plan for, and whether this process is attached to it.

    Raises:
        InputError: the file or the cluster cannot be used.
    """
    if file is not None:
        from overproof.cluster.cluster_yaml import read_cluster_yaml

        return read_cluster_yaml(file), False
    if ray_cluster.is_remote():
        return ray_cluster.connect(), True
    return ray_cluster.local_capacity(), False
