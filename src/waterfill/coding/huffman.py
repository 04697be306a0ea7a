"""Huffman coding of bytes: several symbols at each step, fast on machines without vectors.

An alternative to `waterfill.coding.rans` that needs a few per cent more bytes. The bitstream is
described in ``docs/format/huffman.md``; ``WATERFILL_SIMD`` and ``WATERFILL_THREADS`` work as there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import huffman_numpy, native, rans
from waterfill.coding.huffman_numpy import code_lengths
from waterfill.types import FormatError

__all__ = ["code_lengths", "decode", "encode", "size_bits"]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Buffer = bytes | bytearray | memoryview | Bytes


def encode(symbols: Bytes, counts: Ints | None = None, threads: int | None = None) -> bytes:
    """Code bytes of at least two values.

    Parameters
    ----------
    symbols : uint8 (n,)
        What to code.
    counts : int64 (256,), optional
        Occurrences that the code is made for, where they are known already: every symbol that
        occurs must have at least one.
    threads : int, optional
        Threads over blocks; the bytes do not depend on it.

    Returns
    -------
    bytes
        Empty for no symbols. Their number is not repeated in it.
    """
    symbols = np.ascontiguousarray(symbols, np.uint8)
    if not symbols.size:
        return b""
    lengths = code_lengths(rans.histogram(symbols)[0] if counts is None else counts)
    core = native.core()
    if core is None:
        return huffman_numpy.encode(symbols, lengths)
    coded: bytes = core.huffman_encode(symbols, lengths, threads or native.threads())
    return coded


def decode(data: Buffer, n: int, threads: int | None = None) -> Bytes:
    """Inverse of `encode`.

    Parameters
    ----------
    data : bytes-like
        Exactly what `encode` returned.
    n : int
        Number of symbols.
    threads : int, optional
        Threads over blocks.

    Returns
    -------
    uint8 (n,)

    Raises
    ------
    FormatError
        On bytes that no encoder wrote: an incomplete code, wrong lengths, or a segment whose
        symbols do not end where its bits do.
    """
    source = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    if n > 8 * source.size:  # before room is made for what cannot be there
        raise FormatError("Huffman: more symbols than bits")
    out = np.empty(n, np.uint8)
    core = native.core()
    if core is None:
        huffman_numpy.decode(source, out)
        return out
    try:
        core.huffman_decode(source, out, threads or native.threads())
    except RuntimeError as error:
        raise FormatError(str(error)) from None
    return out


def size_bits(counts: Ints) -> int:
    """Bits of a stream of symbols that occur so often, but for the padding of its segments.

    Each of the segments (five to 65536 symbols, or one of fewer than 4096) is padded to a byte.
    """
    lengths = code_lengths(counts)
    segments = sum(
        huffman_numpy.segments_in(size) for size in huffman_numpy.block_sizes(int(counts.sum()))
    )
    head = len(huffman_numpy.pack_lengths(lengths)) + 2 * (segments - 1)
    return 8 * head + int((counts * lengths.astype(np.int64)).sum())
