"""Quantise a model with a peer: its own environment, its own process, its result kept."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.models import WORK

HERE = Path(__file__).parent
HOME = WORK / "peers"
TORCH = "torch==2.13.0"  # as constraints.txt has it: one wheel for all environments
PATIENCE = 1800  # seconds for one model
INSTALL_PATIENCE = 900  # and for what is built from its sources
# What to install, one line after another: hqq looks for torch while it is built.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "gguf": ("gguf>=0.17 safetensors>=0.5",),
    "hqq": (f"{TORCH} setuptools wheel numpy", "--no-build-isolation hqq>=0.2.8 transformers>=5"),
    "llmcompressor": (TORCH, "llmcompressor>=0.10"),
    "llama": ("llama-cpp-python>=0.3.16 gguf>=0.17",),
}


class Skipped(Exception):
    """A peer that cannot be had here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One way to quantise: a package and its options."""

    label: str
    package: str
    options: Mapping[str, str] = field(default_factory=dict)


PEERS = (
    Peer("gguf Q8_0", "gguf", {"type": "Q8_0"}),
    Peer("gguf Q4_0", "gguf", {"type": "Q4_0"}),
    Peer("gguf Q4_0, embedding Q8_0", "gguf", {"type": "Q4_0", "embedding": "Q8_0"}),
    Peer("GPTQ 4 bits g128 (llmcompressor)", "llmcompressor", {"bits": "4", "group": "128"}),
    Peer("GPTQ 3 bits g128 (llmcompressor)", "llmcompressor", {"bits": "3", "group": "128"}),
    Peer("hqq 4 bits g64", "hqq", {"bits": "4", "group": "64"}),
    Peer("hqq 3 bits g64", "hqq", {"bits": "3", "group": "64"}),
    Peer("hqq 2 bits g64", "hqq", {"bits": "2", "group": "64"}),
)


@dataclass(frozen=True)
class Made:
    """What a peer left.

    Attributes
    ----------
    folder : with ``plain/``, its decoded weights as a model that transformers loads
    nbytes : of its own weights file
    exact : matrices it leaves in 16 bits
    versions : of the packages at work
    """

    folder: Path
    nbytes: int
    exact: tuple[str, ...]
    versions: Mapping[str, str]


def made(peer: Peer, model: Path, tokens: NDArray[np.int64], new: bool = True) -> Made:
    """The peer's result for this model; Skipped where there is none.

    Parameters
    ----------
    tokens : int64 (windows, window), for peers that calibrate
    new : False to take only what was made before
    """
    folder = HOME / peer.package / _key(peer, model, tokens)
    if not (folder / "peer.json").exists():
        if not new:
            raise Skipped("not made yet; run without --quick")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        np.save(folder / "tokens.npy", tokens)
        script = HERE / f"with_{peer.package}.py"
        options = [f"{k}={v}" for k, v in peer.options.items()]
        # No resolve(): through its link, a venv's python would forget the venv.
        venv = environment(peer.package)
        if isinstance(venv, Skipped):
            raise venv
        python = Path.cwd() / venv / "bin" / "python"
        work = [model.resolve(), folder.resolve(), (folder / "tokens.npy").resolve()]
        _run([python, script, *work, *options])
    stored = json.loads((folder / "peer.json").read_text())
    return Made(folder, stored["nbytes"], tuple(stored["exact"]), stored["versions"])


@functools.cache
def environment(package: str, new: bool = True) -> Path | Skipped:
    """The virtual environment of a package, installed at first need; or why not, asked once a run.

    `new` is False to take only what was installed before.
    """
    venv = HOME / package / "venv"
    lines = NEEDS[package]
    ready = venv / "ready.json"
    if ready.exists() and json.loads(ready.read_text()) == list(lines):
        return venv
    if not new:
        return Skipped(f"{package} is not installed yet; run without --quick")
    try:
        _run([sys.executable, "-m", "venv", "--clear", venv])
        constraint = venv / "constraints.txt"
        constraint.write_text(TORCH)
        pip: list[str | Path] = [
            venv / "bin/python",
            "-m",
            "pip",
            "install",
            "-q",
            "-c",
            constraint,
        ]
        for line in lines:
            _run([*pip, *line.split()], INSTALL_PATIENCE)
    except Skipped as why:
        return Skipped(f"{package} could not be installed: {why}")
    ready.write_text(json.dumps(lines))
    return venv


def _key(peer: Peer, model: Path, tokens: NDArray[np.int64]) -> str:
    """Name of a result, with a digest of all that it depends on."""
    digest = hashlib.sha256(json.dumps([peer.options, NEEDS[peer.package]]).encode())
    digest.update(tokens.tobytes())
    files = [HERE / "common.py", HERE / f"with_{peer.package}.py", *model.glob("*.safetensors")]
    for path in files:
        digest.update(path.read_bytes())
    return f"{model.name}-{'-'.join(peer.options.values())}-{digest.hexdigest()[:8]}"


def _run(command: list[str | Path], patience: int = PATIENCE) -> None:
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=patience,
            env={**os.environ, **quiet},
        )
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"took more than {patience} seconds") from error
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.strip()]
        raise Skipped(said[-1].strip()[:160] if said else "failed without a word") from error
