"""`xllamacpp`, imported so that the threads of llama.cpp sleep while they wait for each other.

They wait some hundred times a token, in GNU's OpenMP, which by default spins there for milliseconds. On a quiet machine
that gains little; beside other work a thread that spins keeps the core that the one it waits for would need
(`benchmarks/waiting.py`). OpenMP reads OMP_WAIT_POLICY once, when it is loaded, which xllamacpp does unless something
else in the process did before (torch); a policy of the user's own stays.
"""

from __future__ import annotations

import os

WAIT_POLICY = "OMP_WAIT_POLICY"

_given = WAIT_POLICY in os.environ
os.environ.setdefault(WAIT_POLICY, "passive")
import xllamacpp  # noqa: E402

if not _given:
    del os.environ[WAIT_POLICY]  # it is of no concern to processes that this one starts

__all__ = ["xllamacpp"]
