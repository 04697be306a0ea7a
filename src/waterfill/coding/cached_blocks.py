"""How blocks of a cache are held, for the kernels that attend to them as they lie.

A block has `BLOCK` tokens, in one part or several, uint8 (batch, blocks, bytes) each. Of each kind there is
a class: what its bytes mean, as numpy reads them (`vectors`), and a handle to the same for the kernels.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.types import Floats, to_float32

__all__ = [
    "BLOCK",
    "GAIN_BITS",
    "Blocks",
    "CodedStream",
    "GridBlocks",
    "PlainBlocks",
    "Turn",
    "WholeBlocks",
]

BLOCK = 32  # tokens that are coded together
GAIN_BITS = 3  # of a token's gain
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Turn:
    """Pairs of columns that turn with the position.

    Attributes
    ----------
    first, second : int64 (pairs,)
    frequencies : float64 (pairs,), radians per token
    """

    first: I64
    second: I64
    frequencies: NDArray[np.float64]

    def __post_init__(self) -> None:
        arrays = (self.first, self.second, self.frequencies)
        if len({a.shape for a in arrays}) != 1 or not all(a.flags.c_contiguous for a in arrays):
            raise ValueError("columns and frequencies do not fit each other")
        if [str(a.dtype) for a in arrays] != ["int64", "int64", "float64"]:
            raise ValueError("columns are int64, frequencies float64")

    @property
    def handle(self) -> Any:
        """The kernels' tables, the same for all that turn alike for as long as one of them is used."""
        arrays = self.first, self.second, self.frequencies
        key = tuple(a.tobytes() for a in arrays)
        found = _TURNS.get(key)
        if found is None:
            found = _TURNS[key] = native.required().CacheTurn(*arrays)
        return found


