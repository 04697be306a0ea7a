"""An artifact as arrays: numpy alone, one tensor at a time or all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from waterfill.container import Reader
from waterfill.types import DTYPES, Array, FormatError, TensorInfo, make_codec, to_float32


def decode(reader: Reader, name: str) -> Array:
    """Stored bits of one entry (a tensor, or one slice of a fused one)."""
    entry = reader.entries[name]
    if entry.info.group:
        if entry.info.group not in reader.entries or reader.entries[entry.info.group].info.group:
            raise FormatError(f"{name}: repeats {entry.info.group!r}, which is not in the file")
        entry = reader.entries[entry.info.group]
    encoded = reader.read(entry.info.name)
    try:
        bits = make_codec(encoded.spec).decode(encoded.parts, encoded.extra, encoded.info)
    except KeyError as error:
        raise FormatError(f"{name}: the part {error} is missing") from error
    if bits.shape != encoded.info.shape or bits.dtype != DTYPES[encoded.info.dtype]:
        raise FormatError(f"{name}: decoded to {bits.dtype}{bits.shape}, not {encoded.info.shape}")
    return bits


def checkpoint_infos(reader: Reader) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Checkpoint tensor name -> (dtype, shape), with slices counted back into their tensors."""
    infos: dict[str, tuple[str, tuple[int, ...]]] = {}
    counts: dict[str, int] = {}
    for entry in reader.entries.values():
        info = entry.info
        if info.index is None:
            infos[info.tensor] = (info.dtype, info.shape)
            continue
        if info.index != counts.get(info.tensor, 0):
            raise FormatError(f"{info.name}: slices must come in order")
        counts[info.tensor] = info.index + 1
        infos[info.tensor] = (info.dtype, (info.index + 1, *info.shape))
    return infos


def read_tensors(reader: Reader) -> Iterator[tuple[str, str, Array]]:
    """(name, dtype, bits) of every checkpoint tensor, slices joined, one at a time."""
    infos = checkpoint_infos(reader)
    slices: dict[str, list[TensorInfo]] = {}
    for entry in reader.entries.values():
        if entry.info.index is not None:
            slices.setdefault(entry.info.tensor, []).append(entry.info)
    for name, (dtype, _) in infos.items():
        if name in slices:
            yield name, dtype, np.stack([decode(reader, i.name) for i in slices[name]])
        else:
            yield name, dtype, decode(reader, name)


def load(path: str | Path) -> dict[str, Array]:
    """Decode an artifact to a dict of numpy arrays; no torch needed.

    Parameters
    ----------
    path : artifact folder or its weights file

    Returns
    -------
    name -> array. BF16 comes as float32 (which holds it exactly), fp8 as its uint8 bits, every
    other dtype as itself.

    Raises
    ------
    FormatError
        If the file is damaged, truncated or written by a newer waterfill.
    """
    with Reader(path) as reader:
        return {
            name: to_float32(bits, dtype) if dtype == "BF16" else bits
            for name, dtype, bits in read_tensors(reader)
        }
