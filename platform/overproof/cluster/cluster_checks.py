"""Whether a recipe can run where it is planned for: placement, the store, uploads and memory. Nothing here prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from overproof.artifacts import Store
from overproof.cluster import node_checks, ray_cluster, store_probe, upload
from overproof.cluster.machine import memory_bytes
from overproof.cluster.placement import Capacity, ResourceRequest, resource_requests, why_unplaceable
from overproof.cluster.recipe_checks import Finding
from overproof.config import Recipe
from overproof.errors import InputError
from overproof.units import format_bytes, format_count


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
