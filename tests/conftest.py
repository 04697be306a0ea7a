"""What tests of many rooms use."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import pytest

from tests import commands


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models run fastest on one: two on two shared cores wait for each other."""
    torch = sys.modules.get("torch")  # tests that do without it must not load it for this
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> commands.Shell:
    """Run a command in this process."""
    return functools.partial(commands.run_here, capsys)
