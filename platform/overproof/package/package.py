"""Packages: the file that passed the gate, with everything that proves it.

A package is a folder: ``package.json`` names every other part with its sha256, and the parents back to the shards.
The proof is as good as the folder's origin: hashes show that parts belong together, not who wrote them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pyarrow import fs
from pydantic import Field

from overproof.artifacts import RECORD, TOOLS, Artifact, Store, read_record
from overproof.config import Gate, Speculate
from overproof.data.manifest import Manifest
from overproof.errors import GateRefused, InputError
from overproof.evaluate.gate import CandidateVerdict, Reason, Verdict, judge
from overproof.evaluate.metrics import MeasuredFile, Report
from overproof.files import FileEntry, FrozenModel, absolute_uri, file_sha256, filesystem, read_json, verify_files
from overproof.models import pretrained
from overproof.package.model_card import render_card
from overproof.package.speculation import SpeculationResult, judge_draft
from overproof.stage_context import StageContext

PACKAGE, REPORT, VERDICT, CARD = "package.json", "report.json", "verdict.json", "README.md"
SPECULATION = "speculation.json"
PICKLES = (*pretrained.PICKLES, ".joblib", ".npy", ".npz")
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # never a path


class DraftModel(FrozenModel):
    """What a package has beside another when its model answers with a draft."""

    draft: str  # the export that passed the gate
    file: FileName = "draft.gguf"
    policy: Speculate


class PackageContents(FrozenModel):
    """The content of ``package.json``."""

    format: Literal[4] = 4
    id: str  # of the artifact, as `overproof show` takes it
    name: str
    task: str
    details: dict[str, Any]  # what the task says of a row: what a request must hold, and what answers mean
    candidate: str  # the export that was chosen
    model: FileName
    model_format: str
    companions: tuple[FileName, ...] = ()  # files that the engine reads beside the model
    policy: Gate
    speculate: DraftModel | None = None
    files: dict[FileName, FileEntry]
    parents: dict[str, str]  # stage -> fingerprint
    shards: dict[str, str]  # path in the prepared data -> sha256
    created: str  # UTC, ISO 8601
    versions: dict[str, str]


@dataclass(frozen=True)
class Package:
    """A package whose parts, verdict and measured hash have been verified; the verdict is judged anew."""

    path: Path
    content: PackageContents
    report: Report
    verdict: Verdict
    drafted: CandidateVerdict | None = None  # of a model with a draft

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why the packaged file may be served."""
        of = self.drafted or next(c for c in self.verdict.candidates if c.name == self.content.candidate)
        return of.reasons

    @property
    def model(self) -> Path:
        return self.path / self.content.model

    @property
    def draft(self) -> tuple[Path, int] | None:
        """The file of the model that drafts, if one does, and how many tokens it guesses at a time."""
        of = self.content.speculate
        return None if of is None else (self.path / of.file, of.policy.draft_tokens)

    @property
    def measured(self) -> MeasuredFile:
        """What was measured of the packaged file."""
        return next(m for m in self.report.measured if m.name == self.content.candidate)

    @property
    def sha256(self) -> str:
        return self.content.files[self.content.model].sha256

    @property
    def size_bytes(self) -> int:
        return self.model.stat().st_size


def build_package(context: StageContext) -> dict[str, Any]:
    """Pack the candidate that the gate chose.

    Raises:
        GateRefused: none passed, with the reasons.
        InputError: the exported file is not the one that was measured.
    """
    parents = {stage: artifact.local() for stage, artifact in context.parents.items()}
    report = read_json(Report, parents["evaluate"] / REPORT)
    verdict = read_json(Verdict, parents["gate"] / VERDICT)
    chosen = require_pass(verdict)
    from overproof.export.stage import read_exports  # brings torch, which opening and serving do without

    export = next(e for e in read_exports(parents["compress"]) if e.name == chosen)
    manifest = Manifest.read(parents["prepare"])
    model = f"model{Path(export.file).suffix}"
    with context.draft.directory() as folder:
        shutil.copyfile(parents["compress"] / export.file, folder / model)
        shutil.copyfile(parents["evaluate"] / REPORT, folder / REPORT)
        shutil.copyfile(parents["gate"] / VERDICT, folder / VERDICT)
        for companion in export.companions:
            shutil.copyfile(parents["compress"] / companion, folder / companion)
        card = render_card(context, manifest, report, verdict, model, file_sha256(folder / model))
        (folder / CARD).write_text(card, encoding="utf-8")
        content = PackageContents(
            id=context.draft.id,
            name=context.recipe.name,
            task=manifest.task,
            details=manifest.details,
            companions=export.companions,
            candidate=export.name,
            model=model,
            model_format=export.format,
            policy=context.recipe.gate,
            files=hash_files(folder),
            parents={stage: artifact.record.fingerprint for stage, artifact in context.parents.items()},
            shards={shard.path: shard.sha256 for split in manifest.splits.values() for shard in split.shards},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={tool: version(tool) for tool in TOOLS},
        )
        (folder / PACKAGE).write_text(content.model_dump_json(indent=1), encoding="utf-8")
        packed = open_package(folder)
    return {"model": export.name, "size_bytes": packed.size_bytes, "sha256": packed.sha256}


