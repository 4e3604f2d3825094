"""What a container may use of its host, by cgroups of both versions, and GPUs under WSL2."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from overproof.cluster.machine import available_cpus, gpus, memory_bytes

HOST_CPUS, HOST_BYTES = len(os.sched_getaffinity(0)), psutil.virtual_memory().total
GIB = 1 << 30


def made(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "cpus", "bytes_"),
    [
        ({}, HOST_CPUS, HOST_BYTES),
        (  # version 2, in a container of its own
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/cpu.max": "100000 100000\n",
                "sys/fs/cgroup/memory.max": f"{GIB}\n",
            },
            1, GIB,
        ),
        (  # the path is the host's, which is not there
            {
                "proc/self/cgroup": "0::/kubepods/pod1/x\n",
                "sys/fs/cgroup/cpu.max": "50000 100000",
                "sys/fs/cgroup/memory.max": "max",
            },
            1, HOST_BYTES,
        ),
        (  # a service on a host: what is above it counts, too
            {
                "proc/self/cgroup": "0::/system.slice/a.service\n",
                "sys/fs/cgroup/system.slice/memory.max": f"{GIB}",
                "sys/fs/cgroup/system.slice/a.service/memory.max": f"{2 * GIB}",
                "sys/fs/cgroup/system.slice/a.service/cpu.max": "max 100000",
            },
            HOST_CPUS, GIB,
        ),
        (  # version 1
            {
                "proc/self/cgroup": "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n1:name=systemd:/docker/1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            },
            1, GIB,
        ),
        (  # version 1 without limits
            {
                "proc/self/cgroup": "5:memory:/\n4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            },
            HOST_CPUS, HOST_BYTES,
        ),
    ],
)  # fmt: skip
def test_a_quota_is_what_there_is(tmp_path: Path, files: dict[str, str], cpus: int, bytes_: int) -> None:
    root = made(tmp_path, files)
    assert (available_cpus(root), memory_bytes(root)) == (min(cpus, HOST_CPUS), min(bytes_, HOST_BYTES))


def test_gpus_have_device_files_or_under_wsl_a_tool_that_lists_them(tmp_path: Path) -> None:
    assert gpus(tmp_path) == 0
    wsl = made(
        tmp_path / "wsl", {"dev/dxg": "", "usr/lib/wsl/lib/nvidia-smi": "#!/bin/sh\necho 'GPU 0: A (UUID: x)'\n"}
    )
    assert gpus(wsl) == 0  # it cannot be run
    (wsl / "usr/lib/wsl/lib/nvidia-smi").chmod(0o755)
    assert gpus(wsl) == 1
    linux = made(tmp_path / "linux", {"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": "", "dev/nvidia-uvm": ""})
    assert gpus(linux) == 2
