"""Components of a layer as columns of symbols: what one level of a stored cache codes, and how.

A component is a whole number of steps. Its lower bits, where it has many, are a column of their own, so
that no symbol is above 31. Each component takes one of a bank of models that every reader knows, so a
model costs a byte or less. What a model has no symbol for is put in a list. One rANS stream holds all
columns of a chunk of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

    @cached_property
    def classes(self) -> tuple[Bytes, NDArray[np.uint16]]:
        """Class of each column, and frequencies of the classes: plain bits have classes of their own."""
        used, ids = np.unique(self.models, return_inverse=True)
        widths = np.unique(self.shifts[self.low])
        plain = np.zeros((widths.size, SYMBOLS), np.uint16)
        for row, width in zip(plain, widths.tolist(), strict=True):
            row[: 1 << width] = rans.TOTAL >> width
        lower = used.size + np.searchsorted(widths, self.shifts[self.low])
        table = np.concatenate([bank()[0][used], plain])
        return np.concatenate([ids[self.order], lower]).astype(np.uint8), table

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


def fit_columns(sample: Sequence[Floats], step: float) -> Columns:
    """Columns for components like a sample: of keys and of values, each float32 (heads, tokens, kept)."""
    steps = np.concatenate([_side_by_side(z) for z in sample], axis=1) * np.float32(1 / step)
    k = np.rint(np.clip(steps, -REACH, REACH)).astype(np.int32)
    shifts = _shifts(k)
    high = np.clip((k + _halves(shifts)) >> shifts, -MIDDLE, MIDDLE - 1) + MIDDLE
    ids = np.arange(high.shape[1]) * SYMBOLS
    counts = np.bincount((high + ids).reshape(-1), minlength=high.shape[1] * SYMBOLS)
    models = (counts.reshape(-1, SYMBOLS) @ bank()[1].T).argmin(axis=1).astype(np.uint8)
    sizes = sample[0].shape[0] * sample[0].shape[2], sample[1].shape[0] * sample[1].shape[2]
    return Columns(shifts, models, _pulls(steps, k, models), sizes)


def _side_by_side(z: Floats) -> Floats:
    """(heads, tokens, kept) as (tokens, heads * kept)."""
    return z.swapaxes(0, 1).reshape(z.shape[1], -1)


def _halves(shifts: Bytes) -> Ints:
    return (1 << shifts.astype(np.int32)) >> 1


def _shifts(k: Ints) -> Bytes:
    """Least bits to take away from each component that leave few values beyond the symbols."""
    size = np.abs(k)
    shifts = np.zeros(k.shape[1], np.uint8)
    for shift in range(MAX_SHIFT):
        shifts += (size >= MIDDLE << shift).mean(axis=0) > RARE
    return shifts


def _pulls(steps: Floats, k: Ints, models: Bytes) -> Bytes:
    """How far the values of each model lie nearer to zero than their points, on average."""
    ids = np.unique(models, return_inverse=True)[1]
    total = np.bincount(ids, np.where(k == 0, 0, np.abs(k) - np.abs(steps)).sum(axis=0))
    number = np.bincount(ids, np.count_nonzero(k, axis=0))
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
    z : of keys and of values, float32 (heads, tokens, kept)
    offsets : float32 (heads * kept,) of each, to be taken from their components

    Raises
    ------
    ValueError
        If a number is not finite, or a thousand million steps from zero.
    """
    tokens = z[0].shape[1]
    listed, streams = [], []
    for part, together in _parts(tokens):
        some = [x[:, part] for x in z]
        symbols, found = _to_symbols(some, offsets, step, columns, together)
        listed += [(part.start * sum(columns.sizes) + places, over) for places, over in found]
        streams.append(_encode(symbols, columns, together))
    return join([_pack_list(listed), *streams])


def _parts(tokens: int) -> tuple[tuple[slice, int], tuple[slice, int]]:
    """Tokens in whole groups, which a coder reads a column at a time, and what is left; and how many together."""
    body = tokens // TOGETHER * TOGETHER
    return (slice(0, body), TOGETHER), (slice(body, tokens), 1)


def _encode(symbols: Bytes, columns: Columns, together: int) -> bytes:
    """Symbols (tokens, columns), so many tokens of a column side by side."""
    ids, freqs = columns.classes
    matrix = symbols.reshape(-1, ids.size * together)
    lanes = min(TOGETHER, rans.choose_lanes(symbols.size))
    return rans.encode(matrix, np.repeat(ids, together), freqs, lanes, 1)


