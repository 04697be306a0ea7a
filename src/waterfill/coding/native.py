"""The native core if it was built and is wanted; else None, and numpy does the work."""

from __future__ import annotations

import ctypes
import os
import sys
from types import ModuleType

try:
    from waterfill import _core
except ImportError:  # a source tree without the extension: every decoder has its numpy twin
    _core = None


def core() -> ModuleType | None:
    """The extension module, or None where WATERFILL_SIMD=numpy or it was not built."""
    return None if os.environ.get("WATERFILL_SIMD") == "numpy" else _core


def threads() -> int:
    """How many threads a kernel may use: WATERFILL_THREADS, or one per core."""
    wanted = os.environ.get("WATERFILL_THREADS", "")
    return max(1, int(wanted)) if wanted.isdigit() else os.cpu_count() or 1


def return_freed_memory() -> None:
    """Ask glibc to map large blocks one by one, so that a freed tensor leaves the process at once.

    By default its threshold grows with what was freed, and tensors of many sizes then leave holes
    in the heap: streaming a model peaked at half as much again.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(mmap_threshold, 1 << 20)
            libc.mallopt(trim_threshold, 1 << 24)
