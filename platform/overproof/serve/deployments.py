"""The deployed versions of each model and the log of changes: frozen values, in a file that outlives the cluster."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from overproof.config import Serve
from overproof.errors import InputError
from overproof.files import atomic_write, filesystem, read_json_or_default
from overproof.package.contents import SHA256
from overproof.serve.responses import ModelInfo

CONTROLLER_NAME = "overproof-controller"  # name and namespace of the Ray actor that keeps the deployments
FORMAT = 3  # of the file
Role = Literal["stable", "canary", "shadow"]
ChangeKind = Literal["deploy", "canary", "shadow", "promote", "rollback", "automatic rollback", "failed", "undeploy"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Version(Frozen):
    """A package and the settings it is served with."""

    model: ModelInfo
    location: str  # folder or URI of the package
    # Of all its files, signature included: nothing else that lies there is served.
    contents_sha256: str = Field(pattern=SHA256)
    settings: Serve
    resident_mb: float  # of the engine's process as measured in the package's report, plus a draft's file

    @property
    def package(self) -> str:
        return self.model.overproof.package

    @property
    def application(self) -> str:
        """Name of its Ray Serve application."""
        return application_name(self.package)


def application_name(package: str) -> str:
    """Name of the Ray Serve application that holds a package's replicas."""
    return f"overproof-{package.replace('/', '-')}"


class ModelDeployment(Frozen):
    """The versions of one model: ``stable`` answers, a canary or a shadow is the candidate, ``previous`` answered
    before. The ``salt`` is what sessions are assigned by, and no client's to know: whoever could compute which sessions
    a canary gets could choose what it is judged by.
    """

    salt: str = ""  # of a canary
    stable: Version
    canary: Version | None = None
    shadow: Version | None = None
    previous: Version | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_salt(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("canary") is not None and not fields.get("salt"):
            return {**fields, "salt": _new_salt()}
        return fields

    @property
    def versions(self) -> tuple[Version, ...]:
        """Those that have replicas."""
        return tuple(v for v in (self.stable, self.canary, self.shadow) if v is not None)

    @property
    def candidate(self) -> Version | None:
        return self.canary or self.shadow


def _new_salt() -> str:
    return secrets.token_hex(16)


class DeploymentEvent(Frozen):
    """One change of what is deployed."""

    time: str  # UTC, ISO 8601
    user: str
    change: ChangeKind
    model: str
    package: str
    reason: str = ""


class Deployments(Frozen):
    """Every model by name, and every change, oldest first. Each change gives a new value."""

    format: Literal[3] = 3
    models: dict[str, ModelDeployment] = {}
    events: tuple[DeploymentEvent, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _check_format(cls, fields: Any) -> Any:
        """Refuse a file of another format before its fields are looked at."""
        if isinstance(fields, dict) and fields.get("format", 1 if fields else FORMAT) != FORMAT:
            raise ValueError(
                f"deployments of format {fields.get('format', 1)}, and this version reads {FORMAT}; move the file away "
                "and deploy again"
            )
        return fields

    @property
    def versions(self) -> Iterator[Version]:
        """Those of all models that have replicas."""
        for deployment in self.models.values():
            yield from deployment.versions

    def model(self, name: str) -> ModelDeployment:
        """The versions of a model.

        Raises:
            InputError: it is not deployed.
        """
        if name not in self.models:
            raise InputError(f"{name}: not deployed; found {', '.join(self.models) or 'nothing deployed'}")
        return self.models[name]

    def is_first(self, name: str) -> bool:
        """Whether a model has no version to return to, deployed or not."""
        deployment = self.models.get(name)
        return deployment is None or (deployment.candidate or deployment.previous) is None

    def deployed(self, version: Version, role: Role, user: str) -> Deployments:
        """With a version as the stable one of its model, or as a candidate beside it.

        Raises:
            InputError: there is another candidate already, or no stable version yet to compare a candidate with.
        """
        name, deployment = version.model.id, self.models.get(version.model.id)
        if deployment is None:
            if role != "stable":
                raise InputError(f"{name}: no stable version is deployed to try a {role} beside; deploy it as stable")
            return self._changed(name, ModelDeployment(stable=version), user, "deploy", version.package)
        same_package = version.package == deployment.stable.package
        if deployment.candidate is not None and not (role == "stable" and same_package):
            raise InputError(
                f"{name}: {deployment.candidate.package} is being tried; first `overproof promote {name}` or "
                f"`overproof rollback {name}`"
            )
        if role == "stable":
            previous = deployment.previous if same_package else deployment.stable
            changed = deployment.model_copy(update={"stable": version, "previous": previous})
            return self._changed(name, changed, user, "deploy", version.package)
        if same_package:
            raise InputError(f"{name}: {version.package} is the stable version; expected another version as {role}")
        changed = deployment.model_copy(update={role: version, "salt": _new_salt()})
        return self._changed(name, changed, user, role, version.package)

    def promoted(self, name: str, user: str) -> Deployments:
        """With a model's candidate as its stable version.

        Raises:
            InputError: there is no candidate.
        """
        deployment = self.model(name)
        candidate = deployment.candidate
        if candidate is None:
            raise InputError(f"{name}: no version is being tried; `overproof deploy PACKAGE --canary` tries one")
        changed = ModelDeployment(stable=candidate, previous=deployment.stable)
        return self._changed(name, changed, user, "promote", candidate.package)

    def rolled_back(self, name: str, user: str, reason: str = "", change: ChangeKind = "rollback") -> Deployments:
        """Without a model's candidate; where there is none, with its previous version as the stable one.

        Raises:
            InputError: there is neither.
        """
        deployment = self.model(name)
        if deployment.candidate is not None:
            changed = ModelDeployment(stable=deployment.stable, previous=deployment.previous)
            return self._changed(name, changed, user, change, deployment.candidate.package, reason)
        if deployment.previous is None:
            raise InputError(f"{name}: {deployment.stable.package} has no version before it; nothing to roll back to")
        changed = ModelDeployment(stable=deployment.previous)  # what was taken back comes again by `deploy` alone
        return self._changed(name, changed, user, change, deployment.stable.package, reason)

    def undeployed(self, name: str, user: str) -> Deployments:
        """Without a model.

        Raises:
            InputError: it is not deployed.
        """
        return self._changed(name, None, user, "undeploy", self.model(name).stable.package)

    def with_event(self, name: str, user: str, change: ChangeKind, package: str, reason: str) -> Deployments:
        """The same versions with one more event."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = DeploymentEvent(time=time, user=user, change=change, model=name, package=package, reason=reason)
        return self.model_copy(update={"events": (*self.events, event)})

    def _changed(
        self,
        name: str,
        deployment: ModelDeployment | None,
        user: str,
        change: ChangeKind,
        package: str,
        reason: str = "",
    ) -> Deployments:
        others = {other: value for other, value in self.models.items() if other != name}
        models = others if deployment is None else {**self.models, name: deployment}
        return self.model_copy(update={"models": models}).with_event(name, user, change, package, reason)


def read_deployments(uri: str) -> Deployments:
    """The deployments in a file or URI, empty where there is no such file.

    Raises:
        InputError: it cannot be read, or is of another format.
    """
    return read_json_or_default(Deployments, uri, "overproof deploy")


def write_deployments(uri: str, deployments: Deployments) -> None:
    """Replace the deployments in a file or URI, atomically.

    Raises:
        InputError: it cannot be written.
    """
    files, path = filesystem(uri)
    try:
        files.create_dir(path.rpartition("/")[0], recursive=True)
        atomic_write(files, path, deployments.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise InputError(f"{uri}: cannot be written: {error}; give a file you may write") from None
