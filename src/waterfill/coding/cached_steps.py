"""Blocks of a cache in entropy-coded steps: what their bytes are, and how kernels may read them.

A block takes a fixed number of bytes: the index of its step, how many bytes follow (two, little endian),
and these, a chunk of `waterfill.coding.cachegen_symbols`. What is left is zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.coding.cached_blocks import BLOCK, STILL, Turn
from waterfill.coding.cachegen_symbols import MAX_SHIFT, Columns, classes_known, decode_chunk
from waterfill.types import Floats

__all__ = ["HEAD", "MIDDLE", "OCTAVE", "StepBlocks", "StepTable", "step_at", "write_block"]

HEAD = 3  # bytes: the step, and how many are used
OCTAVE, MIDDLE = 64, 128  # indices of steps: so many to the octave, about the coder's own
RATIOS = 2.0 ** ((np.arange(256) - MIDDLE) / OCTAVE)
U8 = NDArray[np.uint8]


def step_at(step: float, index: int) -> float:
    """A block's step by its index, a number of float32."""
    return float(np.float32(step * RATIOS[index]))


def write_block(index: int, chunk: bytes, out: U8) -> None:
    """Fill uint8 (bytes,), which is zeros, with a block."""
    out[:HEAD] = index, *len(chunk).to_bytes(2, "little")
    out[HEAD : HEAD + len(chunk)] = np.frombuffer(chunk, np.uint8)


@dataclass(frozen=True, eq=False)
class StepTable:
    """What components of keys, or of values, stand for.

    Attributes
    ----------
    mean : float16 (heads, width)
    rows, scale : int8 (heads, kept, width), float16 (heads, kept, 1)
    """

    mean: NDArray[np.float16]
    rows: NDArray[np.int8]
    scale: NDArray[np.float16]

    @property
    def raw(self) -> tuple[Any, ...]:
        """For the binding."""
        kept, width = self.rows.shape[1:]
        return (
            kept, self.mean.view(np.uint16), self.rows.reshape(-1, width),
            self.scale.view(np.uint16).reshape(-1),
        )  # fmt: skip

    def vectors(self, z: Floats) -> Floats:
        """Of components float32 (batch, heads, tokens, kept)."""
        rows = self.rows.astype(np.float32) * self.scale.astype(np.float32)
        out: Floats = z @ rows + self.mean.astype(np.float32)[:, None]
        return out


@dataclass(frozen=True, eq=False)
class StepBlocks:
    """Entropy-coded steps, of components of keys and of values together.

    Attributes
    ----------
    columns : how components are symbols
    step : of a block whose index is `MIDDLE`
    block_nbytes : of a block
    """

    keys: StepTable
    values: StepTable
    columns: Columns
    step: float
    block_nbytes: int
    turn: Turn | None

    @property
    def names(self) -> tuple[str, ...]:
        return ("codes",)

    @property
    def nbytes(self) -> tuple[int, ...]:
        return (self.block_nbytes,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.keys.mean.shape, self.values.mean.shape[1]

    @functools.cached_property
    def handle(self) -> Any:
        columns = self.columns
        owner = self.keys, self.values, columns
        return native.required().cache_steps(
            self.keys.raw, self.values.raw, (self.turn or STILL).handle,
            (columns.shifts, columns.models, columns.pulls, MAX_SHIFT), classes_known().tables,
            self.step, RATIOS, self.block_nbytes, owner,
        )  # fmt: skip

    def components(self, codes: U8) -> tuple[Floats, Floats]:
        """Of blocks uint8 (batch, blocks, bytes): twice float32 (batch, heads, blocks * BLOCK, kept)."""
        batch, blocks, _ = codes.shape
        heads, columns = self.shape[0], self.columns.forgetful()
        keys, values = (
            np.empty((batch, heads, blocks * BLOCK, table.rows.shape[1]), np.float32)
            for table in (self.keys, self.values)
        )
        for row in range(batch):
            for block in range(blocks):
                one = codes[row, block]
                stop = HEAD + int.from_bytes(one[1:HEAD].tobytes(), "little")
                chunk, step = one[HEAD:stop].tobytes(), step_at(self.step, one[0])
                found = decode_chunk(chunk, BLOCK, step, columns, heads)
                for x, part in zip((keys, values), found, strict=True):
                    x[row, :, block * BLOCK : (block + 1) * BLOCK] = part.swapaxes(1, 2)
        return keys, values

    def vectors(self, parts: Sequence[U8]) -> tuple[Floats, Floats]:
        """Keys before their rotation, and values: float32 (batch, heads, blocks * BLOCK, width)."""
        keys, values = self.components(parts[0])
        return self.keys.vectors(keys), self.values.vectors(values)
