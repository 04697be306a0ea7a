"""Disks that are full, as tests need them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest


class Full:
    """A disk that is full from the start, for files whose path contains a word."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
        self.word, self.hits = word, 0
        true_open = Path.open

        def opening(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if self.word in str(path) and set(mode) & set("wax+"):
                self.hits += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return true_open(path, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", opening)
