"""The locked requirements are those of pyproject.toml, each with its hashes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PINNED = re.compile(r"([a-z0-9-]+)==(\S+)(?: ; (.*))?")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def test_the_lock_holds_what_is_asked_for_and_nothing_without_its_hashes() -> None:
    text = re.sub(r"^#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    locked, hashes = dict[str, str](), 1
    for entry in text.replace(" \\\n", "\n").strip().split("\n"):
        if entry.startswith(" "):
            assert HASH.fullmatch(entry.strip()), entry
            hashes += 1
            continue
        assert hashes, f"no hash of what stands before {entry}"
        found = PINNED.fullmatch(entry)
        assert found is not None, entry  # no file, no URL, no option
        hashes = 0
        if found[3] is None or Marker(found[3]).evaluate():
            locked[found[1]] = found[2]
    assert hashes
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        asked = Requirement(line)
        version = locked.get(canonicalize_name(asked.name))
        assert version is not None, f"{line}: make requirements.lock anew, as its first lines say"
        assert asked.specifier.contains(version), f"{line}: locked at {version}; make requirements.lock anew"
