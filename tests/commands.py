"""Commands of the command line, run in this process or in one of their own, and what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Run:
    """One command: its status and what it wrote."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        def no_constants(name: str) -> Any:
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=no_constants)


Shell = Callable[..., Run]


def run_here(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Run:
    """Run a command in this process."""
    from waterfill.cli import main

    capsys.readouterr()
    try:
        status = main([str(w) for w in words])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return Run(status, out, err)


def shell(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "waterfill", *map(str, words)],
        capture_output=True, text=True, timeout=100, env=environment, check=False, **options,
    )  # fmt: skip


def refused(done: Run | subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 1 and one clear line with these words in it."""
    status = done.status if isinstance(done, Run) else done.returncode
    out, err = (done.out, done.err) if isinstance(done, Run) else (done.stdout, done.stderr)
    assert status == 1, err
    assert out == ""
    assert err.startswith("waterfill: ") and err.count("\n") == 1 and len(err) < 900, err
    assert "unexpected" not in err and "Error" not in err and "Traceback" not in err, err
    for word in words:
        assert word in err, err


def usage(done: Run, *words: str) -> None:
    """Exit 2, the usage, and one line with these words in it."""
    assert done.status == 2 and done.out == ""
    assert done.err.startswith("usage: waterfill")
    last = done.err.strip().splitlines()[-1]
    assert "error: " in last and all(word in last for word in words), last
