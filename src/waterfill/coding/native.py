"""The native core if it was built and is wanted; else None, and numpy does the work."""

from __future__ import annotations

import os
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
