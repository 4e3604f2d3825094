"""What a store holds and what of it may go: `ls`, `rm`, `gc`, `export`, `import`."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from overproof.artifacts import Artifact, Store, artifact_id
from overproof.cli.artifacts import print_package
from overproof.console import out, waiting
from overproof.errors import InputError
from overproof.files import join_uri
from overproof.units import format_bytes, format_count, format_seconds

LISTED = 5  # names in a message
PACKAGES = ("package", "speculate")


def list_artifacts(where: str) -> int:
    """List every artifact of a store, oldest first, and what they take in all.

    Raises:
        InputError: there is no such store.
    """
    artifacts = Store(where).require().artifacts()
    table = Table("artifact", "created (UTC)", "took", "size", box=None, pad_edge=False)
    for artifact in artifacts:
        record = artifact.record
        table.add_row(
            artifact.id, record.created[:19], format_seconds(record.seconds), format_bytes(artifact.size_bytes)
        )
    out.print(table)
    out.print(_total(artifacts), markup=False)
    return 0


def remove(where: str, names: Sequence[str], unlocked: bool) -> int:
    """Delete artifacts.

    Raises:
        InputError: one is not there, is deployed, or was made into another that stays; or as ``collect_garbage``.
    """
    store = Store(where).require()
    with _alone(store, unlocked):
        every = _all_of(store)
        named = {artifact.id for artifact in (_one(every, name) for name in names)}
        going = {artifact.id: artifact for artifact in every if artifact.id in named}
        deployed = _deployed(store)
        for id, artifact in going.items():
            children = [each.id for each in every if id in _parents(each) and each.id not in going]
            if children:
                raise InputError(f"{id}: {', '.join(children)} follows from it; remove that too, or keep both")
            if artifact.uri in deployed or id in deployed:
                raise InputError(f"{id}: is deployed by {join_uri(store.uri, 'deployments.json')}; undeploy it first")
        for artifact in reversed(going.values()):  # what follows before what it follows from
            store.delete(artifact)
    out.print(f"removed {_total(going.values())}", markup=False)
    return 0


def _one(artifacts: Sequence[Artifact], name: str) -> Artifact:
    """By its id or a part that only one has: of several of a stage none is meant more than another."""
    matches = [a for a in artifacts if a.id == name] or [a for a in artifacts if name in a.id]
    if len(matches) != 1:
        more = f" and {len(matches) - LISTED} more" if len(matches) > LISTED else ""
        found = ", ".join(a.id for a in matches[:LISTED]) + more if matches else "none"
        raise InputError(f"{name}: found {found}; expected one artifact, see `overproof ls`")
    return matches[0]


def collect_garbage(where: str, delete: bool, unlocked: bool) -> int:
    """List what neither a package, nor a deployment, nor the newest artifact of a stage needs; and delete it if asked.

    Raises:
        InputError: there is no such store, a run is using it, it has no lock and nobody said ``--unlocked``, or what
            lies there is not known.
    """
    store = Store(where).require()
    with _alone(store, unlocked or not delete):
        every, unfinished = _all_of(store), store.unfinished()
        kept = needed(every, unfinished)
        going = [artifact for artifact in every if artifact.id not in kept]
        table = Table("artifact", "created (UTC)", "size", box=None, pad_edge=False)
        for artifact in going:
            table.add_row(artifact.id, artifact.record.created[:19], format_bytes(artifact.size_bytes))
        if going:
            out.print(table)
        if delete:
            for artifact in reversed(going):
                store.delete(artifact)
    stays = _total(artifact for artifact in every if artifact.id in kept)
    if not going:
        out.print(f"nothing may go; {stays} stay", markup=False)
    elif delete:
        out.print(f"removed {_total(going)}; {stays} stay", markup=False)
    else:
        command = f"overproof gc --store {shlex.quote(where)} --yes{'' if store.local else ' --unlocked'}"
        out.print(f"{_total(going)} may go, {stays} stay; to delete: {command}", markup=False)
    for recipe in sorted(unfinished):
        out.print(f"{recipe}: a stage of it is unfinished, so that all of it stays", markup=False)
    return 0


def needed(artifacts: Iterable[Artifact], unfinished: Collection[str] = ()) -> set[str]:
    """Ids of the packages, of each recipe's newest artifact of each stage, of all of recipes that are unfinished, and
    of all that these follow from. ``artifacts`` are in the order in which they were made.
    """
    by_id = {artifact.id: artifact for artifact in artifacts}
    newest = {(each.record.recipe, each.record.stage): id for id, each in by_id.items()}
    pending = list(newest.values())
    pending += [id for id, each in by_id.items() if each.record.stage in PACKAGES or each.record.recipe in unfinished]
    kept = set[str]()
    while pending:
        id = pending.pop()
        if id not in kept and id in by_id:
            kept.add(id)
            pending += _parents(by_id[id])
    return kept


def export(package: str, where: str, file: Path) -> int:
    """Write a package as one file.

    Raises:
        InputError: there is no such package, it does not hold together, or the file cannot be written.
    """
    from overproof.cli.deploy import find_package
    from overproof.package.archive import write_archive

    with waiting(f"writing {file}"):
        written = write_archive(find_package(package, where), file)
    size = format_bytes(file.stat().st_size)
    out.print(f"{written.content.id} is in {file} ({size}); to read it: overproof import {file}", markup=False)
    return 0


def import_package(file: Path, where: str) -> int:
    """Put a package that was exported into a store.

    Raises:
        InputError: it is no such file, or the package does not hold together.
    """
    from overproof.package.archive import read_archive

    with waiting(f"reading {file}"):
        artifact, package = read_archive(file, Store(where))
    signed = "signed; overproof verify says by whom" if package.listing.signature else "not signed"
    print_package(where, artifact)
    out.print(f"it is {signed}")
    return 0


@contextmanager
def _alone(store: Store, unlocked: bool) -> Iterator[None]:
    """While nobody else uses a store, as far as that can be known.

    Raises:
        InputError: a run is using it, or it has no lock and nobody said ``--unlocked``.
    """
    if not store.local and not unlocked:
        raise InputError(
            f"{store.uri}: has no lock that would say whether a run is using it; where none is: --unlocked"
        )
    with store.lock():
        yield


def _all_of(store: Store) -> list[Artifact]:
    """Every artifact, oldest first.

    Raises:
        InputError: a record cannot be read, so that nobody knows what its artifact follows from; or an artifact lies
            elsewhere than this store would have it.
    """
    readable, unreadable = store.read_all()
    for artifact in readable:
        if artifact.uri != join_uri(store.uri, artifact.id):
            raise InputError(f"{artifact.uri}: lies elsewhere than {artifact.id} in {store.uri}; give its own store")
    for error in unreadable.values():
        raise InputError(f"{error} (nothing is deleted meanwhile: what that artifact follows from is not known)")
    return readable


def _deployed(store: Store) -> frozenset[str]:
    """Places and ids of the packages that the deployments in a store name, those to return to among them."""
    from overproof.serve.deployments import read_deployments

    models = read_deployments(join_uri(store.uri, "deployments.json")).models.values()
    versions = [version for line in models for version in (*line.versions, line.previous) if version is not None]
    return frozenset(name for version in versions for name in (version.location, version.package))


def _parents(artifact: Artifact) -> list[str]:
    return [artifact_id(artifact.record.recipe, stage, found) for stage, found in artifact.record.parents.items()]


def _total(artifacts: Iterable[Artifact]) -> str:
    count, size, recipes = 0, 0, defaultdict[str, int](int)
    for artifact in artifacts:
        count, size = count + 1, size + artifact.size_bytes
        recipes[artifact.record.recipe] += artifact.size_bytes
    split = ", ".join(f"{name} {format_bytes(bytes_)}" for name, bytes_ in sorted(recipes.items()))
    return f"{format_count(count, 'artifact')}, {format_bytes(size)}" + (f" ({split})" if len(recipes) > 1 else "")
