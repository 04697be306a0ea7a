"""What every coder's tests need."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def simd(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Forces an implementation by its name."""
    return lambda name: monkeypatch.setenv("WATERFILL_SIMD", name)
