"""llama.cpp's threads soon sleep while they wait for each other, unless the user has asked for something else."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

IMPORT = (
    "import os, overproof.engines.llamacpp_library; "
    "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
)


@pytest.mark.parametrize(
    ("given", "left", "fewest", "most"),
    [(None, "None None", 1000, 1000), ("active", "active None", 10**6, 10**12), ("passive", "passive None", 0, 0)],
)
def test_the_threads_of_llamacpp_soon_sleep_in_a_wait(given: str | None, left: str, fewest: int, most: int) -> None:
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    own |= {"OMP_DISPLAY_ENV": "verbose"} | ({"OMP_WAIT_POLICY": given} if given else {})
    done = subprocess.run([sys.executable, "-c", IMPORT], env=own, capture_output=True, text=True, check=True)
    counted = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)  # as OpenMP itself says when it is loaded
    assert counted, done.stderr[-2000:]
    assert fewest <= int(counted[1]) <= most
    assert done.stdout.strip() == left