def _to_symbols(
    z: Sequence[Floats], offsets: Sequence[Floats], step: float, columns: Columns, together: int
) -> tuple[Bytes, list[tuple[Longs, Ints]]]:
    """Symbols (tokens, columns), and places (token * components + component) that have none."""
    symbols = np.empty((z[0].shape[1], columns.classes[0].size), np.uint8)
    listed, start = [], 0
    for one, offset, stream in zip(z, offsets, columns.streams, strict=True):
        count = stream.column.size
        places, over = _quantise(one, offset, step, stream, together, symbols)
        listed.append((places // count * sum(columns.sizes) + start + places % count, over))
        start += count
    return symbols, listed


def _quantise(
    z: Floats, offset: Floats, step: float, stream: Stream, together: int, out: Bytes
) -> tuple[Longs, Ints]:
    """Fill the columns of a stream; places (token * components + component) without a symbol, and how far."""
    core = native.core()
    inverse = float(np.float32(1 / step))
    if core is not None:
        try:
            found: tuple[Longs, Ints] = core.cachegen_quantise(
                np.ascontiguousarray(z), offset, inverse, stream.shift, stream.first, stream.last,
                stream.column, stream.wide, stream.low_column, together, out,
            )  # fmt: skip
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        return found
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
    return places, (high - near).reshape(-1)[places]


def _pack_list(listed: Sequence[tuple[Longs, Ints]]) -> bytes:
    """Values that their models have no symbol for: how many, where, and how far they are."""
    places = np.concatenate([places for places, _ in listed])
    if not places.size:
        return b"\0"
    order = np.argsort(places)
    gaps = np.diff(places[order], prepend=-1) - 1
    over = gamma.zigzag(np.concatenate([over for _, over in listed])[order].astype(np.int64))
    orders = [min(int(x.mean()).bit_length(), gamma.MAX_ORDER) for x in (gaps, over)]
    packed = [gamma.pack(x, n) for x, n in zip((gaps, over), orders, strict=True)]
    return b"".join([gamma.varint(places.size), bytes(orders), *packed])


def _read_list(data: Bytes, size: int) -> tuple[Longs, Ints]:
    count, at = gamma.read_varint(data, 0)
    if not count:
        if data.size != 1:
            raise FormatError("bytes after an empty list")
        return np.zeros(0, np.int64), np.zeros(0, np.int32)
    if count > size or count > 8 * data.size or at + 2 > data.size:
        raise FormatError("a list that is cut short")
    orders = [int(x) for x in data[at : at + 2]]
    if max(orders) > gamma.MAX_ORDER:
        raise FormatError("a list in a code that is unknown")
    gaps, at = gamma.unpack(data, at + 2, count, orders[0])
    over, at = gamma.unpack(data, at, count, orders[1])
    places = np.cumsum(gaps + 1) - 1
    if at != data.size or gaps.max() >= size or places[-1] >= size or over.max() > 2 * REACH:
        raise FormatError("a list of places that are not there")
    return places, gamma.unzigzag(over).astype(np.int32)


def decode_chunk(
    data: bytes, tokens: int, step: float, columns: Columns, heads: int
) -> tuple[Floats, Floats]:
    """Inverse of `encode_chunk`, but for the offsets: of keys and of values, float32 (heads, tokens, kept)."""
    listed, *coded = (np.frombuffer(part, np.uint8) for part in split(data, 3))
    components = sum(columns.sizes)
    places, over = _read_list(listed, tokens * components)
    ids, freqs = columns.classes
    out = [np.empty((heads, tokens, size // heads), np.float32) for size in columns.sizes]
    for (part, together), stream in zip(_parts(tokens), coded, strict=True):
        rows = (part.stop - part.start) // together
        classes = np.repeat(ids, together)
        symbols = rans.decode(stream, rows, classes.size, classes, freqs, 1).reshape(-1, ids.size)
        token, place = np.divmod(places - part.start * components, components)
        start = 0
        for z, one in zip(out, columns.streams, strict=True):
            count = one.column.size
            mine = (
                (token >= 0) & (token < len(symbols)) & (place >= start) & (place < start + count)
            )
            where = token[mine] * count + place[mine] - start
            z[:, part] = _dequantise(symbols, step, one, where, over[mine], together, heads)
            start += count
    return out[0], out[1]


def _dequantise(
    symbols: Bytes,
    step: float,
    stream: Stream,
    places: Longs,
    over: Ints,
    together: int,
    heads: int,
) -> Floats:
    """Components, float32 (heads, tokens, kept)."""
    tokens, kept = len(symbols), stream.column.size // heads
    core = native.core()
    if core is not None:
        out = np.empty((heads, tokens, kept), np.float32)
        core.cachegen_dequantise(
            symbols, step, stream.scale, stream.pull, stream.column, stream.wide,
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
    return k.reshape(tokens, heads, kept).swapaxes(0, 1)
