"""Change what a running cluster serves: deploy, try, promote, roll back, and read how it came to that."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from overproof.artifacts import RECORD, Store
from overproof.cluster import ray_cluster
from overproof.config import Serve, parse_overrides
from overproof.console import out, say, waiting
from overproof.errors import InputError
from overproof.files import join_uri
from overproof.units import format_count, format_percent, format_seconds

if TYPE_CHECKING:
    from overproof.serve.canary import VersionStats
    from overproof.serve.deployments import Version

PLACES = ("stable", "canary", "shadow")


def deploy(package: str, store: str, overrides: Sequence[str], place: str) -> int:
    """Serve a package on the running cluster, from now on or beside the version that answers.

    Raises:
        InputError: the package may not be served, does not start, or has no place; what was served goes on.
    """
    settings = Serve.parse(parse_overrides(overrides, "serve"))
    where = find_package(package, store)
    _connect()
    from overproof.serve import server
    from overproof.serve.controller import describe_version
    from overproof.serve.package_trust import read_trusted_keys, tell_unsigned

    settings = read_trusted_keys(settings) if settings.trust.keys else settings
    running = server.call_controller("settings") if server.is_serving() else None
    version = describe_version(where, settings, running, out.print)  # what is wrong shows before anything starts
    with waiting(f"starting {version.package}"):
        if server.is_serving():
            base = server.running_url(settings)
            server.call_controller("deploy", version.location, settings, place, current_user())
        elif place != "stable":
            raise InputError(f"nothing is served on this cluster to try a {place} beside; deploy it as stable")
        else:
            book = settings.deployments or join_uri(store, "deployments.json")
            base = server.start_gateway({}, settings.model_copy(update={"deployments": book}))
            server.call_controller("deploy", version.location, settings, place, current_user())
    tell_unsigned(version)
    share = f" for {format_percent(settings.canary.share, 0)} of the sessions" if place == "canary" else ""
    out.print(f"{version.package} is {place}{share} at {base}")
    return 0


def promote(model: str, yes: bool) -> int:
    """Let the version that is tried answer, once what is known of it was said.

    Raises:
        InputError: no version is tried, or too little is known of it and nobody said ``--yes``.
    """
    _connect()
    from overproof.serve import server
    from overproof.serve.canary import too_little

    for tried in _tried():
        if tried.model == model:
            say(tried.line)
            few = too_little(tried.version.settings.canary, tried.stats, tried.compares)
            if few and not yes:
                raise InputError(
                    f"{model}: {' and '.join(few)} are too few to go by; wait, or promote it all the same: --yes"
                )
    with waiting(f"promoting what is tried of {model}"):
        package = server.call_controller("promote", model, current_user())
    _print_answers(model, package)
    return 0


def roll_back(model: str, reason: str) -> int:
    """Take back what is tried, or return to the version before."""
    _connect()
    from overproof.serve import server

    with waiting(f"rolling {model} back"):
        package = server.call_controller("roll_back", model, current_user(), reason)
    _print_answers(model, package)
    return 0


def _print_answers(model: str, package: str) -> None:
    from overproof.serve.controller import count_replicas

    out.print(f"{package} answers for {model}, with {format_count(count_replicas(package), 'replica')}")


def undeploy(model: str) -> int:
    """Serve a model no longer."""
    _connect()
    from overproof.serve import server

    server.call_controller("undeploy", model, current_user())
    out.print(f"{model} is served no longer")
    return 0


def print_deployments(file: str | None) -> int:
    """Print who serves what, and every change; of a file, also where nothing runs."""
    from overproof.serve.deployments import read_deployments

    counts, tried = dict[str, int](), list[_Tried]()
    if file is not None:
        book = read_deployments(file)
    else:
        _connect()
        from overproof.serve import server
        from overproof.serve.controller import count_replicas

        book = server.call_controller("deployments")
        counts = {version.package: count_replicas(version.package) for version in book.versions}
        tried = _tried()
    live = Table("model", "place", "package", "replicas", box=None, pad_edge=False)
    for name, line in book.models.items():
        for place in PLACES:
            version = getattr(line, place)
            if version is not None:
                live.add_row(name, place, version.package, str(counts.get(version.package, "")))
    events = Table("at (UTC)", "who", "what", "package", "reason", box=None, pad_edge=False)
    for event in book.events:
        events.add_row(event.time[:19], event.user, event.change, event.package, event.reason)
    out.print(live)
    for each in tried:
        say(each.line)
    out.print(events)
    return 0


@dataclass(frozen=True)
class _Tried:
    """A version that is tried on the running cluster, and what was measured of it."""

    model: str
    version: Version
    stats: VersionStats
    compares: bool
    line: str


def _tried() -> list[_Tried]:
    from overproof.serve import server
    from overproof.serve.canary import VersionStats, describe_evidence

    book, measured = server.call_controller("deployments"), server.call_controller("stats")
    found = []
    for name, deployment in book.models.items():
        version = deployment.candidate
        if version is not None:
            stats = measured.get(version.package, VersionStats())
            tries = [e for e in book.events if e.package == version.package and e.change in ("canary", "shadow")]
            since_s = (datetime.now(UTC) - datetime.fromisoformat(tries[-1].time)).total_seconds()
            told = describe_evidence(version.settings.canary, stats)
            line = f"{name}: {version.package} has been tried for {format_seconds(since_s)}: {told}"
            compares = deployment.shadow is not None or version.settings.canary.compare > 0
            found.append(_Tried(name, version, stats, compares, line))
    return found


def find_package(package: str, store: str) -> str:
    """A package by folder or URI, or by its id in a store.

    Raises:
        InputError: there is none.
    """
    path = Path(package)
    if "://" in package or (path / RECORD).is_file() or (path / "package.json").is_file():
        return package
    return Store(store).get(package).uri


def current_user() -> str:
    """Who makes a change, as far as this machine knows."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _connect() -> None:
    if not ray_cluster.is_remote():
        raise InputError(
            "RAY_ADDRESS is not set; expected the address of a running cluster, which outlives this command; "
            'one on this machine: eval "$(overproof up)"'
        )
    with waiting("connecting to Ray"):
        ray_cluster.connect()
