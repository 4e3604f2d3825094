"""What this machine, or the container that this process is in, has: CPUs, memory and GPUs.

A container's quota is in its cgroup, of either version, and in those above it; what the kernel tells of CPUs and memory
besides is the host's (https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
CPU, MEMORY = "cpu", "memory"  # controllers
WSL_NVIDIA_SMI = "usr/lib/wsl/lib/nvidia-smi"  # Windows' driver, which makes no /dev/nvidia*
NVIDIA_SMI_TIMEOUT_S = 10


def available_cpus(root: Path = ROOT) -> int:
    """Whole CPUs that this process may use; at least one."""
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _cgroups(CPU, root):
        quota, period = _numbers(folder / "cpu.max") or (
            *_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us"), 0, 0,
        )[:2]  # fmt: skip
        if quota > 0 and period > 0:
            cpus = min(cpus, quota / period)
    return max(1, int(cpus))


def memory_bytes(root: Path = ROOT) -> int:
    """Memory that the processes here may take together."""
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for folder in _cgroups(MEMORY, root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += [limit for limit in _numbers(folder / name) if limit > 0]
    return min(limits)


def gpus(root: Path = ROOT) -> int:
    """NVIDIA GPUs here. Under WSL2 they have no device files of their own: there the driver's tool lists them."""
    devices = len(list((root / "dev").glob("nvidia[0-9]*")))
    tool = root / WSL_NVIDIA_SMI
    if devices or not (root / "dev/dxg").exists() or not tool.exists():
        return devices
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's cgroup and those above it, of either version. In a container the path may be the
    host's, and only the last of them there.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        mounts = ["sys/fs/cgroup"] if number == "0" else [f"sys/fs/cgroup/{name}" for name in (controllers, controller)]
        if number == "0" or controller in controllers.split(","):
            mount = next((root / each for each in mounts if (root / each).is_dir()), None)
            below = Path(path.lstrip("/"))
            if mount is not None:
                yield from (mount / each for each in (below, *below.parents))


def _numbers(file: Path) -> tuple[int, ...]:
    """The numbers in a file of a cgroup; "max" and a file that is not there are none."""
    try:
        return tuple(int(word) for word in file.read_text().split())
    except (OSError, ValueError):
        return ()