def require_pass(verdict: Verdict) -> str:
    """The candidate that passed.

    Raises:
        GateRefused: none did, with the reasons.
    """
    if verdict.chosen is None:
        lines = [f"  {c.name}: {r.text}" for c in verdict.candidates for r in c.reasons if not r.passed]
        others = [c.name for c in verdict.candidates if c.passed]  # than the one that the policy names
        every = f"the candidate that gate.candidate names ({', '.join(others)} passed)" if others else "every candidate"
        raise GateRefused(f"the gate refused {every}, so nothing is packaged or served:\n" + "\n".join(lines))
    return verdict.chosen


def resolve_package(where: str) -> str:
    """The folder or URI of one package, the newest of those that a folder or URI such as a recipe's in a store holds.

    Raises:
        InputError: there is none.
    """
    files, root = filesystem(where)
    local = isinstance(files, fs.LocalFileSystem)
    if files.get_file_info(f"{root}/{RECORD}").type == fs.FileType.File or (local and (Path(root) / PACKAGE).is_file()):
        return absolute_uri(where)
    packages = [artifact for artifact in Store(where).artifacts() if artifact.record.stage == "package"]
    if not packages:
        raise InputError(f"{root}: no package there; expected a folder with {PACKAGE}: `overproof run` makes one")
    return packages[-1].uri


def fetch_package(where: str) -> Path:
    """A package's folder on this machine, fetched where it is remote; ``where`` is as ``resolve_package`` takes it.

    Raises:
        InputError: there is none.
    """
    pinned = resolve_package(where)
    files, root = filesystem(pinned)
    if isinstance(files, fs.LocalFileSystem):
        return Path(root)
    record = read_record(pinned)
    assert record  # or it would not have been resolved
    return Artifact(pinned, record).local()


def open_package(path: Path) -> Package:
    """Read a package and hold everything it claims against its parts.

    Raises:
        InputError: a part is missing or was edited, a pickle lies there, the verdict is not a pass, the policy and
            the report do not give that verdict, or the model is not the file that was measured.
    """
    if not (path / PACKAGE).is_file():
        raise InputError(f"{path}: no {PACKAGE}; expected a package, as `overproof run` makes")
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in PICKLES:
            raise InputError(f"{file}: may be a pickle, which runs code when read; a package holds none: delete it")
    content = read_json(PackageContents, path / PACKAGE)
    drafting = content.speculate
    drafted = () if drafting is None else (drafting.file, SPECULATION)
    for part in (content.model, REPORT, VERDICT, CARD, *content.companions, *drafted):
        if part not in content.files:
            raise InputError(f"{path / PACKAGE}: lists no {part}; package again")
    verify_files(str(path), content.files)
    report, written = read_json(Report, path / REPORT), read_json(Verdict, path / VERDICT)
    passed = content.candidate if drafting is None else drafting.draft
    if not written.passed or written.chosen != passed:
        raise InputError(f"{path}: {passed} has no passing verdict; only what passed its gate is served")
    verdict = judge(content.policy, report)
    if _outcome(verdict) != _outcome(written):
        raise InputError(f"{path}: the policy and the report do not give the verdict in {VERDICT}; package again")
    drafted_verdict = None
    if drafting is not None:
        drafted_verdict = _require_text(content, drafting, report, read_json(SpeculationResult, path / SPECULATION))
        _require_measured(path / drafting.file, content.files[drafting.file], report.find(drafting.draft))
    _require_measured(path / content.model, content.files[content.model], report.find(content.candidate))
    return Package(path, content, report, verdict, drafted_verdict)


def _require_measured(file: Path, entry: FileEntry, measured: MeasuredFile | None) -> None:
    if measured is None or (measured.sha256, measured.size_bytes) != (entry.sha256, entry.size_bytes):
        was = "nothing" if measured is None else f"{measured.sha256[:12]}… with {measured.size_bytes}"
        raise InputError(
            f"{file}: sha256 {entry.sha256[:12]}… and {entry.size_bytes} bytes; measured was {was}; "
            "only the measured file is served: evaluate again"
        )


def _require_text(
    content: PackageContents, drafting: DraftModel, report: Report, written: SpeculationResult
) -> CandidateVerdict:
    """The draft leaves the text as it is, by what was measured of these very files."""
    found, verdict, files = written.found, judge_draft(drafting.policy, report, written.found), content.files
    model, draft = files[content.model].sha256, files[drafting.file].sha256
    of = (found.model, found.model_sha256, found.draft, found.draft_sha256)
    if of != (content.candidate, model, drafting.draft, draft):
        raise InputError(f"{SPECULATION}: is of {found.draft} for {found.model}, or of other files; package again")
    if not verdict.passed or _reasons(verdict) != _reasons(written.verdict):
        raise InputError(f"{SPECULATION}: {content.candidate} has no passing verdict with this draft; package again")
    return verdict


def _outcome(verdict: Verdict) -> Any:
    """What was decided, without the wording, which may differ between versions."""
    return verdict.passed, verdict.chosen, [_reasons(c) for c in verdict.candidates]


def _reasons(verdict: CandidateVerdict) -> Any:
    return verdict.name, verdict.passed, [(r.rule, r.passed) for r in verdict.reasons]


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Every part of a package that is being made."""
    files = sorted(folder.iterdir())
    return {file.name: FileEntry(sha256=file_sha256(file), size_bytes=file.stat().st_size) for file in files}
