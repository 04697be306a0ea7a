"""Huffman streams (docs/format/huffman.md): short and slow."""

import numpy as np
from reader_coding import Source, need, unzigzag


def code_table(source):
    """From each code, with a one before it, to its byte."""
    first, last = source.take(2).tolist()
    need(first < last, "no range of symbols")
    u = source.unary(last - first + 1)
    need((u < 22).all(), "a step between code lengths")
    u, byte = u[u != 3], first + np.flatnonzero(u != 3)
    length = 8 + np.cumsum(unzigzag(u - (u > 3)))
    need(((length > 0) & (length < 12)).all(), "length of a code")
    need((2048 >> length).sum() == 2048, "codes that are not complete")
    table, end = {}, 0
    for bits, value in sorted(zip(length.tolist(), byte.tolist(), strict=True)):
        table[1 << bits | end >> (11 - bits)] = value
        end += 2048 >> bits
    return table


def segment(data, count, table):
    bits, at, out = np.unpackbits(data.astype("u1"), bitorder="little").tolist(), 0, []
    for _ in range(count):
        code = 1
        while code not in table:
            need(at < len(bits), "bits run out")
            code, at = code << 1 | bits[at], at + 1
        out.append(table[code])
    need(len(bits) - at < 8 and not any(bits[at:]), "bits left over")
    return out


def huffman(data, n):
    source, counts = Source(data), []
    if n == 0:
        need(not len(data), "bytes for no symbols")
        return np.zeros(0, "u1")
    table = code_table(source)
    for start in range(0, n, 65536):
        block = min(65536, n - start)
        each = -(-block // 5) if block >= 4096 else block
        counts += [min(each, block - at) for at in range(0, block, each)]
    sizes = source.take(len(counts) - 1, "<u2").tolist()
    parts = [segment(source.take(s), c, table) for s, c in zip(sizes, counts[:-1], strict=True)]
    parts.append(segment(source.take(len(source.data)), counts[-1], table))
    return np.concatenate(parts).astype("u1")
