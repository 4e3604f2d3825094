"""llama.cpp's threads sleep while they wait for each other, unless the user has asked for another policy."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

IMPORT = "import os, overproof.engines.llamacpp_library; print(os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize(("given", "left", "spins"), [(None, "None", False), ("active", "active", True)])
def test_the_threads_of_llamacpp_sleep_in_a_wait(given: str | None, left: str, spins: bool) -> None:
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    own |= {"OMP_DISPLAY_ENV": "verbose"} | ({"OMP_WAIT_POLICY": given} if given else {})
    done = subprocess.run([sys.executable, "-c", IMPORT], env=own, capture_output=True, text=True, check=True)
    counted = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)  # as OpenMP itself says when it is loaded
    assert counted, done.stderr[-2000:]
    assert (int(counted[1]) > 0) == spins
    assert done.stdout.strip() == left
