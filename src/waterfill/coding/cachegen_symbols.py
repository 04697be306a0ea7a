"""Components of a layer as columns of symbols: what one level of a stored cache codes, and how.

A component is a whole number of steps. Its lower bits, where it has many, are a column of their own, so
that no symbol is above 31; columns of like spread share a model (`waterfill.coding.classes`). What a
model has no symbol for is put in a list. One rANS stream holds all columns of a chunk of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma, rans
from waterfill.coding.classes import choose_classes, pack_classes, read_classes
from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.models import Alphabet, fit, read_models
from waterfill.coding.sections import join, split
from waterfill.types import Floats, FormatError

__all__ = ["Columns", "decode_chunk", "encode_chunk", "fit_columns", "pack_columns", "read_columns"]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]

SYMBOLS, MIDDLE = 32, 16
ALPHABET = Alphabet(-MIDDLE, SYMBOLS, False)
MAX_SHIFT = 5
RARE = 1e-3  # share of a component's values that may lie beyond its symbols
DEAD = 0.1  # a value so many steps above a border is still rounded towards zero, where zero is frequent
PULL = 256  # parts of a step that points are moved towards zero by
REACH = 1 << 30


@dataclass(frozen=True, eq=False)
class Columns:
    """How a level codes the components of a layer.

    Attributes
    ----------
    shifts : uint8 (components,), bits of each that are a column of their own
    classes : uint8 (components,), model of the rest
    freqs : uint16 (models, 32)
    pulls : uint8 (models,), parts of a step that points other than zero are moved towards it
    packed : the models as a file has them
    """

    shifts: Bytes
    classes: Bytes
    freqs: NDArray[np.uint16]
    pulls: Bytes
    packed: bytes

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Components in the order of their columns: those of a class side by side."""
        return np.argsort(self.classes, kind="stable")

    @cached_property
    def low(self) -> NDArray[np.int64]:
        """Components that have a second column, in the order of these, which follow all first ones."""
        wide = np.flatnonzero(self.shifts)
        return wide[np.argsort(self.shifts[wide], kind="stable")]

    @cached_property
    def models(self) -> tuple[Bytes, NDArray[np.uint16]]:
        """Class of each column, and frequencies of all classes: plain bits have classes of their own."""
        widths = np.unique(self.shifts[self.low])
        plain = np.zeros((widths.size, SYMBOLS), np.uint16)
        for row, width in zip(plain, widths.tolist(), strict=True):
            row[: 1 << width] = rans.TOTAL >> width
        ids = len(self.freqs) + np.searchsorted(widths, self.shifts[self.low])
        return (
            np.concatenate([self.classes[self.order], ids.astype(np.uint8)]),
            np.concatenate([self.freqs, plain]),
        )

    @cached_property
    def ends(self) -> tuple[Ints, Ints]:
        """First and last symbol that each component's model has."""
        has = self.freqs > 0
        first, last = has.argmax(axis=1), SYMBOLS - 1 - has[:, ::-1].argmax(axis=1)
        return first[self.classes].astype(np.int32), last[self.classes].astype(np.int32)


def whole_steps(z: Floats, step: float) -> Ints:
    """Components (tokens, components) as whole numbers of steps."""
    steps = z * np.float32(1 / step)
    size = np.minimum(np.abs(steps), REACH)
    size += np.float32(0.5 - DEAD)
    np.floor(size, out=size)
    # Far from zero there is nothing to gain from rounding towards it.
    np.copyto(size, np.rint(np.abs(np.clip(steps, -REACH, REACH))), where=size > 2)
    return np.copysign(size, steps).astype(np.int32)


def fit_columns(sample: Floats, step: float) -> Columns:
    """Columns for components like a sample, float32 (tokens, components)."""
    k = whole_steps(sample, step)
    shifts = _shifts(k)
    high = k >> shifts
    symbols = (np.clip(high, -MIDDLE, MIDDLE - 1) + MIDDLE).astype(np.uint8)
    ids = choose_classes(high, symbols, ALPHABET)
    if ids is None:
        ids = np.zeros(k.shape[1], np.uint8)
    # Points of a class are moved together, so bits of their own and moved points do not mix.
    count = int(ids.max()) + 1
    counts = rans.histogram(symbols, ids, count)[:, :SYMBOLS]
    models = fit(_filled(counts), ALPHABET)
    pulls = _pulls(sample / np.float32(step), k, ids, count)
    return Columns(shifts, ids, models.freqs, pulls, models.data)


def _shifts(k: Ints) -> Bytes:
    """Least bits to take away from each component that leave few values beyond the symbols."""
    size = np.abs(k)
    shifts = np.zeros(k.shape[1], np.uint8)
    for shift in range(MAX_SHIFT):
        beyond = (size >> shift >= MIDDLE).mean(axis=0) > RARE
        shifts[beyond] = shift + 1
    return shifts


