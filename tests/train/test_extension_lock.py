"""A lock that a killed process left before an extension is named, and no lock is taken away."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from overproof.errors import InputError
from overproof.train.deepspeed_engine import CPU_ADAM
from overproof.train.extension_lock import STALE_S, require_no_stale_lock


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch locks the extension, in a cache of the test's own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / CPU_ADAM).mkdir()
    return tmp_path / CPU_ADAM / "lock"


def age(lock: Path, age_s: float) -> None:
    lock.touch()
    os.utime(lock, (time.time() - age_s,) * 2)


def test_no_lock_and_a_young_one_are_none_of_our_business(lock: Path) -> None:
    require_no_stale_lock(CPU_ADAM)
    age(lock, STALE_S / 2)
    require_no_stale_lock(CPU_ADAM)
    assert lock.exists()


def test_an_old_lock_is_named_unless_a_process_holds_it(lock: Path) -> None:
    age(lock, 3 * STALE_S)
    with lock.open():  # as torch does while it compiles
        require_no_stale_lock(CPU_ADAM)
    with pytest.raises(InputError, match=rf"^{lock}: a lock of 30 minutes ago, .*: remove the file, unless"):
        require_no_stale_lock(CPU_ADAM)
    assert lock.exists()
