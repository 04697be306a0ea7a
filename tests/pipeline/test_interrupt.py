"""Whatever stops a run, OUT is whole or not there, and the next run ends as if nothing had been."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import waterfill
from tests.pipeline import small
from waterfill import container
from waterfill.types import WaterfillError

ARGUMENTS = {"bits": 5.0, "tokens": small.TOKENS}


def compress(out: Path, **options: Any) -> None:
    waterfill.compress(small.model(), out, calibration=[small.text()], **{**ARGUMENTS, **options})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    compress(out)
    return out


class Stop:
    """Interrupts at the n-th step of a stage; calibration's stages are named after blocks."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step, self.seen = stage, step, 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        ours = stage if stage in ("pricing", "encoding") else "calibration"
        self.seen += ours == self.stage
        if ours == self.stage and self.seen == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stage", "step"), [("calibration", 1), ("pricing", 4), ("encoding", 1), ("encoding", 9)]
)
def test_interrupted_and_run_again(
    stage: str, step: int, tmp_path: Path, undisturbed: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(out, progress=Stop(stage, step))
    assert [p.name for p in tmp_path.iterdir()] == ["out.work"]
    compress(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    small.same_files(out, undisturbed)


def test_killed_without_a_word(tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "waterfill", "compress", str(small.model()), "-o", str(out), "--bits", "5",
        "--calibrate", str(small.text()), "--tokens", str(small.TOKENS),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("out.work/statistics/prices-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    compress(out)
    small.same_files(out, undisturbed)


def test_disk_full_at_the_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    monkeypatch.setattr(container.os, "fsync", full)
    with pytest.raises(WaterfillError, match="disk is full"):
        compress(out)
    monkeypatch.undo()
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    compress(out)
    small.same_files(out, undisturbed)


def test_no_room_for_any_large_file(tmp_path: Path) -> None:
    """The operating system refuses for real: files of this process may not exceed 2000 bytes."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from waterfill.cli import main\n"
        "import torch, transformers\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (2000, {resource.RLIM_INFINITY}))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        code,
        "compress",
        str(small.model()),
        "-o",
        str(out),
        "--bits",
        "5",
    ]
    result = subprocess.run(
        [*command, "--calibrate", str(small.statistics())], capture_output=True, text=True
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("waterfill: cannot write")
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_a_failing_run_with_force_leaves_the_old_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(out)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(WaterfillError, match="--force"):
        compress(out, bits=4.5)
    with pytest.raises(KeyboardInterrupt):
        compress(out, bits=4.5, force=True, progress=Stop("encoding", 5))
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    compress(out, bits=4.5, force=True)
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]
