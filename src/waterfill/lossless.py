"""Arrays of your own to bytes and back, bit for bit, without a model or a file around them.

>>> import numpy as np
>>> from waterfill import lossless
>>> weights = np.random.default_rng(0).normal(0, 0.02, 4096).astype(np.float32)
>>> data = lossless.encode(weights)
>>> len(data) < weights.nbytes
True
>>> bool((lossless.decode(data) == weights).all())
True

The stream is that of the codec `lossless`, with its dtype, shape and a checksum around it
(``docs/format/lossless.md``). Input is never changed.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, TypeVar, overload

import numpy as np

from waterfill.coding import gamma
from waterfill.coding import lossless as coding
from waterfill.coding.lossless import words_of
from waterfill.runtime.buffers import fill_target
from waterfill.sources.memory import bits_of, require_array, stored_dtype
from waterfill.types import DTYPES, Array, FormatError, TensorInfo, WaterfillError

__all__ = ["decode", "describe_stream", "encode"]

T = TypeVar("T")
MAGIC = b"wfl\x01"
MAX_AXES = 32


def encode(x: Any, *, coder: str = "auto", threads: int | None = None) -> bytes:
    """Code an array.

    Parameters
    ----------
    x : numpy array (with ml_dtypes also bfloat16 and fp8) or torch tensor, of any shape
        Taken to the CPU and copied only where it is elsewhere, or not contiguous.
    coder : "auto", "rans", or "huffman": 0.4 % larger for bf16, faster to decode without AVX-512
    threads : threads to use; default one for each core, or ``WATERFILL_THREADS``

    Returns
    -------
    bytes
        Self-contained; at most 40 bytes and three for each axis more than the array.

    Raises
    ------
    WaterfillError
        For what is no array, a dtype that safetensors does not have, or more than 32 axes.
    """
    require_array(x, "the array")
    dtype, shape = stored_dtype("the array", x), tuple(x.shape)
    _check_shape(shape, WaterfillError)
    if coder not in coding.CODERS:
        raise ValueError(f"coder is one of {', '.join(coding.CODERS)}, not {coder!r}")
    stream = coding.encode(words_of(bits_of(x, dtype)), dtype, coder, threads)
    name = dtype.encode()
    axes = b"".join(gamma.varint(axis) for axis in shape)
    head = MAGIC + bytes([len(name)]) + name + bytes([len(shape)]) + axes
    crc = zlib.crc32(stream, zlib.crc32(head))
    return b"".join((head, crc.to_bytes(4, "little"), stream))


def describe_stream(data: Any) -> TensorInfo:
    """Dtype and shape of what `encode` made, without decoding it."""
    return _head(np.frombuffer(data, np.uint8))[0]


@overload
def decode(data: Any, out: None = None, *, threads: int | None = None) -> Array: ...


@overload
def decode(data: Any, out: T, *, threads: int | None = None) -> T: ...


def decode(data: Any, out: Any = None, *, threads: int | None = None) -> Any:
    """Inverse of `encode`.

    Parameters
    ----------
    data : bytes-like
    out : numpy array or torch tensor to fill: contiguous, on the CPU, of the same dtype and shape.
        After an error its content means nothing.
    threads : as in `encode`

    Returns
    -------
    `out`, or a new array. BF16 comes as uint16 bits then, fp8 as uint8: numpy has no such types.

    Raises
    ------
    FormatError
        If the bytes are damaged.
    WaterfillError
        If `out` cannot hold the array.
    """
    source = np.frombuffer(data, np.uint8)
    info, at = _head(source)
    crc, body = int.from_bytes(source[at : at + 4].tobytes(), "little"), source[at + 4 :]
    if source.size < at + 4 or zlib.crc32(body.data, zlib.crc32(source[:at].tobytes())) != crc:
        raise FormatError("the array fails its checksum, or is cut short")
    try:
        bits = np.empty(info.shape, DTYPES[info.dtype]) if out is None else fill_target(out, info)
    except (MemoryError, ValueError) as error:
        raise FormatError(f"an array of {info.shape} does not fit in memory") from error
    coding.decode(body, words_of(bits), info.dtype, threads)
    return bits if out is None else out


def _head(source: Array) -> tuple[TensorInfo, int]:
    length = int(source[4]) if source.size > 4 else 255
    if source[:4].tobytes() != MAGIC or source.size < 6 + length:
        raise FormatError("not an array that waterfill.lossless coded, or of a newer version")
    dtype = source[5 : 5 + length].tobytes().decode("ascii", "replace")
    if dtype not in DTYPES:
        raise FormatError(f"unknown dtype {dtype!r}")
    axes, at, shape = int(source[5 + length]), 6 + length, []
    for _ in range(axes):
        axis, at = gamma.read_varint(source, at)
        shape.append(axis)
    _check_shape(tuple(shape), FormatError)
    return TensorInfo("out", tuple(shape), dtype), at


def _check_shape(shape: tuple[int, ...], error: type[WaterfillError]) -> None:
    if len(shape) > MAX_AXES:
        raise error(f"{len(shape)} axes are more than the {MAX_AXES} there may be")
    if math.prod(axis or 1 for axis in shape) >= 2**60 or max(shape, default=0) >= 2**42:
        raise error(f"{shape} is no shape")
