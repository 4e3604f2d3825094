"""What glibc's malloc does with blocks that are given back."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
MAPPED_BYTES, HIGHEST_BYTES = 1 << 20, 32 << 20  # the latter is what malloc comes to by itself


@contextmanager
def mapped_blocks() -> Iterator[None]:
    """Within it, every block from 1 MiB on is mapped by itself, and the machine has it back when it is freed.

    Else malloc keeps what lies between blocks that stay, and puts no aligned block, as torch's are, into a hole of just
    its size: of a model whose whole weights lie between their parts for a moment, all holes are kept. In training steps
    mapping would cost a third more CPU time.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, MAPPED_BYTES)
    try:
        yield
    finally:
        libc.mallopt(MMAP_THRESHOLD, HIGHEST_BYTES)
