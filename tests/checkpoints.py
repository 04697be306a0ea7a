"""Checkpoints of any dtype and layout, written and compared without any library's help."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.types import DTYPES

Infos = Mapping[str, tuple[str, tuple[int, ...]]]


def random_bytes(infos: Infos, seed: int = 0) -> dict[str, bytes]:
    """Random bits for each tensor: what no coder makes smaller."""
    random = np.random.default_rng(seed)
    return {name: random.bytes(nbytes(info)) for name, info in infos.items()}


def nbytes(info: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of a tensor of this dtype and shape."""
    return math.prod(info[1]) * DTYPES[info[0]].itemsize


def weights(shape: tuple[int, ...], seed: int = 0) -> bytes:
    """Bits of BF16 weights as training leaves them: the exponents compress."""
    values = np.random.default_rng(seed).normal(0, 0.02, shape).astype("<f4")
    return (values.view("<u4") >> 16).astype("<u2").tobytes()


def write_file(
    path: Path,
    infos: Infos,
    data: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
    pad: bool = True,
    **style: Any,
) -> Path:
    """A safetensors file with these tensors in this order; `style` is for json.dumps."""
    data = data or random_bytes(infos)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in infos.items():
        end = at + len(data[name])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    style = {"separators": (",", ":"), "ensure_ascii": False, **style}
    text = json.dumps(header, **style).encode()
    text += b" " * (-len(text) % 8 if pad else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data[n] for n in infos))
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
