"""Memory of decoded pictures is used again instead of being given back to the system after each."""

from __future__ import annotations

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
KEPT_BYTES = 512 * 1024 * 1024
OLD_MOST_BYTES = 32 * 1024 * 1024  # what older versions take


@cache
def keep_freed_memory() -> None:
    """Let this process keep up to half a gigabyte of freed memory.

    By default each block over a few hundred kB is mapped afresh, and the system clears its pages one by one: thousands
    of page faults a picture, which threads take in turns. Elsewhere than on glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) or mallopt(M_MMAP_THRESHOLD, OLD_MOST_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
