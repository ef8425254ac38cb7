"""Asks the C library's allocator to keep what is freed."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process from now on; return whether the C library (glibc) can.

    By default it returns large blocks to the system, now and then depending on their history, and whoever allocates
    next pays for fresh pages: up to a fifth of a layer's time, for one contender and not for another.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
