"""A lock that a killed process left before an extension is named, and no lock is taken away."""

from __future__ import annotations

import os
import subprocess
import sys
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


TRAIN = """
import sys, torch.distributed as dist
from overproof.data.manifest import Manifest
from overproof.models.hf_directory import build_model
from overproof.train.deepspeed_engine import DeepSpeedEngine
from tiny_data import VIT, settings
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
shape = {"channels": 1, "height": 8, "width": 8, "classes": ["a", "b"]}
manifest = Manifest(task="image_classification", columns=(), splits={}, rows_per_group=8, positions=1, outputs=2,
                    details=shape)
DeepSpeedEngine(build_model(VIT, manifest, 0), settings(workers=1, zero_stage=2, offload="optimizer"))
"""


def test_training_ends_with_the_lock_before_it_compiles(lock: Path, tmp_path: Path) -> None:
    """It waited for ever, and said nothing."""
    age(lock, 3 * STALE_S)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"overproof.errors.InputError: {lock}: a lock of 30 minutes ago" in done.stderr
    assert lock.exists()
