"""Words taken apart and put together in numpy alone: the native kernels' twin and stand-in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import huffman_numpy, packing, rans_numpy
from waterfill.coding.layout import Field, Layout, Planes
from waterfill.types import FormatError

Words = NDArray[Any]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Values = NDArray[np.uint32]
RUN = 4096


def values(words: Words, bits: int) -> Words:
    """The `bits` bits below the sign."""
    below = words.dtype.type(8 * words.itemsize - 1 - bits)
    field: Words = words >> below & words.dtype.type((1 << bits) - 1)
    return field


def _rest(words: Words, layout: Layout) -> Words:
    """Sign and mantissa side by side; the words themselves where there is no field."""
    if not layout.field_bits:
        return words
    kind = words.dtype.type
    below, top = layout.rest_bits - 1, 8 * layout.width - 1
    rest: Words = words & kind((1 << below) - 1) | words >> kind(top) << kind(below)
    return rest


def count(words: Words, bits: int, step: int) -> Ints:
    """As `waterfill.coding.words.count`."""
    counts = np.zeros(1 << bits, np.int64)
    for first in range(0, words.size, step * RUN):
        part = values(words[first : first + RUN], bits)
        counts += np.bincount(part.astype(np.int64), minlength=counts.size)
    return counts


def plane(words: Words, layout: Layout, which: int) -> Bytes:
    """As `waterfill.coding.words.plane`."""
    shift = words.dtype.type(8 * (layout.planes - 1 - which))
    out: Bytes = (_rest(words, layout) >> shift).astype(np.uint8)
    return out


def symbols(words: Words, layout: Layout, field: Field) -> Bytes:
    """Symbol of each word's field; `field.direct` for values outside."""
    place = values(words, layout.field_bits).astype(np.int64) - field.low
    place[(place < 0) | (place >= field.direct)] = field.direct
    return place.astype(np.uint8)


def encode_field(words: Words, layout: Layout, field: Field, lanes: int) -> tuple[bytes, Values]:
    """The field's rANS stream, and the values that escaped."""
    if field.freqs is None:
        raise ValueError("words: a model, please")
    coded = symbols(words, layout, field)
    away = coded == field.direct
    if away.any() and not field.escape:
        raise ValueError("words: a symbol that the model does not know")
    escaped = values(words[away], layout.field_bits).astype(np.uint32)
    return rans_numpy.encode(coded[None], None, field.freqs[None], lanes), escaped


def assemble(
    head: bytes, words: Words, layout: Layout, stored: Sequence[int], stream: bytes
) -> bytes:
    """As `waterfill.coding.words.assemble`."""
    parts = [head]
    for which in stored:
        width = 8 if which else layout.first_bits
        parts.append(packing.pack(plane(words, layout, which), width))
    return b"".join([*parts, stream])


def join(planes: Planes, layout: Layout, out: Words, packed: bool) -> None:
    """As `waterfill.coding.words.join`."""
    out[:] = _joined(planes, layout, out, packed)


def join_coded(
    stream: Bytes, field: Field, escaped: Values, planes: Planes, layout: Layout, out: Words,
    packed: bool,
) -> None:  # fmt: skip
    """As `waterfill.coding.words.join_coded`."""
    coded = np.empty((1, out.size), np.uint8)
    if field.freqs is None:
        huffman_numpy.decode(stream, coded[0])
    else:
        rans_numpy.decode(stream, coded, None, field.freqs[None])
    value = coded[0].astype(np.int64) + field.low
    away = np.flatnonzero(coded[0] == field.direct) if field.escape else np.zeros(0, np.int64)
    if away.size != escaped.size:
        raise FormatError("words: escapes and their values differ in number")
    value[away] = escaped
    kind = out.dtype.type
    below, top = layout.rest_bits - 1, 8 * layout.width - 1
    rest = _joined(planes, layout, out, packed)
    mantissa, sign = rest & kind((1 << below) - 1), rest >> kind(below) << kind(top)
    out[:] = value.astype(out.dtype) << kind(below) | mantissa | sign


def _joined(planes: Planes, layout: Layout, out: Words, packed: bool) -> Words:
    rest = np.zeros(out.size, out.dtype)
    for which, one in enumerate(planes):
        shift = out.dtype.type(8 * (layout.planes - 1 - which))
        if isinstance(one, int):
            rest |= out.dtype.type(one) << shift
            continue
        need = layout.plane_nbytes(which, out.size) if packed else out.size
        if one.size != need:
            raise FormatError(f"words: a plane of {one.size} bytes where {need} belong")
        narrow = packed and which == 0 and layout.first_bits < 8
        one = packing.unpack(one.tobytes(), out.size, layout.first_bits) if narrow else one
        rest |= one.astype(out.dtype) << shift
    return rest
