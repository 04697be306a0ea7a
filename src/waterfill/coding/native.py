"""The native core if it was built and is wanted; else None, and numpy does the work."""

from __future__ import annotations

import ctypes
import functools
import gc
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


def required() -> ModuleType:
    """The extension module, where only it will do; RuntimeError if it is missing or not wanted."""
    module = core()
    if module is None:
        raise RuntimeError("this takes the native core, which is not built or not wanted")
    return module


def threads() -> int:
    """How many threads a kernel may use: WATERFILL_THREADS, or one per core that this process may use."""
    wanted = os.environ.get("WATERFILL_THREADS", "")
    return max(1, int(wanted)) if wanted.isdecimal() else _cores()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(
            os.sched_getaffinity(0)
        )  # fewer than the machine's under taskset, or in a container
    return os.cpu_count() or 1


def activations() -> str:
    """How packed products round activations: WATERFILL_ACTIVATIONS, or int8."""
    return os.environ.get("WATERFILL_ACTIVATIONS") or "int8"


def device() -> str:
    """Where encoding computes, in torch's words: WATERFILL_DEVICE, or the CPU (without torch)."""
    return os.environ.get("WATERFILL_DEVICE") or "cpu"


def return_freed_memory() -> None:
    """Hand freed memory back to the system now, and from now on as soon as a tensor is freed.

    glibc's threshold for mapping a block of its own grows with what was freed; tensors of many
    sizes then leave holes in the heap, and streaming a model peaked at half as much again.
    """
    libc = _glibc()
    if libc is not None:
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 1 << 20)
        libc.mallopt(trim_threshold, 1 << 24)
        gc.collect()
        libc.malloc_trim(0)


def trim_memory() -> None:
    """Hand what is free in the heap back to the system, once; nothing is changed for later."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None
