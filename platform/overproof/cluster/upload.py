"""How many bytes ``ray job submit --working-dir .`` would send, counted as Ray packs them.

Ray packs every file that .gitignore, .rayignore and its own list do not leave out into a ZIP without compression, and
the cluster's dashboard turns away a body of 100 MiB. Its matcher of ignore patterns is used here without importing
Ray, which takes seconds; a test holds the count against the file that Ray packs.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

LIMIT_BYTES = 100 << 20  # ray_constants.DASHBOARD_CLIENT_MAX_SIZE
MOST_FILES = 20_000  # a folder that holds more is no working directory
DEFAULT_EXCLUDES = ".git,.venv,venv,__pycache__"
MATCHER = "_overproof_pathspec"
ZIP_END_BYTES, ZIP_ENTRY_BYTES = 22, 30 + 46  # and its name, twice

Excludes = Callable[[Path], bool]


@dataclass(frozen=True)
class UploadSize:
    """What a working directory weighs as a package."""

    size_bytes: int
    files: int
    largest: tuple[tuple[str, int], ...]  # entries at the top, largest first, with their bytes
    whole: bool  # False: the count stopped at MOST_FILES

    @property
    def fits(self) -> bool:
        return self.whole and self.size_bytes < LIMIT_BYTES


def measure_upload(folder: Path) -> UploadSize:
    """Walk a folder as Ray does."""
    folder = folder.absolute()
    excluded = os.environ.get("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", DEFAULT_EXCLUDES).split(",")
    patterns = [name.strip() for name in excluded if name.strip()]
    found: Counter[str] = Counter()
    files, names = 0, [".rayignore"]
    if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1":
        names.insert(0, ".gitignore")

    def walk(path: Path, excludes: tuple[Excludes, ...]) -> None:
        nonlocal files
        if path.is_dir():
            ignored = (path / name for name in names)
            more = (_matcher(path, file.read_text().splitlines()) for file in ignored if file.is_file())
            excludes = (*excludes, *more)
        if files >= MOST_FILES or any(exclude(path) for exclude in excludes):
            return
        inside = sorted(path.iterdir()) if path.is_dir() else []
        if path.is_file() or (path.is_dir() and not inside):
            name = path.relative_to(folder)
            size = path.stat().st_size if path.is_file() else 0
            length = len(str(name).encode()) + path.is_dir()
            found[name.parts[0] if name.parts else "."] += size + ZIP_ENTRY_BYTES + 2 * length
            files += 1
        for each in inside:
            walk(each, excludes)

    walk(folder, (_matcher(folder, patterns),))
    largest = tuple(found.most_common(3))
    return UploadSize(sum(found.values()) + ZIP_END_BYTES, files, largest, files < MOST_FILES)


def _matcher(root: Path, patterns: list[str]) -> Excludes:
    spec = _pathspec().PathSpec.from_lines("gitwildmatch", patterns)
    return lambda path: bool(spec.match_file(str(path.relative_to(root))))


def _pathspec() -> ModuleType:
    """Ray's own copy of the library, by its place: importing it by name would import Ray."""
    if MATCHER in sys.modules:
        return sys.modules[MATCHER]
    ray = find_spec("ray")
    assert ray
    assert ray.origin
    place = Path(ray.origin).parent / "_private/thirdparty/pathspec"
    spec = spec_from_file_location(MATCHER, place / "__init__.py", submodule_search_locations=[str(place)])
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[MATCHER] = module
    spec.loader.exec_module(module)
    return module
