"""Words as a field under an entropy coder and planes of the rest: the kind of stream called `split`.

Which exponents (and mantissa bits) become symbols, which coder writes them, and which planes are
worth coding: all chosen here by counting, on a sample of a large tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma, huffman, rans, words
from waterfill.coding.alphabets import RARE
from waterfill.coding.entropy import decode_bytes, encode_bytes
from waterfill.coding.layout import Field, Layout
from waterfill.coding.models import fit, read_models
from waterfill.types import FormatError

__all__ = ["CODERS", "EXPONENT_BITS", "decode", "encode", "probe"]

Words = NDArray[Any]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

PLANE_STORED, PLANE_CONSTANT, PLANE_CODED = 0, 1, 2
ESCAPE, HUFFMAN = 1, 2  # of a field
CODERS = ("auto", "rans", "huffman")
EXPONENT_BITS: Mapping[str, int] = {
    "F64": 11, "F32": 8, "F16": 5, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 5,
}  # fmt: skip
MANTISSA_BITS = 3  # of a field at most: further ones are as good as random
# A field of up to 32 symbols decodes several times faster: worth so much of all bits.
TOLERANCE = 1.0025
SAMPLE = 1 << 20  # words whose fields are counted, of a larger tensor
PROBE = 1 << 16  # words looked at to decide what is worth a try
PLANE_GAIN = 0.005  # of a word's bits that coding a plane must save to be worth its time


def encode(head: bytes, source: Words, dtype: str, coder: str, threads: int | None) -> bytes:
    """`head`, then words as of `waterfill.coding.lossless.encode`."""
    exponent = EXPONENT_BITS.get(dtype, 0)
    bits, field, counts = _choose_field(source, exponent) if exponent else (0, None, None)
    layout = Layout(source.itemsize, bits)
    kinds, described = bytearray(), b""
    stored = []
    for which in range(layout.planes):
        coded, kind = _encode_plane(source, layout, which, threads)
        kinds.append(kind)
        described += coded
        stored += [which] if kind == PLANE_STORED else []
    head += bytes([layout.field_bits, *kinds]) + described
    if field is None or counts is None:
        return words.assemble(head, source, layout, stored, None, threads)
    described, stream = _encode_field(source, layout, field, counts, coder, threads)
    return words.assemble(head + described, source, layout, stored, stream, threads)


def decode(source: Bytes, out: Words, dtype: str, threads: int | None) -> None:
    """Inverse of `encode`, from behind its head; FormatError on bytes that lie."""
    bits = int(source[0]) if source.size else 255
    exponent = EXPONENT_BITS.get(dtype, 0)
    if not (bits == 0 or exponent <= bits <= exponent + MANTISSA_BITS) or bool(bits) != bool(exponent):  # fmt: skip
        raise FormatError(f"a field of {bits} bits in {dtype}")
    if bits >= 8 * out.itemsize:
        raise FormatError(f"a field of {bits} bits leaves nothing of {dtype}")
    layout = Layout(out.itemsize, bits)
    planes, at = _read_planes(source, 1, layout, out.size, threads)
    field = None
    if bits:
        field, escaped, at = _read_field(source, at, layout, out.size)
    ready: list[Bytes | int] = []
    for which, one in enumerate(planes):
        if one is None:
            nbytes = layout.plane_nbytes(which, out.size)
            if nbytes > source.size - at:
                raise FormatError("a stored plane is cut short")
            one, at = source[at : at + nbytes], at + nbytes
        ready.append(one)
    packed = int(source[1]) == PLANE_STORED
    if field is not None:
        if field.freqs is None and (source.size < at + 2 or int(source[at + 1]) >= field.size):
            raise FormatError("a Huffman code for more symbols than the field has")
        words.join_coded(source[at:], field, escaped, ready, layout, out, packed, threads)
    elif at != source.size:
        raise FormatError("bytes left over after the planes")
    else:
        words.join(ready, layout, out, packed, threads)


def _choose_field(source: Words, exponent: int) -> tuple[int, Field, Ints]:
    """How many bits the field has, what its symbols mean, and about how often each occurs."""
    most = min(exponent + MANTISSA_BITS, 8 * source.itemsize - 1)
    step = max(1, source.size // SAMPLE)
    table = words.count(source, most, step)
    total = int(table.sum())
    options = []
    for bits in range(most, exponent - 1, -1):
        for size in (rans.FAST_ALPHABET, rans.MAX_ALPHABET):
            some, low, escape = _window(table, total, size, step > 1)
            estimate = _entropy_bits(some) + (int(some[-1]) * bits if escape else 0)
            estimate += 8 * some.size / step + total * (8 * source.itemsize - bits)
            handicap = 1.0 if some.size <= rans.FAST_ALPHABET else TOLERANCE
            options.append((handicap * estimate, bits, size, low, escape, some))
        table = table[0::2] + table[1::2]
    _, bits, _, low, escape, some = min(options, key=lambda option: option[:3])
    return bits, Field(low, some.size, escape, fit(some[None]).freqs[0]), some


def _encode_field(
    source: Words, layout: Layout, field: Field, counts: Ints, coder: str, threads: int | None
) -> tuple[bytes, words.Encoded]:
    """What the head says of a field, and its stream, by the coder named or that of fewer bytes."""
    padded = np.zeros(256, np.int64)
    padded[: counts.size] = counts

    def coded(chosen: Field) -> tuple[bytes, words.Encoded]:
        stream = words.Encoded(source, layout, chosen, padded, threads)
        return _pack_field(chosen, layout, stream.escaped), stream

    def nbytes(option: tuple[bytes, words.Encoded]) -> int:
        return len(option[0]) + option[1].nbytes

    several = np.count_nonzero(counts) > 1  # or there is no Huffman code
    if coder == "huffman" and several:
        return coded(replace(field, freqs=None))
    first = coded(field)
    if coder == "rans" or not several:
        return first
    estimate = huffman.size_bits(padded) / 8 * (source.size / counts.sum())
    if estimate >= nbytes(first):
        return first
    return min(first, coded(replace(field, freqs=None)), key=nbytes)


def _window(table: Ints, total: int, size: int, sampled: bool) -> tuple[Ints, int, bool]:
    """Counts of the symbols of at most `size`: a run of neighbouring values, then the escape if any.

    Values in a sample are not all there are: then there is an escape in any case.
    """
    if not sampled:
        present = np.flatnonzero(table)
        if present[-1] - present[0] < size:
            return table[present[0] : present[-1] + 1], int(present[0]), False
    common = np.flatnonzero(table > total // RARE)
    low, last = int(common[0]), int(common[-1])
    if last - low >= size - 1:
        sums = np.concatenate([[0], np.cumsum(table)])
        low = int(np.argmax(sums[size - 1 :] - sums[: -(size - 1)]))
        last = low + size - 2
    inside = table[low : last + 1]
    if sampled:
        inside = np.maximum(inside, 1)
    rest = total - int(table[low : last + 1].sum())
    return np.append(inside, max(rest, 1)), low, True


def _entropy_bits(counts: Ints) -> float:
    some = counts[counts > 0]
    return float(-(some * np.log2(some / some.sum())).sum())


def _pack_field(field: Field, layout: Layout, escaped: NDArray[np.uint32]) -> bytes:
    kind = (ESCAPE if field.escape else 0) | (HUFFMAN if field.freqs is None else 0)
    head = bytes([kind, field.size - 1]) + gamma.varint(field.low)
    if field.freqs is not None:
        head += fit(field.freqs[None].astype(np.int64)).data
    if field.escape:
        packed = gamma.pack_fixed(
            escaped.astype(np.int64), np.full(escaped.size, layout.field_bits)
        )
        head += gamma.varint(escaped.size) + packed
    return head


def _read_field(
    source: Bytes, at: int, layout: Layout, count: int
) -> tuple[Field, NDArray[np.uint32], int]:
    """What a field's symbols mean, the values that escaped, and where that ends."""
    kind = int(source[at]) if at + 2 <= source.size else 255
    if kind & ~(ESCAPE | HUFFMAN):
        raise FormatError("a field of an unknown kind, or cut short")
    escape, size = kind & ESCAPE, int(source[at + 1]) + 1
    low, at = gamma.read_varint(source, at + 2)
    if low + size - escape > 1 << layout.field_bits:
        raise FormatError(f"values beyond a field of {layout.field_bits} bits")
    freqs, n = None, 0
    if not kind & HUFFMAN:
        table, at = read_models(source, at, 1, size)
        freqs = table[0]
    if escape:
        n, at = gamma.read_varint(source, at)
        if n > count or n * layout.field_bits > 8 * (source.size - at):
            raise FormatError("escaped values are cut short")
    values, at = gamma.unpack_fixed(source, at, np.full(n, layout.field_bits))
    return Field(low, size, bool(escape), freqs), values.astype(np.uint32), at


