"""What a model and its process take in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def weights_nbytes(model: Any) -> int:
    """Bytes of all parameters and buffers of a torch module, memory shared by several counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_nbytes() -> int:
    """The most memory that this process has had resident, in bytes; 0 where the system tells none."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return 1024 * int(lines.get("VmHWM", "0 kB").split()[0])
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
