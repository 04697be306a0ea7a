"""Streams of words (docs/format/lossless.md), and planes of version 1: short and slow."""

import zlib

import numpy as np
from reader_coding import Source, models, need, octets, rans, sections
from reader_huffman import huffman

EXPONENTS = {"F64": 11, "F32": 8, "F16": 5, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 5}


def top_bits(source, count, width):
    """Values of so many bits each, from the top of each byte."""
    return source.fixed(np.full(count, width)).astype("u8")


def low_bits(data, count, width):
    """Values of so many bits each, in a little-endian bit string."""
    bits = np.unpackbits(data.astype("u1"), bitorder="little")
    need(not bits[count * width :].any(), "padding of a plane")
    return bits[: count * width].reshape(count, width) @ (1 << np.arange(width))


def field(source, bits):
    """What symbols stand for, the values that escape, and the model (None: Huffman)."""
    kind, size, low = source.byte(), source.byte() + 1, source.varint()
    need(kind < 4 and low + size - (kind & 1) <= 1 << bits, "kind or reach of a field")
    table = None if kind & 2 else models(source, 1, size)
    values = top_bits(source, source.varint(), bits) if kind & 1 else []
    escape = size - 1 if kind & 1 else 256
    return low, size, escape, values, table


def split(source, n, width, dtype):
    bits, exponent = source.byte(), EXPONENTS.get(dtype, 0)
    known = range(exponent, min(exponent + 4, 8 * width)) if exponent else [0]
    need(bits in known, "bits of a field")
    rest_bits = 8 * width - bits
    count = -(-rest_bits // 8)
    widths = [rest_bits - 8 * (count - 1)] + [8] * (count - 1)
    kinds, planes = source.take(count), [None] * count
    need((kinds < 3).all(), "kind of a plane")
    for i in np.flatnonzero(kinds):
        if kinds[i] == 1:
            planes[i] = np.full(n, source.byte())
        else:
            planes[i] = octets(source.take(source.varint()).astype("u1").tobytes(), n)
        need((planes[i] < 1 << widths[i]).all(), "a byte beyond a plane's bits")
    coded = field(source, bits) if bits else None
    for i in np.flatnonzero(kinds == 0):
        planes[i] = low_bits(source.take(-(-n * widths[i] // 8)), n, widths[i])
    rest = sum(p.astype("u8") << np.uint64(8 * (count - 1 - i)) for i, p in enumerate(planes))
    if not bits:
        need(not len(source.data), "bytes after the planes")
        return rest
    low, size, escape, values, table = coded
    symbols = rans(source, 1, n, table)[0] if table is not None else huffman(source.data, n)
    need((symbols < size).all(), "a symbol that the field has not")
    value, away = symbols.astype("u8") + np.uint64(low), symbols == escape
    need(away.sum() == len(values), "number of escapes")
    value[away] = values
    below = np.uint64(rest_bits - 1)
    sign, mantissa = rest >> below, rest & ((np.uint64(1) << below) - np.uint64(1))
    return sign << np.uint64(8 * width - 1) | value << below | mantissa


def words(data, n, width, dtype, nested=False):
    """A stream of n words of so many bytes: unsigned integers."""
    source, kind_of_word = Source(data), f"<u{width}"
    if n == 0:
        need(not len(data), "bytes for no words")
        return np.zeros(0, kind_of_word)
    kind = source.byte()
    need(kind < 5 and not (nested and kind == 3), "kind of a stream")
    if kind == 2:
        return split(source, n, width, dtype).astype(kind_of_word)
    if kind == 3:
        out = np.full(n, int(source.take(1, kind_of_word).astype(kind_of_word)[0]), kind_of_word)
        mask = octets(source.take(source.varint()).astype("u1").tobytes(), -(-n // 8))
        away = np.unpackbits(mask)
        need(not away[n:].any(), "padding of a mask")
        away = away[:n].astype(bool)
        out[away] = words(source.data, int(away.sum()), width, dtype, True)
        return out
    raw = bytes(source.data)
    if kind == 4:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(raw, n * width + 1)
        need(inflater.eof and not inflater.unused_data, "end of a zlib stream")
    if kind == 1:
        need(len(raw) == width, "length of a constant")
        raw *= n
    need(len(raw) == n * width, "length of words")
    return np.frombuffer(raw, kind_of_word)


def planes(data, n, width, dtype):
    """Version 1."""
    cut = [octets(plane, n) for plane in sections(data, width)]
    joined = np.stack(cut[::-1], axis=1).reshape(-1).view(f"<u{width}")
    if dtype in ("F64", "F32", "F16", "BF16"):
        joined = joined >> joined.dtype.type(1) | joined << joined.dtype.type(8 * width - 1)
    return joined
