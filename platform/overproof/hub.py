"""Models on the Hugging Face Hub: ``hf://ORG/NAME``, ``hf://ORG/NAME@REVISION``, each also with a path below it.

A revision (branch, tag or commit; the main branch where none is named) becomes a commit once in a process, so that
whatever follows is of the same commit. Files come into the cache that every tool of the Hub shares (``HF_HOME``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, unquote

from pyarrow import fs

from overproof.errors import InputError

SCHEME = "hf://"
PATTERN = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
OTHERS = tuple(f"{SCHEME}{kind}/" for kind in ("datasets", "spaces", "buckets", "models"))  # as pyarrow.fs opens them


@dataclass(frozen=True)
class Repository:
    """A model's repository at one commit."""

    name: str  # ORG/NAME
    commit: str  # 40 hex digits
    files: Mapping[str, int]  # size in bytes by name

    @property
    def uri(self) -> str:
        return f"{SCHEME}{self.name}@{self.commit}"


def is_model(uri: str) -> bool:
    """Whether this names a model on the Hub, or a file of one."""
    return uri.startswith(SCHEME) and not uri.startswith(OTHERS)


def open_file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """A file system, and the place of the model, or of the file of it, there: the cache where the Hub is not to be
    asked, otherwise the Hub, of which a reader fetches what it reads.

    Raises:
        InputError: as ``repository``.
    """
    from huggingface_hub import HfFileSystem, is_offline_mode

    found = repository(uri)
    path = _parse(uri)["path"] or ""
    if is_offline_mode():
        return fs.LocalFileSystem(), str(_cached(found) / path).rstrip("/")
    with _explained(found.uri):
        opened = HfFileSystem(endpoint=_endpoint())
    return fs.PyFileSystem(fs.FSSpecHandler(opened)), f"{found.name}@{found.commit}/{path}".rstrip("/")


def pin(uri: str) -> str:
    """The same with the commit as its revision.

    Raises:
        InputError: as ``repository``.
    """
    path = _parse(uri)["path"]
    return repository(uri).uri + (f"/{path}" if path else "")


def repository(uri: str) -> Repository:
    """The repository that a URI names, at the commit that its revision is now.

    Raises:
        InputError: there is none, this account may not read it, or neither the Hub nor the cache can tell.
    """
    parsed = _parse(uri)
    return _repository(parsed["name"] or "", parsed["revision"])


def cached(uri: str, names: Sequence[str]) -> Path | None:
    """The folder of the cache that holds these files of a model; None where it lacks one.

    Raises:
        InputError: as ``repository``.
    """
    folder = _snapshot(repository(uri))
    return folder if all((folder / name).is_file() for name in names) else None


def download(uri: str, names: Sequence[str], tell: Callable[[Callable[[], str]], Any]) -> Path:
    """The folder of the cache that holds these files of a model, the missing ones fetched.

    ``tell`` is called once where any is missing, with what says how far it is.

    Raises:
        InputError: as ``repository``, or the cache lacks one and the Hub is not to be asked.
    """
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    found = repository(uri)
    if (there := cached(uri, names)) is not None:
        return there
    if is_offline_mode():
        _refuse_offline(found, next(name for name in names if not (_snapshot(found) / name).is_file()))
    blobs, total = _snapshot(found).parent.parent / "blobs", sum(found.files.get(name, 0) for name in names)
    before = _bytes_in(blobs)
    tell(lambda: f"{(_bytes_in(blobs) - before) / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    disable_progress_bars()  # workers have no terminal
    with _explained(found.uri):
        folder = snapshot_download(
            found.name, revision=found.commit, allow_patterns=list(names), endpoint=_endpoint(), cache_dir=_cache(),
        )  # fmt: skip
    return Path(folder)


def _parse(uri: str) -> dict[str, str | None]:
    found = PATTERN.fullmatch(uri)
    if found is None:
        raise InputError(
            f"{uri}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION, as the Hugging Face Hub names a model"
        )
    return {**found.groupdict(), "revision": unquote(found["revision"]) if found["revision"] else None}


@lru_cache(maxsize=64)
def _repository(name: str, revision: str | None) -> Repository:
    from huggingface_hub import HfApi, is_offline_mode

    uri = SCHEME + name + (f"@{quote(revision, safe='')}" if revision else "")
    api = HfApi(endpoint=_endpoint())
    if revision is not None and COMMIT.fullmatch(revision) and (listed := _listed(name, revision)) is not None:
        return Repository(name, revision, listed)
    if is_offline_mode():
        with _explained(uri):
            commit = api.resolve_revision(name, revision=revision, local_files_only=True, cache_dir=_cache()).resolved
        listed = _listed(name, commit)
        if listed is None:
            folder = _cached(Repository(name, commit, {}))
            listed = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        return Repository(name, commit, listed)
    with _explained(uri):
        info = api.model_info(name, revision=revision, files_metadata=True)
        if info.gated:  # anyone may list such a repository; its files are for those who were let in
            api.auth_check(name)
        if info.sha != revision:
            api.resolve_revision(name, revision=revision, cache_dir=_cache())  # notes it for when there is no network
    assert info.sha is not None
    return Repository(name, info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()})


