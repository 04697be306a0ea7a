"""Components of a layer as columns of symbols: what one level of a stored cache codes, and how.

A component is a whole number of steps. Its lower bits, where it has many, are a column of their own, so
that no symbol is above 31. Each component takes one of a bank of models that every reader knows, so a
model costs a byte or less. What a model has no symbol for is put in a list. One rANS stream holds all
columns of a chunk of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma, native, rans
from waterfill.coding.entropy import decode_bytes, encode_bytes
from waterfill.coding.models import Alphabet, parametric_weights, quantise
from waterfill.coding.sections import join, split
from waterfill.types import Floats, FormatError

__all__ = ["Columns", "decode_chunk", "encode_chunk", "fit_columns", "pack_columns", "read_columns"]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

SYMBOLS, MIDDLE = 32, 16
ALPHABET = Alphabet(-MIDDLE, SYMBOLS, False)
SHAPES = (3, 4, 6, 8)  # exponents of the bank's models, in quarters: up to the normal
SCALES = np.arange(37, 104, 3)  # of the bank's models, 8 to the octave
SUPPORT_BITS = 14  # a symbol rarer than 2**-14 is left to the list
MAX_SHIFT = 5
RARE = 1e-3  # share of a component's values that may lie beyond its symbols
PULL = 256  # parts of a step that points are moved towards zero by
REACH = 1 << 30
WIDTHS = [[a, b] for a in (1, 2, 4, 8) for b in (1, 2, 4)]  # bytes of what a list holds
TOGETHER = 32  # tokens of a column that are coded one after another: the coder's lanes


@lru_cache(maxsize=1)
def bank() -> tuple[NDArray[np.uint16], Floats]:
    """The models that there are: frequencies (models, 32), and bits of each symbol."""
    weights = np.concatenate([parametric_weights(ALPHABET, shape, SCALES) for shape in SHAPES])
    weights[weights < weights.sum(axis=1, keepdims=True) >> SUPPORT_BITS] = 0
    freqs = quantise(weights)
    listed = 2.0 * SUPPORT_BITS
    bits = np.where(freqs > 0, 12 - np.log2(np.maximum(freqs, 1)), listed).astype(np.float32)
    return freqs, bits


@lru_cache(maxsize=1)
def classes_known() -> rans.Models:
    """The bank's models, then plain bits, 1 to so many as a component may have."""
    plain = np.zeros((MAX_SHIFT, SYMBOLS), np.uint16)
    for width, row in enumerate(plain, 1):
        row[: 1 << width] = rans.TOTAL >> width
    return rans.Models(np.concatenate([bank()[0], plain]))


@dataclass(frozen=True, eq=False)
class Stream:
    """What of a level's columns concerns keys, or values: a place for each of their components.

    Attributes
    ----------
    column : int32 (components,)
    wide, low_column : int32, components with a second column, and which
    shift : uint8; first, last : int32, symbols of the model; scale, pull : float32, in steps
    """

    column: Ints
    wide: Ints
    low_column: Ints
    shift: Bytes
    first: Ints
    last: Ints
    scale: Floats
    pull: Floats


@dataclass(frozen=True, eq=False)
class Columns:
    """How a level codes the components of a layer.

    Attributes
    ----------
    shifts : uint8 (components,), bits of each that are a column of their own
    models : uint8 (components,), of the bank
    pulls : uint8 (models in use,), parts of a step that points other than zero are moved towards it
    sizes : components of keys, and of values
    """

    shifts: Bytes
    models: Bytes
    pulls: Bytes
    sizes: tuple[int, int]

    def forgetful(self) -> Columns:
        """The same, for one use: what is derived, many times larger, is not kept with these."""
        return replace(self)

    @cached_property
    def classes(self) -> Bytes:
        """Class of each column, of those that are known."""
        lower = self.shifts[self.low] + (len(bank()[0]) - 1)
        return np.concatenate([self.models[self.order], lower]).astype(np.uint8)

    @cached_property
    def repeated(self) -> Bytes:
        """Class of each column of a matrix of whole groups."""
        return np.repeat(self.classes, TOGETHER)

    @cached_property
    def order(self) -> Longs:
        """Components in the order of their columns: those of a model side by side."""
        return np.argsort(self.models, kind="stable")

    @cached_property
    def low(self) -> Longs:
        """Components that have a second column, in the order of these, which follow all first ones."""
        wide = np.flatnonzero(self.shifts)
        return wide[np.argsort(self.shifts[wide], kind="stable")]

    @cached_property
    def streams(self) -> tuple[Stream, Stream]:
        """Of keys, and of values."""
        components = self.shifts.size
        column, low_column = np.zeros((2, components), np.int32)
        column[self.order] = np.arange(components)
        low_column[self.low] = components + np.arange(self.low.size)
        has = bank()[0] > 0
        first = has.argmax(axis=1).astype(np.int32)[self.models]
        last = (SYMBOLS - 1 - has[:, ::-1].argmax(axis=1)).astype(np.int32)[self.models]
        used = np.unique(self.models, return_inverse=True)[1]
        pull = (self.pulls[used] / PULL).astype(np.float32)
        scale = (1 << self.shifts.astype(np.int32)).astype(np.float32)

        def part(some: slice) -> Stream:
            shifts = self.shifts[some]
            wide = np.flatnonzero(shifts).astype(np.int32)
            return Stream(
                column[some], wide, low_column[some][wide], shifts, first[some], last[some],
                scale[some], pull[some],
            )  # fmt: skip

        return part(slice(0, self.sizes[0])), part(slice(self.sizes[0], None))


