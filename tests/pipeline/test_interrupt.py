"""Interrupts, kills, full disks and existing folders: never a partial OUT, never a lost one."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import waterfill  # noqa: E402
from tests.pipeline import small  # noqa: E402
from tests.pipeline.disks import Full  # noqa: E402
from waterfill.cli import main  # noqa: E402
from waterfill.pipeline import calibrate_to  # noqa: E402
from waterfill.runtime import artifact  # noqa: E402
from waterfill.types import WaterfillError  # noqa: E402

STAGES = ("calibration", "pricing", "encoding", "measuring")
CODEC = {"*": "integer", small.BIG: "trellis"}


def compress(out: Path, **options: Any) -> Any:
    options = {"bits": 5, "tokens": small.TOKENS, "codec": CODEC, **options}
    return waterfill.compress(small.model(), out, calibration=[small.text()], **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(out)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    return out


class Broken(Exception):
    """Something that nobody foresaw."""


def raising(stage: str, at: int, error: BaseException) -> Callable[[str, int, int], None]:
    """A progress callback that raises at one step of one stage."""

    def progress(name: str, done: int, total: int) -> None:
        here = name if name in STAGES else "calibration"
        if here == stage and done >= min(at, total):
            raise error

    return progress


@pytest.mark.parametrize("at", [1, 7])
@pytest.mark.parametrize("stage", STAGES)
def test_interrupt_and_go_on(stage: str, at: int, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "out", progress=raising(stage, at, KeyboardInterrupt()))
    assert [p.name for p in tmp_path.iterdir()] == ["out.work"]
    steps: list[tuple[str, int]] = []
    compress(tmp_path / "out", progress=lambda name, done, total: steps.append((name, done)))
    small.same_files(tmp_path / "out", whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    if stage != "calibration":
        assert {name for name, _ in steps} == {
            "pricing",
            "encoding",
            "measuring",
        }  # not calibrated again


def test_other_rules_after_an_interrupt(whole: Path, tmp_path: Path) -> None:
    progress = raising("encoding", 7, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "out", progress=progress, keep=["*norm*", "*v_proj*"])
    compress(tmp_path / "out")
    small.same_files(tmp_path / "out", whole)


def test_damaged_leftovers_are_made_again(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "out", progress=raising("encoding", 7, KeyboardInterrupt()))
    pieces = sorted((tmp_path / "out.work" / "pieces").iterdir())
    assert len(pieces) >= 6
    pieces[0].write_bytes(pieces[0].read_bytes()[:-3])
    pieces[1].write_bytes(b"")
    data = bytearray(pieces[2].read_bytes())
    data[-1] ^= 4
    pieces[2].write_bytes(data)
    (prices,) = (tmp_path / "out.work" / "statistics").glob("prices-*")
    prices.write_bytes(prices.read_bytes()[:-40])
    compress(tmp_path / "out")
    small.same_files(tmp_path / "out", whole)


def test_calibrate_goes_on(tmp_path: Path) -> None:
    def calibrate(**options: Any) -> None:
        calibrate_to(small.model(), tmp_path / "stats", [small.text()], tokens=256, **options)

    with pytest.raises(KeyboardInterrupt):
        calibrate(progress=raising("calibration", 2, KeyboardInterrupt()))
    assert [p.name for p in tmp_path.iterdir()] == ["stats.work"]
    calibrate()
    assert [p.name for p in tmp_path.iterdir()] == ["stats"]
    for file in (tmp_path / "stats").rglob("*.safetensors"):
        name = file.relative_to(tmp_path / "stats")
        assert file.read_bytes() == (small.statistics() / name).read_bytes()
    with pytest.raises(WaterfillError, match="--force"):
        calibrate()


def command(out: Path, *more: str) -> list[str]:
    rules = [part for glob, spec in CODEC.items() for part in ("--codec", f"{glob}={spec}")]
    return [
        sys.executable, "-m", "waterfill", "compress", str(small.model()), "-o", str(out), "--bits", "5",
        "--calibrate", str(small.text()), "--tokens", str(small.TOKENS), *rules, *more,
    ]  # fmt: skip


def start(out: Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_stopped(number: signal.Signals, whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.work/statistics/prices-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 1)
    assert not (tmp_path / "out").exists() and stdout == ""
    if number == signal.SIGINT:
        assert stderr.count("\n") == 1 and "run the same command again" in stderr
        assert not (tmp_path / "out.partial").exists()
    compress(tmp_path / "out")
    small.same_files(tmp_path / "out", whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Full disks


@pytest.mark.parametrize("word", ["statistics", "prices-", "pieces", "out.partial", "README.md"])
def test_disk_full(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.model(), small.text()
    with monkeypatch.context() as patch:
        full = Full(patch, word)
        with pytest.raises(WaterfillError, match="disk is full") as caught:
            compress(tmp_path / "out")
        assert full.hits and "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"out.work"}


def test_no_room_for_a_file(tmp_path: Path) -> None:
    """The system itself refuses: RLIMIT_FSIZE, as a quota would."""
    small.model(), small.text()
    process = start(
        tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
    )
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 1 and stdout == ""
    assert stderr.count("\n") == 1 and "File too large" in stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_disk_full_at_the_last_byte(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WaterfillError, match="disk is full"):
            compress(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out.work"]
    compress(tmp_path / "out")
    small.same_files(tmp_path / "out", whole)


def test_disk_full_while_decompressing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.artifact()
    Full(monkeypatch, "plain.partial")
    with pytest.raises(WaterfillError, match="disk is full"):
        waterfill.decompress(small.artifact(), tmp_path / "plain")
    assert not list(tmp_path.iterdir())


# OUT that is there already


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_existing_out_is_refused(whole: Path) -> None:
    before = snapshot(whole)
    with pytest.raises(WaterfillError, match="--force"):
        compress(whole)
    with pytest.raises(WaterfillError, match="--force"):
        waterfill.decompress(small.artifact(), whole)
    assert snapshot(whole) == before


@pytest.mark.parametrize(
    ("stage", "error"),
    [("calibration", Broken), ("pricing", KeyboardInterrupt), ("encoding", Broken)],
)
def test_force_replaces_only_on_success(
    stage: str, error: type[BaseException], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "mine.txt").write_text("a note")
    before = snapshot(out)
    with pytest.raises(error):
        compress(out, bits=6, force=True, progress=raising(stage, 3, error("stop")))
    assert snapshot(out) == before
    record = compress(out, bits=6, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (out / "mine.txt").exists()
    assert (out / "model.safetensors").stat().st_size == record.nbytes


def test_a_budget_that_fails_leaves_the_old_out(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    assert main([*command(tmp_path / "out", "--force")[3:], "--bits", "0.1"]) == 1
    assert snapshot(tmp_path / "out") == snapshot(whole)


def test_killed_between_two_renamings(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out.old")
    with pytest.raises(WaterfillError, match="--force"):  # it is back, and guarded as ever
        compress(tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(whole)


def test_a_renaming_that_fails_puts_the_old_back(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    true_replace = Path.replace

    def replacing(path: Path, target: Path) -> Path:
        if path.name == "out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return true_replace(path, target)

    monkeypatch.setattr(Path, "replace", replacing)
    with pytest.raises(WaterfillError), artifact.new_folder(tmp_path / "out", True):
        pass
    assert snapshot(tmp_path / "out") == snapshot(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", [".", "..", "model", "parent", "stranger", "file/out"])
def test_force_never_deletes_what_is_in_use(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "parent" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    shutil.copytree(small.model(), tmp_path / "parent" / "model")
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    out = {
        "model": tmp_path / "parent" / "model",
        "parent": tmp_path / "parent",
        "stranger": tmp_path / "stranger",
        "file/out": tmp_path / "file" / "out",
    }.get(place, Path(place))
    before = snapshot(tmp_path)
    with pytest.raises(WaterfillError):
        waterfill.compress(
            tmp_path / "parent" / "model", out, bits=5, calibration=small.statistics(), force=True
        )
    assert snapshot(tmp_path) == before
