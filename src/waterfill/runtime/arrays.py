"""An artifact as arrays: numpy alone, one tensor at a time or all of them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from waterfill.coding.native import threads as cores
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

T = TypeVar("T")

# Of a small file the threads take longer to start than they save; each holds a coded tensor.
SMALL_NBYTES = 32 << 20
MOST_THREADS = 4


def decode(reader: Reader, name: str, out: Array | None = None) -> Array:
    """Stored bits of one entry (a tensor, or one slice of a fused one), in `out` if it is given."""
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
    return unpack(reader.read(entry.info.name), out)


def unpack(encoded: Encoded, out: Array | None = None) -> Array:
    """Stored bits of one coded tensor; FormatError, with its name, on whatever is wrong with it.

    They go to `out` if it is given: C-contiguous, of the tensor's shape and `DTYPES` dtype.
    """
    name = encoded.info.name
    with damage_of(name):
        chosen = make_codec(encoded.spec)
        if not encoded.info.size:
            # Its other axes may be as long as a file likes: no codec gets to count along them.
            return empty(name, encoded.info.dtype, encoded.info.shape) if out is None else out
        if out is not None:
            chosen.decode_into(encoded.parts, encoded.extra, encoded.info, out)
            return out
        bits = chosen.decode(encoded.parts, encoded.extra, encoded.info)
    if bits.shape != encoded.info.shape or bits.dtype != DTYPES[encoded.info.dtype]:
        raise FormatError(f"{name}: decoded to {bits.dtype}{bits.shape}, not {encoded.info.shape}")
    return bits


@contextlib.contextmanager
def damage_of(name: str) -> Iterator[None]:
    """Whatever bytes that lie can provoke in a codec becomes a FormatError with the tensor's name."""
    try:
        yield
    except KeyError as error:
        raise FormatError(f"{name}: the part {error} is missing") from error
    except (FormatError, SpecError) as error:
        raise FormatError(f"{name}: {error}") from error
    except (MemoryError, OverflowError, RecursionError, ValueError) as error:
        raise FormatError(f"{name}: the file promises what cannot be decoded ({error})") from error


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


def read_tensor(
    reader: Reader, name: str, dtype: str, shape: tuple[int, ...], out: Array | None = None
) -> Array:
    """Stored bits of a checkpoint tensor, its slices joined; into `out` as in `decode`."""
    if name in reader.entries:
        return decode(reader, name, out)
    whole = empty(name, dtype, shape) if out is None else out
    for index in range(shape[0]):
        decode(reader, f"{name}[{index}]", whole[index, ...])
    return whole


def empty(name: str, dtype: str, shape: tuple[int, ...]) -> Array:
    """Room for a tensor; FormatError where a file promises more than there can be."""
    try:
        return np.empty(shape, DTYPES[dtype])
    except (MemoryError, ValueError) as error:
        raise FormatError(f"{name}: the file promises what cannot be decoded ({error})") from error


def read_tensors(
    reader: Reader, finish: Callable[[Array, str], T], threads: int | None = None
) -> Iterator[tuple[str, T]]:
    """(name, finish(bits, dtype)) of every checkpoint tensor, slices joined, in order.

    So many `threads` (default: as many as help) decode and finish ahead, each one tensor at a time.
    """
    if threads is None:
        threads = 1 if reader.nbytes < SMALL_NBYTES else min(MOST_THREADS, cores())

    def one(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[str, T]:
        return name, finish(read_tensor(reader, name, dtype, shape), dtype)

    infos = [(name, *info) for name, info in checkpoint_infos(reader).items()]
    if threads < 2:
        yield from (one(*info) for info in infos)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        ahead = deque(pool.submit(one, *info) for info in infos[:threads])
        for info in infos[threads:]:
            yield ahead.popleft().result()
            ahead.append(pool.submit(one, *info))
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def load(
    path: str | Path, threads: int | None = None, size: str | int | None = None
) -> dict[str, Array]:
    """Decode an artifact to a dict of numpy arrays; no torch needed.

    Parameters
    ----------
    path : artifact folder or its weights file
    threads : tensors to decode at a time; default 1 of a small file, else one per core up to 4
        (WATERFILL_THREADS sets another number of cores)
    size : bytes, or text such as ``3MB``, that the file might have been cut to (docs/stack.md)

    Returns
    -------
    name -> array. BF16 comes as float32 (which holds it exactly), fp8 as its uint8 bits, every
    other dtype as itself.

    Raises
    ------
    FormatError
        If the file is damaged, truncated or written by a newer waterfill.
    BudgetError
        If the model cannot be had in so small a `size`.
    """
    from waterfill.runtime.sizing import open_at

    with open_at(path, size) as reader:
        return dict(read_tensors(reader, _as_numpy, threads))


def _as_numpy(bits: Array, dtype: str) -> Array:
    return to_float32(bits, dtype) if dtype == "BF16" else bits