@dataclass(frozen=True, eq=False)
class Listed:
    """Components without a symbol of their own.

    Attributes
    ----------
    places : int64 (n,), token times components plus component
    over : int32 (n,), what is to be added to their nearest symbols
    """

    places: Longs
    over: Ints

    @classmethod
    def of(cls, parts: Sequence[Listed]) -> Listed:
        """One after another."""
        return cls(
            np.concatenate([one.places for one in parts]), np.concatenate([one.over for one in parts])
        )  # fmt: skip

    def moved(self, by: int) -> Listed:
        return Listed(self.places + by, self.over)

    def between(self, first: int, stop: int, count: int) -> Listed:
        """Those of tokens first to stop, counted from there, where they ascend; of so many components."""
        some = slice(*np.searchsorted(self.places, [first * count, stop * count]))
        return Listed(self.places[some] - first * count, self.over[some])


def fit_columns(sample: Sequence[Floats], step: float) -> Columns:
    """Columns for components like a sample: of keys and of values, each float32 (heads, kept, tokens)."""
    steps = np.concatenate([z.reshape(-1, z.shape[2]) for z in sample]) * np.float32(1 / step)
    k = np.rint(np.clip(steps, -REACH, REACH)).astype(np.int32)
    size = np.abs(k)
    shifts = _shifts(size)
    k += _halves(shifts)[:, None]
    k >>= shifts[:, None]
    np.clip(k, -MIDDLE, MIDDLE - 1, out=k)
    k += MIDDLE + SYMBOLS * np.arange(len(k), dtype=np.int32)[:, None]
    counts = np.bincount(k.reshape(-1), minlength=len(k) * SYMBOLS)
    models = (counts.reshape(-1, SYMBOLS) @ bank()[1].T).argmin(axis=1).astype(np.uint8)
    sizes = sample[0].shape[0] * sample[0].shape[1], sample[1].shape[0] * sample[1].shape[1]
    return Columns(shifts, models, _pulls(np.abs(steps), size, models), sizes)


def _side_by_side(z: Floats) -> Floats:
    """(heads, kept, tokens) as (tokens, heads * kept)."""
    return z.reshape(z.shape[0] * z.shape[1], z.shape[2]).T


def _halves(shifts: Bytes) -> Ints:
    return (1 << shifts.astype(np.int32)) >> 1


def _shifts(size: Ints) -> Bytes:
    """Least bits to take away from each component (components, tokens) that leave few beyond the symbols."""
    shifts, wide = np.zeros(len(size), np.uint8), np.arange(len(size))
    for shift in range(MAX_SHIFT):
        beyond = np.count_nonzero(size[wide] >= MIDDLE << shift, axis=1)
        wide = wide[beyond / size.shape[1] > RARE]
        shifts[wide] += 1
    return shifts


