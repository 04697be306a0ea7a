"""Words of a tensor as a field that is coded and planes of bytes that are kept.

A word of w bytes is [sign][field][mantissa]: the field is the exponent and perhaps the first mantissa
bits, which is where weights have structure. Sign and mantissa side by side are the *rest*, cut into
planes of a byte from the bottom, so that the first plane may be narrower; it is stored bit by bit.
Words without a field (integers) are all rest. ``docs/format/lossless.md`` has the layout.

Words are unsigned integers here, (n,), contiguous. The numpy twin of each function is in
`waterfill.coding.words_numpy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import huffman, native, rans, words_numpy
from waterfill.coding.layout import Field, Layout, Planes
from waterfill.types import FormatError

__all__ = ["Encoded", "assemble", "count", "join", "join_coded", "plane"]

Words = NDArray[Any]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Values = NDArray[np.uint32]


def count(words: Words, bits: int, step: int = 1) -> Ints:
    """Occurrences of each value of the field of `bits` bits, in every `step`-th run of 4096 words."""
    core = native.core()
    if core is None:
        return words_numpy.count(words, bits, step)
    counts = np.zeros(1 << bits, np.int64)
    core.words_count(words.view(np.uint8), words.itemsize, bits, step, counts)
    return counts


def plane(words: Words, layout: Layout, which: int, threads: int | None = None) -> Bytes:
    """One plane, a byte for each word: uint8 (n,)."""
    core = native.core()
    if core is None:
        return words_numpy.plane(words, layout, which)
    out = np.empty(words.size, np.uint8)
    threads = threads or native.threads()
    source = words.view(np.uint8)
    core.words_split(source, layout.field_bits, layout.width, 0, 0, which, out, threads)
    return out


class Encoded:
    """A field's stream that waits for `assemble`, and the values that escaped, in order.

    Parameters
    ----------
    words, layout : what is coded
    field : its model must know every symbol that occurs
    counts : int64 (256,), occurrences that a Huffman code is made for
    """

    def __init__(
        self, words: Words, layout: Layout, field: Field, counts: Ints, threads: int | None = None
    ) -> None:
        core = native.core()
        lanes = rans.choose_lanes(words.size)
        self.native, self.stream = None, b""
        if field.freqs is None:
            symbols = _symbols(words, layout, field, threads)
            places = rans.find(symbols, field.direct) if field.escape else np.zeros(0, np.int64)
            self.escaped = words_numpy.values(words[places], layout.field_bits).astype(np.uint32)
            self.stream = huffman.encode(symbols, counts, threads)
        elif core is None:
            self.stream, self.escaped = words_numpy.encode_field(words, layout, field, lanes)
        else:
            self.native = core.words_encode_field(
                words.view(np.uint8), layout.field_bits, layout.width, field.low, field.direct,
                field.escape, field.freqs, lanes, threads or native.threads(),
            )  # fmt: skip
            self.escaped = self.native.escaped()
        self.nbytes = self.native.nbytes if self.native else len(self.stream)


def _symbols(words: Words, layout: Layout, field: Field, threads: int | None) -> Bytes:
    core = native.core()
    if core is None:
        return words_numpy.symbols(words, layout, field)
    out = np.empty(words.size, np.uint8)
    core.words_split(
        words.view(np.uint8), layout.field_bits, layout.width, field.low, field.direct, -1, out,
        threads or native.threads(),
    )  # fmt: skip
    return out


def assemble(
    head: bytes,
    words: Words,
    layout: Layout,
    stored: Sequence[int],
    field: Encoded | None,
    threads: int | None = None,
) -> bytes:
    """`head`, the planes named as stored, and the field's stream (which is used up), written once."""
    core = native.core()
    if core is None:
        return words_numpy.assemble(head, words, layout, stored, field.stream if field else b"")
    coded: bytes = core.words_assemble(
        head, words.view(np.uint8), layout.field_bits, layout.width, list(stored),
        field.native if field else None, threads or native.threads(),
    )  # fmt: skip
    return coded + field.stream if field and field.stream else coded


def join(
    planes: Planes, layout: Layout, out: Words, packed: bool = False, threads: int | None = None
) -> None:
    """Fill words without a field from their planes: bytes, or a number where all are alike."""
    core = native.core()
    if core is None:
        words_numpy.join(planes, layout, out, packed)
        return
    arrays, fixed = _split_fixed(planes)
    try:
        core.words_join(
            arrays, packed, fixed, out.view(np.uint8), layout.width, threads or native.threads()
        )
    except RuntimeError as error:
        raise FormatError(str(error)) from None


def join_coded(
    stream: Bytes,
    field: Field,
    escaped: Values,
    planes: Planes,
    layout: Layout,
    out: Words,
    packed: bool = True,
    threads: int | None = None,
) -> None:
    """Fill words from their planes and the stream of their field, tile by tile.

    Parameters
    ----------
    stream : uint8 (nbytes,)
    field, escaped : what symbols mean; values that have no symbol, in order
    planes : for each plane its bytes, or the number that all of them are
    layout : its field has at least one bit
    out : unsigned words (n,), n at least 1, contiguous; left half-filled where an error is raised
    packed : whether the first plane is stored bit by bit

    Raises
    ------
    FormatError
        On a stream that no encoder wrote, planes of a wrong size, or escapes of another number.
    """
    core = native.core()
    if core is None:
        words_numpy.join_coded(stream, field, escaped, planes, layout, out, packed)
        return
    arrays, fixed = _split_fixed(planes)
    try:
        core.words_join_coded(
            stream, field.freqs, layout.field_bits, field.low,
            field.direct if field.escape else 256, escaped,
            arrays, packed, fixed, out.view(np.uint8), layout.width, threads or native.threads(),
        )  # fmt: skip
    except RuntimeError as error:
        raise FormatError(str(error)) from None


def _split_fixed(planes: Planes) -> tuple[list[Bytes | None], int]:
    fixed = 0
    for one in planes:
        fixed = fixed << 8 | (one if isinstance(one, int) else 0)
    return [None if isinstance(one, int) else one for one in planes], fixed