def _listed(name: str, commit: str) -> dict[str, int] | None:
    """The files of a commit as an earlier download has noted them; None where there was none."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(name, revision=commit, cache_dir=_cache())}
    except CachedRepoTreeNotFoundError:
        return None


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _snapshot(found: Repository) -> Path:
    return Path(_cache()) / f"models--{found.name.replace('/', '--')}" / "snapshots" / found.commit


def _cached(found: Repository) -> Path:
    folder = _snapshot(found)
    if not folder.is_dir():
        _refuse_offline(found, "its files")
    return folder


def _refuse_offline(found: Repository, missing: str) -> NoReturn:
    raise InputError(f"{found.uri}: HF_HUB_OFFLINE is set, and the cache lacks {missing}; {_how_to_fetch(found.name)}")


def _how_to_fetch(name: str) -> str:
    return (
        f"expected a network; or fetch it where there is one (hf download {name}), bring it into the cache here "
        f"({_cache()}; HF_HOME moves it) and set HF_HUB_OFFLINE=1"
    )


def _bytes_in(folder: Path) -> int:
    """Of a folder's files, on the disk: those that are being fetched may be given their whole length at once."""
    found = 0
    for path in folder.glob("*"):
        try:
            found += path.stat().st_blocks * 512
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """What the Hub's library raises, as one error that says what is needed."""
    import httpx2
    from huggingface_hub import errors, get_token

    name = str(_parse(uri)["name"])
    token = "the token that is set (HF_TOKEN) is of none who may" if get_token() else "no token is set (HF_TOKEN)"
    page = f"{_endpoint()}/{name}"
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{uri}: is gated, and {token}; expected HF_TOKEN of an account that was let in: ask at {page}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{uri}: the Hub knows no such model, or it is private and {token}; expected a name as in {page}, and for "
            "a private one HF_TOKEN of an account that may read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{uri}: the model has no such revision; expected a branch, tag or commit of {page}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(
                f"{uri}: the Hub refuses access ({status}): {token}; expected a valid HF_TOKEN, or none for a public "
                "model"
            ) from None
        raise InputError(f"{uri}: the Hub answers {status}: {str(error).splitlines()[0]}; try again later") from None
    except (errors.OfflineModeIsEnabled, errors.RevisionResolutionError, errors.LocalEntryNotFoundError) as error:
        raise InputError(
            f"{uri}: the cache does not have it: {str(error).splitlines()[0]}; {_how_to_fetch(name)}"
        ) from None
    except httpx2.TransportError as error:
        raise InputError(
            f"{uri}: the Hub ({_endpoint()}) cannot be reached: {error}; {_how_to_fetch(name)}, with which what the "
            "cache has is taken"
        ) from None
