"""A chunk of keys and values to bytes and back, from words to words.

What `cachegen_symbols` does with components, with all that comes before: rows are turned back, taken to
their basis and counted in steps 32 at a time, and nothing of the size of a chunk is held but its symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.coding.cachegen_rows import Runs, Turn, read_rows, write_rows
from waterfill.coding.cachegen_symbols import (
    Columns,
    Listed,
    Stream,
    dequantise,
    parts,
    quantise_to,
    read_chunk,
    write_chunk,
)
from waterfill.types import Floats

__all__ = ["Basis", "decode_rows", "encode_rows"]

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Basis:
    """Of keys or values.

    Attributes
    ----------
    analysis : float32 (heads, kept, width), components of vectors, before their offsets
    offset : float32 (heads * kept,), to be taken from them
    """

    analysis: Floats
    offset: Floats


def encode_rows(
    words: Sequence[Runs], dtype: str, turns: Sequence[Turn], bases: Sequence[Basis], step: float, columns: Columns
) -> bytes:  # fmt: skip
    """A chunk at a level.

    Parameters
    ----------
    words : keys and values in the storage form of their dtype
    turns : of each, back to position 0

    Raises
    ------
    ValueError
        If a number is not finite, or a thousand million steps from zero.
    """
    symbols = np.empty((_rows(words[0]), columns.classes.size), np.uint8)
    listed = [
        _encode(x, dtype, turn, basis, step, stream, symbols)
        for x, turn, basis, stream in zip(words, turns, bases, columns.streams, strict=True)
    ]
    return write_chunk(symbols, listed, columns)


def _rows(runs: Runs) -> int:
    return sum(x.shape[0] * x.shape[2] * x.shape[3] for x in runs)


def _encode(
    words: Runs, dtype: str, turn: Turn, basis: Basis, step: float, stream: Stream, out: Bytes
) -> Listed:
    core = native.core()
    if core is not None:
        try:
            found = core.cachegen_encode(
                list(words), dtype, turn.first, turn.second, turn.cos, turn.sin, basis.analysis,
                basis.offset, float(np.float32(1 / step)), stream.shift, stream.first, stream.last,
                stream.column, stream.wide, stream.low_column, out,
            )  # fmt: skip
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        return Listed(*found)
    x = read_rows(words, dtype, turn).swapaxes(1, 2)
    z = _transform(x, basis.analysis, np.zeros(basis.analysis.shape[:2], np.float32))
    return Listed.of(
        [
            quantise_to(z[:, :, part], basis.offset, step, stream, together, out[part]).moved(
                part.start * stream.column.size
            )
            for part, together in parts(len(out))
            if part.stop > part.start
        ]
    )


def decode_rows(
    data: bytes, dtype: str, out: Sequence[Runs], turns: Sequence[Turn],
    synthesis: Sequence[Floats], means: Sequence[Floats], step: float, columns: Columns,
) -> None:  # fmt: skip
    """Inverse of `encode_rows`.

    Parameters
    ----------
    out : keys and values, to be filled
    turns : of each, from position 0
    synthesis : float32 (heads, width, kept), vectors less the mean of components
    means : float32 (heads, width)

    Raises
    ------
    FormatError
        On bytes that no encoder wrote.
    """
    symbols, listed = read_chunk(data, _rows(out[0]), columns)
    for some, runs, turn, matrix, mean, stream in zip(
        listed, out, turns, synthesis, means, columns.streams, strict=True
    ):
        _decode(symbols, some, dtype, runs, turn, matrix, mean, step, stream)


def _decode(
    symbols: Bytes, listed: Listed, dtype: str, out: Runs, turn: Turn,
    synthesis: Floats, mean: Floats, step: float, stream: Stream,
) -> None:  # fmt: skip
    core = native.core()
    if core is not None:
        core.cachegen_decode(
            symbols, step, stream.shift, stream.pull, stream.column, stream.wide,
            stream.low_column, listed.places, listed.over, synthesis, mean, dtype,
            turn.first, turn.second, turn.cos, turn.sin, list(out),
        )  # fmt: skip
        return
    count = stream.column.size
    z = [
        dequantise(
            symbols[part], step, stream, listed.between(part.start, part.stop, count), together, len(mean)
        )
        for part, together in parts(len(symbols))
        if part.stop > part.start
    ]  # fmt: skip
    x = _transform(np.concatenate(z, axis=2), synthesis, mean)
    batch, heads, _, _, width = out[0].shape
    words = write_rows(x.swapaxes(1, 2), dtype, (batch, heads, len(symbols) // batch, width), turn)
    start = 0
    for run in out:
        stop = start + run.shape[2] * run.shape[3]
        run[...] = words[:, :, start:stop].reshape(run.shape)
        start = stop


def _transform(x: Floats, matrix: Floats, start: Floats) -> Floats:
    """(heads, n, rows) times (heads, m, n), summed from a start (heads, m) on, in order: (heads, m, rows)."""
    out: Floats = np.repeat(start[:, :, None], x.shape[2], axis=2)
    for i in range(x.shape[1]):
        out += matrix[:, :, i, None] * x[:, i, None]
    return out
