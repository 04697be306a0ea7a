"""An artifact as arrays: numpy alone, one tensor at a time or all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from waterfill.container import Reader
from waterfill.registry import make_codec
from waterfill.types import (
    DTYPES,
    Array,
    Encoded,
    FormatError,
    SpecError,
    TensorInfo,
    to_float32,
)


def decode(reader: Reader, name: str) -> Array:
    """Stored bits of one entry (a tensor, or one slice of a fused one)."""
    entry = reader.entries[name]
    if entry.info.group:
        if entry.info.group not in reader.entries or reader.entries[entry.info.group].info.group:
            raise FormatError(f"{name}: repeats {entry.info.group!r}, which is not in the file")
        original = reader.entries[entry.info.group]
        if (original.info.dtype, original.info.shape) != (entry.info.dtype, entry.info.shape):
            raise FormatError(
                f"{name}: cannot repeat {entry.info.group!r}, which has another shape or dtype"
            )
        entry = original
    return unpack(reader.read(entry.info.name))


def unpack(encoded: Encoded) -> Array:
    """Stored bits of one coded tensor; FormatError, with its name, on whatever is wrong with it."""
    name = encoded.info.name
    try:
        bits = make_codec(encoded.spec).decode(encoded.parts, encoded.extra, encoded.info)
    except KeyError as error:
        raise FormatError(f"{name}: the part {error} is missing") from error
    except SpecError as error:
        raise FormatError(f"{name}: {error}") from error
    except (MemoryError, OverflowError, ValueError) as error:
        raise FormatError(f"{name}: the file promises what cannot be decoded ({error})") from error
    if bits.shape != encoded.info.shape or bits.dtype != DTYPES[encoded.info.dtype]:
        raise FormatError(f"{name}: decoded to {bits.dtype}{bits.shape}, not {encoded.info.shape}")
    return bits


def checkpoint_infos(reader: Reader) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Checkpoint tensor name -> (dtype, shape), with slices counted back into their tensors."""
    infos: dict[str, tuple[str, tuple[int, ...]]] = {}
    slices: dict[str, TensorInfo] = {}
    for entry in reader.entries.values():
        info = entry.info
        before = slices.get(info.tensor)
        if info.tensor in infos and (before is None or info.index is None):
            raise FormatError(f"{info.name}: the file holds this tensor both whole and in slices")
        if info.index is None:
            infos[info.tensor] = (info.dtype, info.shape)
            continue
        expected = 0 if before is None else (before.index or 0) + 1
        if info.index != expected:
            raise FormatError(f"{info.name}: slices must come in order")
        if before is not None and (before.dtype, before.shape) != (info.dtype, info.shape):
            raise FormatError(f"{info.name}: slices of one tensor must be alike")
        slices[info.tensor] = info
        infos[info.tensor] = (info.dtype, (info.index + 1, *info.shape))
    return infos


def read_tensors(reader: Reader) -> Iterator[tuple[str, str, Array]]:
    """(name, dtype, bits) of every checkpoint tensor, slices joined, one at a time."""
    sliced = {e.info.tensor for e in reader.entries.values() if e.info.index is not None}
    for name, (dtype, shape) in checkpoint_infos(reader).items():
        if name not in sliced:
            yield name, dtype, decode(reader, name)
            continue
        whole = np.empty(shape, DTYPES[dtype])
        for index in range(shape[0]):
            whole[index] = decode(reader, f"{name}[{index}]")
        yield name, dtype, whole


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