_TURNS: weakref.WeakValueDictionary[tuple[bytes, ...], Any] = weakref.WeakValueDictionary()
STILL = Turn(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
NO_SIZES = np.zeros(256, np.float32)


class Blocks(Protocol):
    """What all kinds have.

    Attributes
    ----------
    names : of the parts
    nbytes : of each part of a block
    turn : how keys turn with their position; None: they do not, or are coded as they are turned
    handle : the kernels' handle, which reads the same memory and holds next to none of its own
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def turn(self) -> Turn | None: ...
    @property
    def nbytes(self) -> tuple[int, ...]: ...
    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, widths of a key and of a value."""
        ...

    @property
    def handle(self) -> Any: ...
    def vectors(self, parts: Sequence[U8]) -> tuple[Floats, Floats]:
        """Keys before their rotation, and values: float32 (batch, heads, blocks * BLOCK, width)."""
        ...


@dataclass(frozen=True, eq=False)
class CodedStream:
    """Keys or values in codes of whole bits.

    A head's vector is ``mean + gain * components @ rows``, a component being its code less
    ``2**(bits - 1) - 1/2``, and the gain that of the head's token.

    Attributes
    ----------
    kept : components of a head at most
    mean : float16 (heads, width)
    place : int32 (components,), head * kept + component of the head, of those that are coded
    rows, scale : int8 (components, width), float16 (components, 1): what a component is multiplied with
    groups : bits 1 to 8, and how many of the components, in order, have so many; their codes lie in this
        order, `BLOCK` of each, as fields of 8, 4, 2 and 1 bits that make up a code, highest first; byte j
        of a field of w bits has tokens j, j + 4 w, j + 8 w and so on, lowest bits first
    """

    kept: int
    mean: NDArray[np.float16]
    place: NDArray[np.int32]
    rows: NDArray[np.int8]
    scale: NDArray[np.float16]
    groups: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        width, n = self.mean.shape[1], len(self.place)
        shapes = (self.place.shape, self.rows.shape, self.scale.shape)
        if shapes != ((n,), (n, width), (n, 1)) or sum(k for _, k in self.groups) != n:
            raise ValueError(f"means {self.mean.shape} do not fit rows {self.rows.shape}")
        arrays = (self.mean, self.place, self.rows, self.scale)
        if [str(a.dtype) for a in arrays] != ["float16", "int32", "int8", "float16"]:
            raise ValueError("means and scales are float16, places int32, rows int8")
        if not all(a.flags.c_contiguous for a in arrays):
            raise ValueError("means, places, rows and scales are contiguous")
        if not 0 < self.kept <= width or any(not 1 <= bits <= 8 for bits, _ in self.groups):
            raise ValueError("codes have 1 to 8 bits, heads as many components as numbers at most")

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block, of all heads."""
        return sum(bits * n * BLOCK // 8 for bits, n in self.groups)

    @property
    def raw(self) -> tuple[Any, ...]:
        """For the binding."""
        tables = self.kept, self.mean.view(np.uint16), self.rows, self.scale.view(np.uint16)[:, 0]
        return tables, self.place, list(self.groups)

    @property
    def gain_nbytes(self) -> int:
        """Bytes of a block's gains: a field for each head."""
        return len(self.mean) * BLOCK * GAIN_BITS // 8

    def vectors(self, codes: U8, which: U8, gains: NDArray[np.float32]) -> Floats:
        """float32 (batch, heads, blocks * BLOCK, width)."""
        (heads, width), kept = self.mean.shape, self.kept
        batch, blocks, _ = codes.shape
        z, at, done = np.zeros((batch, blocks, heads * kept, BLOCK), np.float32), 0, 0
        for bits, n in self.groups:
            nbytes = n * BLOCK * bits // 8
            part = codes[:, :, at : at + nbytes].reshape(batch, blocks, n, -1)
            place = self.place[done : done + n]
            z[:, :, place] = unpacked(part, bits) - np.float32(2 ** (bits - 1) - 0.5)
            at, done = at + nbytes, done + n
        table = np.zeros((heads * kept, width), np.float32)
        table[self.place] = self.rows.astype(np.float32) * self.scale.astype(np.float32)
        which = unpacked(which.reshape(batch, blocks, heads, 1, -1), GAIN_BITS).astype(np.uint8)
        ordered = in_order(z.reshape(batch, blocks, heads, kept, BLOCK) * gains[which])
        mean = self.mean.astype(np.float32)
        out: Floats = ordered @ table.reshape(heads, kept, width) + mean[:, None]
        return out


@dataclass(frozen=True, eq=False)
class WholeBlocks:
    """Codes of whole bits, of components of keys and of values, and which gain each head's token has.

    Attributes
    ----------
    gains : float32 (2**GAIN_BITS,)
    """

    keys: CodedStream
    values: CodedStream
    turn: Turn | None
    gains: NDArray[np.float32]

    names: ClassVar[tuple[str, ...]] = ("keys", "keys_gain", "values", "values_gain")

    @property
    def nbytes(self) -> tuple[int, ...]:
        k, v = self.keys, self.values
        return k.block_nbytes, k.gain_nbytes, v.block_nbytes, v.gain_nbytes

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.keys.mean.shape, self.values.mean.shape[1]

    @functools.cached_property
    def handle(self) -> Any:
        owner = self.keys, self.values
        return native.required().cache_whole(
            self.keys.raw, self.values.raw, self.gains, (self.turn or STILL).handle, owner
        )

    def vectors(self, parts: Sequence[U8]) -> tuple[Floats, Floats]:
        keys, key_gains, values, value_gains = parts
        return (
            self.keys.vectors(keys, key_gains, self.gains),
            self.values.vectors(values, value_gains, self.gains),
        )


@dataclass(frozen=True, eq=False)
class PlainBlocks:
    """Numbers as they are, (head, column, token), keys as attention gets them.

    Attributes
    ----------
    shape : heads, widths of a key and of a value
    dtype : F32, F16 or BF16
    """

    shape: tuple[int, int, int]
    dtype: str

    @property
    def names(self) -> tuple[str, ...]:
        return "keys", "values"

    @property
    def turn(self) -> None:
        return None

    @property
    def nbytes(self) -> tuple[int, ...]:
        heads, d, e = self.shape
        each = heads * BLOCK * (4 if self.dtype == "F32" else 2)
        return each * d, each * e

    @functools.cached_property
    def handle(self) -> Any:
        return native.required().cache_plain(*self.shape, self.dtype, STILL.handle)

    def vectors(self, parts: Sequence[U8]) -> tuple[Floats, Floats]:
        batch, blocks, _ = parts[0].shape
        words = (
            np.float32 if self.dtype == "F32" else np.uint16 if self.dtype == "BF16" else np.float16
        )
        keys, values = (
            in_order(
                to_float32(np.ascontiguousarray(x).view(words), self.dtype)
                .reshape(batch, blocks, self.shape[0], width, BLOCK)
            )
            for x, width in zip(parts, self.shape[1:], strict=True)
        )  # fmt: skip
        return keys, values


@dataclass(frozen=True, eq=False)
class GridBlocks:
    """Integers on grids: codes, and two numbers of a grid, of keys and of values.

    By channel, keys before their rotation: a byte for the step, by `sizes`, and one for the centre, int8 in
    sixteenths of the range, of each channel of a block; of values, `groups` of consecutive tokens share a grid.
    By token, keys as attention gets them: step and lowest number of each token, float16.

    Attributes
    ----------
    shape : heads, widths of a key and of a value
    bits : of keys, and of values
    sizes : float32 (256,), of a step, by its byte; None: by token
    """

    shape: tuple[int, int, int]
    bits: tuple[int, int]
    turn: Turn | None
    sizes: NDArray[np.float32] | None = None
    groups: int = BLOCK

    LEAST: ClassVar[np.float32] = np.float32(6e-8)  # of a token's step

    @property
    def names(self) -> tuple[str, ...]:
        lowest = "low" if self.sizes is None else "centre"
        return tuple(
            f"{x}{part}" for x in ("keys", "values") for part in ("", "_step", f"_{lowest}")
        )

    @property
    def nbytes(self) -> tuple[int, ...]:
        heads, d, e = self.shape
        codes = [heads * w * bits * BLOCK // 8 for w, bits in zip((d, e), self.bits, strict=True)]
        grids = (2 * heads * BLOCK,) * 2
        if self.sizes is not None:
            grids = heads * d, heads * self.groups
        return codes[0], grids[0], grids[0], codes[1], grids[1], grids[1]

    @functools.cached_property
    def handle(self) -> Any:
        sizes = NO_SIZES if self.sizes is None else self.sizes
        by_channel = self.sizes is not None
        turn = (self.turn or STILL).handle
        return native.required().cache_grids(
            by_channel, *self.shape, *self.bits, self.groups, sizes, turn
        )

    def vectors(self, parts: Sequence[U8]) -> tuple[Floats, Floats]:
        keys = self._stream(parts[:3], self.shape[1], self.bits[0], -1)
        return keys, self._stream(parts[3:], self.shape[2], self.bits[1], self.groups)

    def _stream(self, parts: Sequence[U8], width: int, bits: int, groups: int) -> Floats:
        batch, blocks, _ = parts[0].shape
        heads = self.shape[0]
        codes = unpacked(parts[0].reshape(batch, blocks, heads, width, 4 * bits), bits)
        if self.sizes is None:
            step, low = (
                np.ascontiguousarray(x).view(np.float16).astype(np.float32)
                .reshape(batch, blocks, heads, 1, BLOCK) for x in parts[1:]
            )  # fmt: skip
            return in_order(codes * np.maximum(step, self.LEAST) + low)
        size = self.sizes[parts[1]]
        unit, half = np.float32(2**bits / 16), np.float32((2**bits - 1) / 2)
        zero = parts[2].view(np.int8).astype(np.float32) * unit - half
        if groups < 0:
            grids = [x.reshape(batch, blocks, heads, width, 1) for x in (size, zero)]
        else:
            grids = [
                x.reshape(batch, blocks, heads, 1, groups).repeat(BLOCK // groups, 4)
                for x in (size, zero)
            ]
        return in_order((codes + grids[1]) * grids[0])


def in_order(z: Floats) -> Floats:
    """(batch, blocks, heads, width, BLOCK) as (batch, heads, blocks * BLOCK, width)."""
    batch, _, heads, width, _ = z.shape
    return z.transpose(0, 2, 1, 4, 3).reshape(batch, heads, -1, width)


def unpacked(packed: U8, bits: int) -> NDArray[np.float32]:
    """Codes (..., BLOCK) of bytes (..., 4 * bits)."""
    out, at, left = np.zeros((*packed.shape[:-1], BLOCK), np.uint8), 0, bits
    for width in (8, 4, 2, 1):
        if left >= width:
            left -= width
            part = packed[..., at : at + 4 * width]
            shifted = [part >> (i * width) & ((1 << width) - 1) for i in range(8 // width)]
            out |= np.concatenate(shifted, -1) << left
            at += 4 * width
    return out.astype(np.float32)
