"""How many bytes ``ray job submit --working-dir .`` would send, counted as Ray packs them.

Ray packs every file that .gitignore, .rayignore and its own list do not leave out into a ZIP without compression, and
the cluster's dashboard turns away a body of 100 MiB. Ray itself, which takes seconds to import, is not asked; a test
holds the count against the file that Ray packs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

LIMIT_BYTES = 100 << 20  # ray_constants.DASHBOARD_CLIENT_MAX_SIZE
MOST_FILES = 20_000  # a folder that holds more is no working directory
DEFAULT_EXCLUDES = ".git,.venv,venv,__pycache__"
ZIP_END_BYTES, ZIP_ENTRY_BYTES = 22, 30 + 46  # and its name, twice

IsExcluded = Callable[[Path], bool]


@dataclass(frozen=True)
class UploadSize:
    """What a working directory weighs as a package."""

    size_bytes: int
    files: int
    largest: tuple[tuple[str, int], ...]  # entries at the top, largest first, with their bytes
    complete: bool  # False: the count stopped at MOST_FILES

    @property
    def fits(self) -> bool:
        return self.complete and self.size_bytes < LIMIT_BYTES


def measure_upload(folder: Path) -> UploadSize:
    """Walk a folder as Ray does."""
    folder = folder.absolute()
    excluded = os.environ.get("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", DEFAULT_EXCLUDES).split(",")
    top = _matcher(folder, [name.strip() for name in excluded if name.strip()])
    ignore_files = [".gitignore", ".rayignore"]
    if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") == "1":
        ignore_files.remove(".gitignore")
    size_bytes: Counter[str] = Counter()  # by entry at the top
    files = 0

    def walk(path: Path, excludes: tuple[IsExcluded, ...]) -> None:
        nonlocal files
        if path.is_dir():
            found = (path / name for name in ignore_files)
            excludes += tuple(_matcher(path, file.read_text().splitlines()) for file in found if file.is_file())
        if files >= MOST_FILES or any(is_excluded(path) for is_excluded in excludes):
            return
        inside = sorted(path.iterdir()) if path.is_dir() else []
        if path.is_file() or (path.is_dir() and not inside):
            name = path.relative_to(folder)
            content_bytes = path.stat().st_size if path.is_file() else 0
            name_bytes = len(str(name).encode()) + path.is_dir()
            size_bytes[name.parts[0] if name.parts else "."] += content_bytes + ZIP_ENTRY_BYTES + 2 * name_bytes
            files += 1
        for each in inside:
            walk(each, excludes)

    walk(folder, (top,))
    return UploadSize(size_bytes.total() + ZIP_END_BYTES, files, tuple(size_bytes.most_common(3)), files < MOST_FILES)


def _matcher(root: Path, patterns: Iterable[str]) -> IsExcluded:
    from pathspec import PathSpec

    spec = PathSpec.from_lines("gitignore", patterns)
    return lambda path: spec.match_file(str(path.relative_to(root)))
