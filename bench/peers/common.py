"""What every peer's script does alike: read its job, leave its result.

These scripts run in environments of their own, where waterfill is not installed::

    python bench/peers/with_NAME.py MODEL OUT TOKENS.npy KEY=VALUE...

MODEL is a folder in Hugging Face layout, TOKENS int64 (windows, window). In OUT they leave the
peer's own file, ``plain/`` that transformers loads, and ``peer.json`` that says what was done.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBERS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Job:
    """One model to quantise."""

    model: Path
    out: Path
    tokens: Path
    options: Mapping[str, str]


def job() -> Job:
    """The job of the command line."""
    model, out, tokens, *options = sys.argv[1:]
    pairs = (o.split("=", 1) for o in options)
    return Job(Path(model), Path(out), Path(tokens), {k: v for k, v in pairs})


def plain_folder(work: Job) -> Path:
    """``OUT/plain`` with all of the model but its weights."""
    folder = work.out / "plain"
    folder.mkdir(parents=True, exist_ok=True)
    for file in work.model.iterdir():
        if file.suffix == ".json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    return folder


def tensors_of(model: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor of a model as float32. (The numpy side of safetensors has no bfloat16.)"""
    found = {}
    for path in sorted(model.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                a, b = entry["data_offsets"]
                raw = np.frombuffer(data[start + a : start + b], NUMBERS[entry["dtype"]])
                if entry["dtype"] == "BF16":
                    raw = (raw.astype(np.uint32) << 16).view(np.float32)
                found[name] = raw.astype(np.float32).reshape(entry["shape"])
    return found


def finish(work: Job, native: Path, exact: Sequence[str], packages: Sequence[str]) -> None:
    """Say what was made.

    Parameters
    ----------
    native : the peer's own weights file, whose bytes are counted
    exact : matrices that the peer leaves in 16 or 32 bits
    packages : names of the packages at work, for their versions
    """
    result: dict[str, Any] = {
        "file": native.name,
        "nbytes": native.stat().st_size,
        "exact": list(exact),
        "versions": {p: version(p) for p in packages},
    }
    (work.out / "peer.json").write_text(json.dumps(result, indent=1))
