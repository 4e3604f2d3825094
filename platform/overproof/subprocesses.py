"""Modules of overproof in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

POLL_S = 1.0


def run_module(
    module: str,
    *arguments: object,
    timeout_s: float | None = None,
    poll: Callable[[], None] = lambda: None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE ARGUMENTS``, with what this process imports from, and what it printed.

    ``poll`` is called about once a second meanwhile.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was killed.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    inherited = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    with subprocess.Popen(command, env=inherited, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while True:
                try:
                    printed, complained = process.communicate(timeout=POLL_S)
                    return subprocess.CompletedProcess(command, process.returncode, printed, complained)
                except subprocess.TimeoutExpired:
                    if deadline_s is not None and time.monotonic() > deadline_s:
                        raise
                    poll()
        finally:
            process.kill()
