"""`xllamacpp`, imported so that the threads of llama.cpp soon sleep while they wait for each other.

They wait some hundred times a token, in GNU's OpenMP, which by default spins there for milliseconds: beside other work
a thread that spins keeps the core that the one it waits for would need. After 1,000 rounds, as OpenMP itself has it
where threads outnumber cores, most waits of a quiet machine are over (`benchmarks/waiting.py`). OpenMP reads this once,
when it is loaded, which xllamacpp does unless something else in the process did before (torch); what the user has set
stays.
"""

from __future__ import annotations

import os

SPIN_COUNT, WAIT_POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"

_own = SPIN_COUNT not in os.environ and WAIT_POLICY not in os.environ
if _own:
    os.environ[SPIN_COUNT] = "1000"
import xllamacpp  # noqa: E402

if _own:
    del os.environ[SPIN_COUNT]  # it is of no concern to processes that this one starts

__all__ = ["xllamacpp"]
