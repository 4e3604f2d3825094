"""Packages: the file that passed the gate, with everything that proves it.

A package is a folder: ``package.json`` names every other part with its sha256, and the parents back to the shards;
``package.sig`` signs them all. Without a trusted signature the proof is as good as the folder's origin: hashes show
that parts belong together, not who wrote them.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pyarrow import fs

from overproof.artifacts import RECORD, TOOLS, Store
from overproof.data.manifest import TOKENIZER, Manifest
from overproof.errors import GateRefused, InputError
from overproof.evaluate.gate import VERDICT, CandidateVerdict, Verdict, judge
from overproof.evaluate.metrics import REPORT, MeasuredFile, Report
from overproof.evaluate.outcome import OUTCOME, Outcome
from overproof.files import FileEntry, Parsed, absolute_uri, file_sha256, filesystem, parse_json, read_json
from overproof.package import private_copy
from overproof.package.contents import (
    CARD,
    PACKAGE,
    SPECULATION,
    DraftModel,
    Listing,
    PackageContents,
    PackageFolder,
    list_parts,
    mismatch,
    read_listing,
)
from overproof.package.model_card import render_card
from overproof.package.private_copy import LOG, PrivateCopy, Say
from overproof.package.signature import configured_signing_key, sign_files, write_signature
from overproof.package.speculation import SpeculationResult, judge_draft
from overproof.package.trust import TrustPolicy, require_trusted
from overproof.stage_context import StageContext


@dataclass(frozen=True)
class Package:
    """A package whose parts, verdict and measured hash have been verified; the verdict is judged anew."""

    path: Path
    listing: Listing
    report: Report
    verdict: Verdict
    drafted: CandidateVerdict | None  # of a model with a draft
    signed_by: str | None = None  # id of the trusted key
    copy: PrivateCopy | None = None  # whose folder this is

    @property
    def content(self) -> PackageContents:
        return self.listing.content

    @property
    def judged(self) -> CandidateVerdict:
        """What the packaged file lost against the teacher, and why it may be served."""
        return self.drafted or next(c for c in self.verdict.candidates if c.name == self.content.candidate)

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
        InputError: the exported file, or its tokenizer, is not the one that was measured.
    """
    measured, judged = context.parents["evaluate"].local(REPORT), context.parents["gate"].local()
    report, verdict = read_json(Report, measured / REPORT), read_json(Verdict, judged / VERDICT)
    chosen = require_pass(verdict)
    from overproof.export.stage import EXPORTS, read_exports  # brings torch, which opening and serving do without

    compressed = context.parents["compress"]
    exports = {export.name: export for export in read_exports(compressed.local(EXPORTS))}
    if chosen not in exports:
        raise InputError(
            f"{measured / REPORT}: is of {chosen}; expected one of the exports of {compressed.uri}, which are "
            f"{', '.join(exports)}: evaluate these"
        )
    export = exports[chosen]
    exported = compressed.local(export.file, *export.companions)
    manifest = Manifest.read(context.parents["prepare"])
    model = f"model{Path(export.file).suffix}"
    with context.draft.directory() as folder:
        shutil.copyfile(exported / export.file, folder / model)
        shutil.copyfile(measured / REPORT, folder / REPORT)
        shutil.copyfile(judged / VERDICT, folder / VERDICT)
        for companion in export.companions:
            shutil.copyfile(exported / companion, folder / companion)
        outcome = read_json(Outcome, judged / OUTCOME)
        card = render_card(context, manifest, report, verdict, outcome, model, file_sha256(folder / model))
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
            files=list_parts(folder),
            parents={stage: artifact.record.fingerprint for stage, artifact in context.parents.items()},
            shards={shard.path: shard.sha256 for split in manifest.splits.values() for shard in split.shards},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={tool: version(tool) for tool in TOOLS},
        )
        (folder / PACKAGE).write_text(content.model_dump_json(indent=1), encoding="utf-8")
        signer = sign_made_package(folder, context)
        packed = open_package(folder)  # where the store is remote, the folder goes with the block
        return {"model": export.name, "size_bytes": packed.size_bytes, "sha256": packed.sha256, **signer}


def sign_made_package(folder: Path, context: StageContext) -> dict[str, str]:
    """Sign a package that is being made, where a key is configured; gives the metric that says who did.

    Raises:
        InputError: the key cannot be used.
    """
    key = configured_signing_key(context.recipe.store)
    if key is None:
        return {}
    sha256 = {name: entry.sha256 for name, entry in list_parts(folder).items()}
    write_signature(str(folder), sign_files(context.draft.id, sha256, key))
    return {"signed_by": key.public.id}


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


def load_package(where: str, trust: TrustPolicy, expected_sha256: str | None = None, say: Say = LOG.info) -> Package:
    """A package to serve: a private copy on this machine, verified, which stays while this value lives.

    ``where`` is as ``resolve_package`` takes it. With ``expected_sha256``, of a package that was deployed, a copy of
    that content is taken where there is one, and nothing else is; without, what lies there is read.

    Raises:
        InputError: there is none, it is another one, it is not trusted, or as ``open_package``.
    """
    copy = None if expected_sha256 is None else private_copy.find_verified_copy(expected_sha256)
    if copy is None:
        folder = PackageFolder(resolve_package(where))
        listing = read_listing(folder)
        if expected_sha256 not in (None, listing.sha256):
            raise InputError(f"{folder}: is not the package that was deployed from there; deploy it again")
        require_trusted(listing, trust, str(folder))  # before it is copied
        copy = private_copy.make_copy(folder, listing, say)
    folder = PackageFolder(copy.path)
    listing = read_listing(folder)
    return _judge(folder, listing, require_trusted(listing, trust, str(folder)), copy)


