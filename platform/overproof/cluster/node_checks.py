"""What each node of the connected cluster sees and has: the store, and the libraries that all must have alike."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from overproof.artifacts import TOOLS
from overproof.cluster import ray_cluster
from overproof.errors import InputError
from overproof.files import filesystem, read_bytes, shown_name

LIBRARIES = (*TOOLS[1:], "numpy")  # overproof itself comes with the job


@dataclass(frozen=True)
class NodeReport:
    """A node's answer."""

    address: str
    store_error: str | None  # why it cannot read what was written to the store
    versions: Mapping[str, str]  # of Python and ``LIBRARIES``


def ask_nodes(uri: str, text: str) -> list[NodeReport]:
    """Have every node of the connected cluster read a file of the store, which has this text.

    Raises:
        InputError: a node does not answer.
    """
    answers = ray_cluster.call_on_each_node(_report, uri, text)
    return [NodeReport(address, *answer) for address, answer in answers]


def _report(uri: str, text: str) -> tuple[str | None, Mapping[str, str]]:
    return _store_error(uri, text), installed_versions()


def _store_error(uri: str, text: str) -> str | None:
    try:
        files, path = filesystem(uri)
        found = read_bytes(files, path)
    except (OSError, InputError) as error:
        return " ".join(str(error).split())
    return None if found == text.encode() else f"another file is there: {shown_name(repr(found[:40]))}"


def installed_versions() -> dict[str, str]:
    """Of Python and the libraries of this process's environment."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def describe_unshared(uri: str, reports: list[NodeReport]) -> str | None:
    """Which nodes do not see the store, and what they say; None where all see it."""
    without = {report.address: report.store_error for report in reports if report.store_error}
    if not without:
        return None
    first, why = next(iter(sorted(without.items())))
    what = "a URI that each may read and write (credentials of every node, not the head's alone)"
    if "://" not in uri or uri.startswith("file://"):
        what = "a folder that they share, or a URI: --set store=s3://bucket/store"
    return f"{uri}: a file written here is not seen on {', '.join(sorted(without))} ({first}: {why}); expected {what}"


def describe_differences(reports: list[NodeReport]) -> str | None:
    """Which libraries a node has in another version than this process; None where all agree."""
    here = installed_versions()
    for report in reports:
        differing = [
            f"{name} {found}, here {here[name]}" for name, found in report.versions.items() if found != here[name]
        ]
        if differing:
            return (
                f"node {report.address}: {'; '.join(differing)}; expected the same versions on all nodes: install them "
                "from one requirements file or image"
            )
    return None


def require_alike(uri: str, reports: list[NodeReport]) -> None:
    """Refuse a cluster on which a run would fail, or depend on where a stage was placed.

    Raises:
        InputError: a node does not see the store, or has other versions.
    """
    for fault in (describe_unshared(uri, reports), describe_differences(reports)):
        if fault:
            raise InputError(fault)
