"""Modules of overproof in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys


def run_module(
    module: str, *arguments: object, timeout_s: float | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE ARGUMENTS``, with what this process imports from, and what it printed.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
