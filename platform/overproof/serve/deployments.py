"""What is deployed, and how it came to that: plain values, in a file that outlives the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from overproof.config import Serve
from overproof.errors import InputError
from overproof.files import atomic_write, filesystem, read_json_or_default
from overproof.serve.responses import ModelInfo

CONTROLLER = "overproof-desk"  # the actor that keeps it: its name, and its namespace
Role = Literal["stable", "canary", "shadow"]
ChangeKind = Literal["deploy", "canary", "shadow", "promote", "rollback", "automatic rollback", "failed", "undeploy"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Version(Frozen):
    """A package and how it is served."""

    model: ModelInfo
    where: str  # folder or URI
    settings: Serve
    resident_mb: float  # of the engine's process, as the package's report has it, and of a draft's file

    @property
    def package(self) -> str:
        return self.model.overproof.package

    @property
    def application(self) -> str:
        """Of Ray Serve."""
        return application_name(self.package)


def application_name(package: str) -> str:
    """The Serve application that holds a package."""
    return f"overproof-{package.replace('/', '-')}"


class ModelDeployment(Frozen):
    """The versions of one model: who answers, who is tried, and who answered before."""

    stable: Version
    canary: Version | None = None
    shadow: Version | None = None
    before: Version | None = None

    @property
    def live(self) -> tuple[Version, ...]:
        return tuple(v for v in (self.stable, self.canary, self.shadow) if v is not None)

    @property
    def tried(self) -> Version | None:
        return self.canary or self.shadow


class DeploymentEvent(Frozen):
    """One change."""

    at: str  # UTC, ISO 8601
    who: str
    what: ChangeKind
    model: str
    package: str
    reason: str = ""


class Deployments(Frozen):
    """Every line, and every change, oldest first."""

    format: Literal[1] = 1
    lines: dict[str, ModelDeployment] = {}
    events: tuple[DeploymentEvent, ...] = ()

    @property
    def live(self) -> Iterator[Version]:
        for line in self.lines.values():
            yield from line.live

    def _with(
        self, name: str, line: ModelDeployment | None, who: str, what: ChangeKind, package: str, reason: str = ""
    ) -> Deployments:
        lines = {**self.lines, name: line} if line else {k: v for k, v in self.lines.items() if k != name}
        return self.model_copy(update={"lines": lines}).noted(name, who, what, package, reason)

    def noted(self, name: str, who: str, what: ChangeKind, package: str, reason: str) -> Deployments:
        """The book with one more event, and nothing else changed."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = DeploymentEvent(at=at, who=who, what=what, model=name, package=package, reason=reason)
        return self.model_copy(update={"events": (*self.events, event)})

    def line(self, name: str) -> ModelDeployment:
        """The line of a model.

        Raises:
            InputError: there is none.
        """
        if name not in self.lines:
            raise InputError(f"{name}: not deployed; found {', '.join(self.lines) or 'nothing deployed'}")
        return self.lines[name]

    def deployed(self, version: Version, place: Role, who: str) -> Deployments:
        """With a version that answers, or is tried beside the one that does.

        Raises:
            InputError: another version is tried already, or there is none yet that it could be tried beside.
        """
        name, line = version.model.id, self.lines.get(version.model.id)
        if line is None:
            if place != "stable":
                raise InputError(f"{name}: nothing is deployed that a {place} could stand beside; deploy it without")
            return self._with(name, ModelDeployment(stable=version), who, "deploy", version.package)
        again = version.package == line.stable.package
        if line.tried is not None and not (place == "stable" and again):
            raise InputError(
                f"{name}: {line.tried.package} is being tried; first `overproof promote {name}` or "
                f"`overproof rollback {name}`"
            )
        if place == "stable":
            before = line.before if again else line.stable
            return self._with(
                name, line.model_copy(update={"stable": version, "before": before}), who, "deploy", version.package
            )
        if again:
            raise InputError(f"{name}: {version.package} answers already; expected another version to try")
        return self._with(name, line.model_copy(update={place: version}), who, place, version.package)

    def promoted(self, name: str, who: str) -> Deployments:
        """The version that was tried answers from now on.

        Raises:
            InputError: none is tried.
        """
        line = self.line(name)
        if line.tried is None:
            raise InputError(f"{name}: no version is being tried; `overproof deploy PACKAGE --canary` tries one")
        return self._with(
            name, ModelDeployment(stable=line.tried, before=line.stable), who, "promote", line.tried.package
        )

    def rolled_back(self, name: str, who: str, reason: str = "", what: ChangeKind = "rollback") -> Deployments:
        """Without the version that is tried, or else with the one that answered before.

        Raises:
            InputError: there is neither.
        """
        line = self.line(name)
        if line.tried is not None:
            back = ModelDeployment(stable=line.stable, before=line.before)
            return self._with(name, back, who, what, line.tried.package, reason)
        if line.before is None:
            raise InputError(f"{name}: {line.stable.package} is the first version; nothing to roll back to")
        back = ModelDeployment(stable=line.before, before=line.stable)
        return self._with(name, back, who, what, line.stable.package, reason)

    def withdrawn(self, name: str, who: str) -> Deployments:
        """Without a model.

        Raises:
            InputError: it is not deployed.
        """
        return self._with(name, None, who, "undeploy", self.line(name).stable.package)


def read_deployments(uri: str) -> Deployments:
    """A book, empty where there is no such file.

    Raises:
        InputError: it cannot be read.
    """
    return read_json_or_default(Deployments, uri, "overproof deploy")


def write_deployments(uri: str, book: Deployments) -> None:
    """Put a book in the place of the one before, at once.

    Raises:
        InputError: it cannot be written.
    """
    files, path = filesystem(uri)
    try:
        files.create_dir(path.rpartition("/")[0], recursive=True)
        atomic_write(files, path, book.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise InputError(f"{uri}: cannot be written: {error}; give a file you may write") from None