def open_served_copy(where: str, trust: TrustPolicy, sha256: str) -> PrivateCopy:
    """The private copy of a package that replicas have loaded, for what is read beside the model: not hashed again.

    Raises:
        InputError: as ``load_package``.
    """
    copy = private_copy.find_copy(sha256) or load_package(where, trust, sha256).copy
    assert copy
    require_trusted(read_listing(PackageFolder(copy.path)), trust, str(copy.path))
    return copy


def open_package(where: str | Path) -> Package:
    """Read a package where it lies and hold everything it claims against its parts, but for who signed it.

    Raises:
        InputError: a part is missing or was edited, something else lies there, the verdict is not a pass, the policy
            and the report do not give that verdict, or the model or its tokenizer is not the file that was measured.
    """
    folder = PackageFolder(where)
    listing = read_listing(folder)
    private_copy.compare(folder, listing)
    return _judge(folder, listing)


def _judge(
    folder: PackageFolder, listing: Listing, signed_by: str | None = None, copy: PrivateCopy | None = None
) -> Package:
    """What was measured of the files, whose hashes are those of the listing, and the verdict."""
    content = listing.content
    drafting = content.speculate
    report, written = _read(Report, folder, listing, REPORT), _read(Verdict, folder, listing, VERDICT)
    passed = content.candidate if drafting is None else drafting.draft
    if not written.passed or written.chosen != passed:
        raise InputError(f"{folder}: {passed} has no passing verdict; only what passed its gate is served")
    verdict = judge(content.policy, report)
    if _outcome(verdict) != _outcome(written):
        raise InputError(f"{folder}: the policy and the report do not give the verdict in {VERDICT}; {folder.remedy}")
    drafted_verdict = None
    if drafting is not None:
        drafted = _read(SpeculationResult, folder, listing, SPECULATION)
        drafted_verdict = _require_text(content, drafting, report, drafted)
        _require_measured(f"{folder}/{drafting.file}", content.files[drafting.file], report.find(drafting.draft))
    _require_measured(f"{folder}/{content.model}", content.files[content.model], report.find(content.candidate))
    _require_tokenizer(folder, content, report)
    return Package(Path(str(folder)), listing, report, verdict, drafted_verdict, signed_by, copy)


def _read(model: type[Parsed], folder: PackageFolder, listing: Listing, name: str) -> Parsed:
    """A JSON part, of the very bytes that were hashed."""
    content = folder.read(name)
    found = hashlib.sha256(content).hexdigest()
    if found != listing.files[name].sha256:
        raise mismatch(folder, name, found, listing.files[name])
    return parse_json(model, content, f"{folder}/{name}", f"expected what this version writes; {folder.remedy}")


def _require_measured(file: str, entry: FileEntry, measured: MeasuredFile | None) -> None:
    if measured is None or (measured.sha256, measured.size_bytes) != (entry.sha256, entry.size_bytes):
        was = "nothing" if measured is None else f"{measured.sha256[:12]}… with {measured.size_bytes}"
        raise InputError(
            f"{file}: sha256 {entry.sha256[:12]}… and {entry.size_bytes} bytes; measured was {was}; "
            "only the measured file is served: evaluate again"
        )


def _require_tokenizer(folder: PackageFolder, content: PackageContents, report: Report) -> None:
    """Texts are split, or were, by the tokenizer beside the model: with another one the figures are of no model."""
    if TOKENIZER not in content.files:
        return
    found, expected = content.files[TOKENIZER].sha256, report.tokenizer_sha256
    if found != expected:
        was = "one that the report does not name" if expected is None else f"{expected[:12]}…"
        raise InputError(
            f"{folder}/{TOKENIZER}: sha256 {found[:12]}…; the tokenizer of the texts that were measured was {was}; a "
            "model is served with no other: evaluate again"
        )


def _require_text(
    content: PackageContents, drafting: DraftModel, report: Report, written: SpeculationResult
) -> CandidateVerdict:
    """The draft leaves the text as it is, by what was measured of these very files."""
    found, verdict, files = written.found, judge_draft(drafting.policy, report, written.found), content.files
    model, draft = files[content.model].sha256, files[drafting.file].sha256
    of = (found.model, found.model_sha256, found.draft, found.draft_sha256)
    if of != (content.candidate, model, drafting.draft, draft):
        raise InputError(f"{SPECULATION}: is of {found.draft} for {found.model}, or of other files; measure it again")
    if not verdict.passed or _reasons(verdict) != _reasons(written.verdict):
        raise InputError(f"{SPECULATION}: {content.candidate} has no passing verdict with this draft; measure it again")
    return verdict


def _outcome(verdict: Verdict) -> Any:
    """What was decided, without the wording, which may differ between versions."""
    return verdict.passed, verdict.chosen, [_reasons(c) for c in verdict.candidates]


def _reasons(verdict: CandidateVerdict) -> Any:
    return verdict.name, verdict.passed, [(r.rule, r.passed) for r in verdict.reasons]