def _encode_plane(source: Words, layout: Layout, which: int, threads: int | None) -> tuple[bytes, int]:  # fmt: skip
    """What the head says of a plane, and its kind."""
    some = words.plane(probe(source), layout, which)
    counts = rans.histogram(some)[0]
    width = layout.first_bits if which == 0 else 8
    if counts.max() == some.size:
        whole = words.plane(source, layout, which, threads)
        if (whole == some[0]).all():
            return bytes([some[0]]), PLANE_CONSTANT
    gain = width - _entropy_bits(counts) / some.size
    if gain < PLANE_GAIN * 8 * source.itemsize:
        return b"", PLANE_STORED
    coded = encode_bytes(words.plane(source, layout, which, threads), threads)
    coded = gamma.varint(len(coded)) + coded
    if len(coded) >= layout.plane_nbytes(which, source.size):
        return b"", PLANE_STORED
    return coded, PLANE_CODED


def _read_planes(
    source: Bytes, at: int, layout: Layout, count: int, threads: int | None
) -> tuple[list[Bytes | int | None], int]:
    """Planes as far as the head has them (None: stored), and where it ends."""
    kinds = source[at : at + layout.planes]
    if kinds.size < layout.planes:
        raise FormatError("kinds of planes are cut short")
    at += layout.planes
    planes: list[Bytes | int | None] = []
    for which, kind in enumerate(kinds):
        if kind == PLANE_STORED:
            planes.append(None)
        elif kind == PLANE_CONSTANT:
            if at >= source.size or source[at] >> (layout.first_bits if which == 0 else 8):
                raise FormatError("a constant plane is cut short, or beyond its bits")
            planes.append(int(source[at]))
            at += 1
        elif kind == PLANE_CODED:
            length, at = gamma.read_varint(source, at)
            if length > source.size - at:
                raise FormatError("a coded plane is cut short")
            one = decode_bytes(source[at : at + length], count, threads)
            if which == 0 and layout.first_bits < 8 and (one >> layout.first_bits).any():
                raise FormatError("a plane has values beyond its bits")
            planes.append(one)
            at += length
        else:
            raise FormatError(f"a plane of an unknown kind {kind}")
    return planes, at


def probe(source: Words) -> Words:
    """Runs of words spread over all of them, at most about `PROBE`."""
    if source.size <= PROBE:
        return source
    run = 1024
    starts = np.linspace(0, source.size - run, PROBE // run).astype(np.int64)
    return np.concatenate([source[s : s + run] for s in starts])