def _filled(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts without gaps: all symbols between the first and the last that occur may come."""
    inside = (np.cumsum(counts, axis=1) > 0) & (np.cumsum(counts[:, ::-1], axis=1) > 0)[:, ::-1]
    return np.maximum(counts, inside)


def _pulls(steps: Floats, k: Ints, ids: Bytes, count: int) -> Bytes:
    """How far the values of each class lie nearer to zero than their points, on average."""
    gap = np.where(k == 0, 0.0, np.abs(k) - np.abs(steps))
    total = np.bincount(ids, gap.sum(axis=0), count)
    number = np.bincount(ids, np.count_nonzero(k, axis=0), count)
    pull = np.rint(PULL * total / np.maximum(number, 1))
    found: Bytes = np.clip(pull, 0, PULL // 2).astype(np.uint8)
    return found


def pack_columns(columns: Columns) -> bytes:
    """Columns as bytes."""
    packed = pack_classes(columns.classes, len(columns.freqs))
    shifts = encode_ints(columns.shifts[None].astype(np.int32), None)
    return join([shifts, packed, columns.pulls.tobytes() + columns.packed])


def read_columns(data: bytes, components: int) -> Columns:
    """Inverse of `pack_columns`; FormatError on bytes that lie."""
    shifts, packed, rest = (np.frombuffer(part, np.uint8) for part in split(data, 3))
    wide = decode_ints(shifts, 1, components)[0]
    if wide.min() < 0 or wide.max() > MAX_SHIFT:
        raise FormatError("a component of too many bits")
    classes, count, at = read_classes(packed, 0, components)
    if at != packed.size or count + MAX_SHIFT > rans.MAX_ALPHABET or rest.size < count:
        raise FormatError("classes of components that are not as specified")
    freqs, at = read_models(rest, count, count, SYMBOLS, ALPHABET)
    if at != rest.size:
        raise FormatError("bytes after the models")
    return Columns(wide.astype(np.uint8), classes, freqs, rest[:count], rest[count:].tobytes())


def encode_chunk(z: Floats, step: float, columns: Columns) -> bytes:
    """Components of a chunk, float32 (tokens, components), at a level."""
    k = whole_steps(z, step)
    high = k >> columns.shifts
    first, last = columns.ends
    found = high + MIDDLE
    near = np.clip(found, first, last)
    symbols = np.concatenate(
        [near[:, columns.order], (k & ((1 << columns.shifts) - 1))[:, columns.low]], axis=1
    ).astype(np.uint8)
    ids, freqs = columns.models
    lanes = min(rans.choose_lanes(symbols.size), 1 << (symbols.shape[1] - 1).bit_length())
    return join([_pack_list(found, near), rans.encode(symbols, ids, freqs, lanes, 1)])


def _pack_list(found: Ints, near: Ints) -> bytes:
    """Values that their models have no symbol for: how many, where, and how far they are."""
    places = np.flatnonzero(found != near)
    if not places.size:
        return b"\0"
    gaps = np.diff(places, prepend=-1) - 1
    over = gamma.zigzag((found - near).reshape(-1)[places].astype(np.int64))
    orders = [gamma.best_order(x)[0] for x in (gaps, over)]
    return b"".join(
        [gamma.varint(places.size), bytes(orders), gamma.pack(gaps, orders[0]), gamma.pack(over, orders[1])]
    )  # fmt: skip


def _read_list(data: Bytes, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    count, at = gamma.read_varint(data, 0)
    if not count:
        if data.size != 1:
            raise FormatError("bytes after an empty list")
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if count > size or count > 8 * data.size or at + 2 > data.size:
        raise FormatError("a list that is cut short")
    orders = [int(x) for x in data[at : at + 2]]
    if max(orders) > gamma.MAX_ORDER:
        raise FormatError("a list in a code that is unknown")
    gaps, at = gamma.unpack(data, at + 2, count, orders[0])
    over, at = gamma.unpack(data, at, count, orders[1])
    places = np.cumsum(gaps + 1) - 1
    if at != data.size or places[-1] >= size or over.max() > 1 << 33:
        raise FormatError("a list of places that are not there")
    return places, gamma.unzigzag(over)


def decode_chunk(data: bytes, tokens: int, step: float, columns: Columns) -> Floats:
    """Inverse of `encode_chunk`: components, float32 (tokens, components)."""
    listed, stream = (np.frombuffer(part, np.uint8) for part in split(data, 2))
    components = columns.shifts.size
    places, over = _read_list(listed, tokens * components)
    ids, freqs = columns.models
    symbols = rans.decode(stream, tokens, ids.size, ids, freqs, 1)
    k = np.empty((tokens, components), np.float32)
    k[:, columns.order] = symbols[:, :components]
    k -= MIDDLE
    k.reshape(-1)[places] += over.astype(np.float32)
    k *= np.ldexp(np.float32(1), columns.shifts.astype(np.int32))
    k[:, columns.low] += symbols[:, components:]
    k -= np.sign(k) * (columns.pulls[columns.classes].astype(np.float32) / PULL)
    k *= np.float32(step)
    return k
