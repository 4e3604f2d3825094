"""The lock under which torch compiles an extension: where the process was killed that left it, torch waits for ever.

torch makes the file, holds it open while it compiles, and takes it away; who finds it there waits, and says nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

from overproof.errors import InputError

STALE_S = 600.0  # the longest compilation takes a minute or two


def require_no_stale_lock(extension: str) -> None:
    """Look at the lock of an extension before it is compiled or loaded. Nobody's lock is taken away.

    Raises:
        InputError: it is older than ``STALE_S``, and no process of this machine that can be looked at holds it open.
    """
    lock = Path(_get_build_directory(extension, False)) / "lock"
    try:
        found = lock.stat()
    except FileNotFoundError:
        return
    age_s = time.time() - found.st_mtime
    if age_s > STALE_S and not _is_held(found):
        raise InputError(
            f"{lock}: a lock of {age_s / 60:.0f} minutes ago, which no process here holds; expected none: whoever "
            f"compiled {extension} there was killed, and torch would wait for it for ever: remove the file, unless "
            "another machine compiles in that folder now"
        )


def _is_held(lock: os.stat_result) -> bool:
    """Whether a process has the file open; never where there is no /proc, as on macOS."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = descriptor.stat()
        except OSError:  # closed meanwhile, or another user's
            continue
        if (found.st_dev, found.st_ino) == (lock.st_dev, lock.st_ino):
            return True
    return False