def _pulls(steps: Floats, size: Ints, models: Bytes) -> Bytes:
    """How far the values of each model lie nearer to zero than their points, on average."""
    ids = np.unique(models, return_inverse=True)[1]
    some = size != 0
    nearer = np.subtract(size, steps, dtype=np.float64)
    nearer *= some
    total = np.bincount(ids, nearer.sum(axis=1))
    number = np.bincount(ids, np.count_nonzero(some, axis=1))
    pull = np.rint(PULL * total / np.maximum(number, 1))
    found: Bytes = np.clip(pull, 0, PULL // 2).astype(np.uint8)
    return found


def pack_columns(columns: Columns) -> bytes:
    """Columns as bytes."""
    return join([encode_bytes(x, 1) for x in (columns.shifts, columns.models)] + [columns.pulls.tobytes()])  # fmt: skip


def read_columns(data: bytes, sizes: tuple[int, int]) -> Columns:
    """Inverse of `pack_columns`; FormatError on bytes that lie."""
    shifts, models, pulls = split(data, 3)
    columns = Columns(
        decode_bytes(shifts, sum(sizes), 1), decode_bytes(models, sum(sizes), 1),
        np.frombuffer(pulls, np.uint8), sizes,
    )  # fmt: skip
    if columns.shifts.max() > MAX_SHIFT or columns.models.max() >= len(bank()[0]):
        raise FormatError("a component of too many bits, or under a model that there is not")
    if columns.pulls.size != np.unique(columns.models).size or columns.pulls.max() > PULL // 2:
        raise FormatError("points are moved otherwise than is known")
    return columns


def encode_chunk(
    z: Sequence[Floats], offsets: Sequence[Floats], step: float, columns: Columns
) -> bytes:
    """A chunk at a level.

    Parameters
    ----------
    z : of keys and of values, float32 (heads, kept, tokens)
    offsets : float32 (heads * kept,) of each, to be taken from their components

    Raises
    ------
    ValueError
        If a number is not finite, or a thousand million steps from zero.
    """
    tokens = z[0].shape[2]
    symbols = np.empty((tokens, columns.classes.size), np.uint8)
    listed = []
    for x, offset, stream in zip(z, offsets, columns.streams, strict=True):
        found = []
        for part, together in parts(tokens):
            some = quantise_to(x[:, :, part], offset, step, stream, together, symbols[part])
            found.append(some.moved(part.start * stream.column.size))
        listed.append(Listed.of(found))
    return write_chunk(symbols, listed, columns)


def write_chunk(symbols: Bytes, listed: Sequence[Listed], columns: Columns) -> bytes:
    """Bytes of a chunk's symbols (tokens, columns), and of what has none, of keys and of values."""
    start, every, total = 0, [], sum(columns.sizes)
    for one, count in zip(listed, columns.sizes, strict=True):
        every.append(Listed(one.places + one.places // count * (total - count) + start, one.over))
        start += count
    streams = [_encode(symbols[part], columns, side) for part, side in parts(len(symbols))]
    return join([_pack_list(Listed.of(every)), *streams])


def parts(tokens: int) -> tuple[tuple[slice, int], tuple[slice, int]]:
    """Tokens in whole groups, which a coder reads a column at a time, and what is left; and how many together."""
    body = tokens // TOGETHER * TOGETHER
    return (slice(0, body), TOGETHER), (slice(body, tokens), 1)


def _encode(symbols: Bytes, columns: Columns, together: int) -> bytes:
    """Symbols (tokens, columns), so many tokens of a column side by side."""
    if not len(symbols):
        return b""
    ids = columns.classes if together == 1 else columns.repeated
    lanes = min(TOGETHER, rans.choose_lanes(symbols.size))
    return classes_known().encode(symbols.reshape(-1, ids.size), ids, lanes, 1)


def quantise_to(
    z: Floats, offset: Floats, step: float, stream: Stream, together: int, out: Bytes
) -> Listed:
    """Fill the columns of a stream; what has no symbol."""
    core = native.core()
    inverse = float(np.float32(1 / step))
    if core is not None:
        try:
            found = core.cachegen_quantise(
                np.ascontiguousarray(z), offset, inverse, stream.shift, stream.first, stream.last,
                stream.column, stream.wide, stream.low_column, together, out,
            )  # fmt: skip
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        return Listed(*found)
    steps = np.rint((_side_by_side(z) - offset) * np.float32(inverse))
    if not (np.abs(steps) < REACH).all():
        raise ValueError("numbers that are not finite, or too large for this level")
    k = steps.astype(np.int32) + _halves(stream.shift)
    high = (k >> stream.shift) + MIDDLE
    near = np.clip(high, stream.first, stream.last)
    grouped = out.reshape(-1, out.shape[1], together).swapaxes(1, 2)
    lower = (k & ((1 << stream.shift.astype(np.int32)) - 1))[:, stream.wide]
    for column, x in ((stream.column, near), (stream.low_column, lower)):
        grouped[:, :, column] = x.reshape(-1, together, x.shape[1])
    places = np.flatnonzero(high != near)
    return Listed(places, (high - near).reshape(-1)[places])


def _pack_list(listed: Listed) -> bytes:
    """Values that their models have no symbol for: how many, where, and how far they are."""
    places = listed.places
    if not places.size:
        return b"\0"
    order = np.argsort(places)
    gaps = places[order]
    gaps[1:] -= gaps[:-1] + 1
    over = gamma.zigzag(listed.over[order].astype(np.int64))
    kinds = [np.min_scalar_type(int(x.max())) for x in (gaps, over)]
    packed = [x.astype(kind).tobytes() for x, kind in zip((gaps, over), kinds, strict=True)]
    return b"".join([gamma.varint(places.size), bytes(kind.itemsize for kind in kinds), *packed])


def _read_list(data: Bytes, size: int) -> tuple[Longs, Ints]:
    count, at = gamma.read_varint(data, 0)
    if not count:
        if data.size != 1:
            raise FormatError("bytes after an empty list")
        return np.zeros(0, np.int64), np.zeros(0, np.int32)
    widths = [int(x) for x in data[at : at + 2]]
    if count > size or widths not in WIDTHS or data.size != at + 2 + count * sum(widths):
        raise FormatError("a list that is cut short")
    gaps = np.frombuffer(data, f"<u{widths[0]}", count, at + 2).astype(np.int64)
    over = np.frombuffer(data, f"<u{widths[1]}", count, at + 2 + count * widths[0])
    places = np.cumsum(gaps + 1) - 1
    if gaps.min() < 0 or gaps.max() >= size or places[-1] >= size:
        raise FormatError("a list of places that are not there")
    return places, gamma.unzigzag(over.astype(np.int64)).astype(np.int32)


def decode_chunk(
    data: bytes, tokens: int, step: float, columns: Columns, heads: int
) -> tuple[Floats, Floats]:
    """Inverse of `encode_chunk`, but for the offsets: of keys and of values, float32 (heads, kept, tokens)."""
    symbols, listed = read_chunk(data, tokens, columns)
    out: tuple[list[Floats], list[Floats]] = ([], [])
    for part, together in parts(tokens):
        for z, stream, some in zip(out, columns.streams, listed, strict=True):
            if part.stop > part.start or not tokens:
                where = some.between(part.start, part.stop, stream.column.size)
                z.append(dequantise(symbols[part], step, stream, where, together, heads))
    keys, values = (z[0] if len(z) == 1 else np.concatenate(z, axis=2) for z in out)
    return keys, values


def read_chunk(data: bytes, tokens: int, columns: Columns) -> tuple[Bytes, list[Listed]]:
    """Symbols (tokens, columns) as they are coded, and what has none, of keys and of values."""
    packed, *streams = (np.frombuffer(part, np.uint8) for part in split(memoryview(data), 3))
    components = sum(columns.sizes)
    places, over = _read_list(packed, tokens * components)
    symbols = np.empty((tokens, columns.classes.size), np.uint8)
    for (part, together), stream in zip(parts(tokens), streams, strict=True):
        ids = columns.classes if together == 1 else columns.repeated
        classes_known().decode(stream, symbols[part].reshape(-1, ids.size), ids, 1)
    token, (count, other) = places // components, columns.sizes
    keys = places - token * components < count
    return symbols, [
        Listed((places - token * other)[keys], over[keys]),
        Listed((places - (token + 1) * count)[~keys], over[~keys]),
    ]


def dequantise(
    symbols: Bytes, step: float, stream: Stream, listed: Listed, together: int, heads: int
) -> Floats:
    """Components of tokens that lie so many together, float32 (heads, kept, tokens)."""
    places, over = listed.places, listed.over
    tokens, kept = len(symbols), stream.column.size // heads
    core = native.core()
    if core is not None:
        out = np.empty((heads, kept, tokens), np.float32)
        core.cachegen_dequantise(
            symbols, step, stream.shift, stream.pull, stream.column, stream.wide,
            stream.low_column, places, over, together, out,
        )  # fmt: skip
        return out
    grouped = symbols.reshape(-1, symbols.shape[1], together).swapaxes(1, 2)
    columns = grouped.reshape(tokens, symbols.shape[1])
    k = (columns[:, stream.column].astype(np.float32) - MIDDLE) * stream.scale
    k[:, stream.wide] += columns[:, stream.low_column] - np.float32(0.5) * stream.scale[stream.wide]
    token, component = np.divmod(places, stream.column.size)
    k[token, component] += over.astype(np.float32) * stream.scale[component]
    k -= np.sign(k) * stream.pull
    k *= np.float32(step)
    return k.T.reshape(heads, kept, tokens)
