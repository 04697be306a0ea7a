"""Classes of columns: which columns of a matrix of integers share one model.

Columns of a weight matrix in the units of its quantiser differ in scale by orders of magnitude
(each is worth what its input's energy is). Grouping them by magnitude is nearly as good as a model
for each, at the price of a few bits a column.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma, rans
from waterfill.coding.models import Alphabet, fit, read_models
from waterfill.types import FormatError

__all__ = ["MAX_CLASSES", "choose_classes", "pack_classes", "read_classes"]

MAX_CLASSES = 64
PER_OCTAVE = 4
PACKED, CODED = 0, 1

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def choose_classes(values: NDArray[Any], symbols: Bytes, alphabet: Alphabet) -> Bytes | None:
    """Class of each column, ordered by magnitude; None where one class is cheapest.

    Columns start in classes a quarter of an octave of mean magnitude wide; neighbours merge, the
    pair that saves most bytes first, for as long as any saves.
    """
    rows, cols = values.shape
    if cols < 2 or rows < 4:
        return None
    total = np.zeros(cols, np.float64)
    step = max(1, (1 << 20) // cols)
    for row in range(0, rows, step):
        total += np.abs(values[row : row + step].astype(np.float32)).sum(axis=0, dtype=np.float64)
    level = np.log2(total / rows + 1.0 / rows) * PER_OCTAVE
    level = np.round(level - level.min())
    if level.max() >= MAX_CLASSES:
        level = np.floor(level * (MAX_CLASSES / (level.max() + 1)))
    ids = np.unique(level, return_inverse=True)[1].astype(np.uint8)
    n_classes = int(ids.max()) + 1
    if n_classes == 1:
        return None
    counts = rans.histogram(symbols, ids, n_classes)[:, : alphabet.size]
    merged = _merge(counts, np.bincount(ids), alphabet)
    return None if not merged.any() else merged[ids].astype(np.uint8)


def _merge(counts: Ints, columns: Ints, alphabet: Alphabet) -> Ints:
    """New class of each old one, after every merge of neighbours that saves bytes."""
    groups = [[k] for k in range(len(counts))]
    tables, sizes = list(counts), [int(c) for c in columns]
    costs = [float(c) for c in fit(counts, alphabet).bits]
    joined = [float(c) for c in fit(counts[:-1] + counts[1:], alphabet).bits]
    while len(groups) > 1:
        saved = [
            costs[k] + costs[k + 1] - joined[k] + _id_bits(sizes[k], sizes[k + 1])
            for k in range(len(joined))
        ]
        k = int(np.argmax(saved))
        if saved[k] <= 0:
            break
        groups[k] += groups.pop(k + 1)
        tables[k] = tables[k] + tables.pop(k + 1)
        sizes[k] += sizes.pop(k + 1)
        costs[k] = joined.pop(k)
        costs.pop(k + 1)
        for j in (k - 1, k):
            if 0 <= j < len(joined):
                joined[j] = float(fit((tables[j] + tables[j + 1])[None], alphabet).bits[0])
    out = np.zeros(len(counts), np.int64)
    for k, group in enumerate(groups):
        out[group] = k
    return out


def _id_bits(a: int, b: int) -> float:
    """Bits of class ids saved where classes of `a` and `b` columns become one."""
    return float((a + b) * np.log2(a + b) - a * np.log2(a) - b * np.log2(b))


def pack_classes(ids: Bytes, n_classes: int) -> bytes:
    """Number of classes, and the class of each column in whichever form is smaller."""
    width = (n_classes - 1).bit_length()
    packed = gamma.pack_fixed(ids.astype(np.int64), np.full(ids.size, width))
    models = fit(rans.histogram(ids)[:, :n_classes])
    stream = rans.encode(ids[None], None, models.freqs, rans.choose_lanes(ids.size))
    coded = models.data + gamma.varint(len(stream)) + stream
    if len(packed) <= len(coded):
        return bytes([n_classes - 1, PACKED]) + packed
    return bytes([n_classes - 1, CODED]) + coded


def read_classes(data: Bytes, at: int, cols: int) -> tuple[Bytes, int, int]:
    """Class of each column, how many classes there are, and the byte where that ends."""
    if at + 2 > data.size:
        raise FormatError("classes are cut short")
    n_classes, kind = int(data[at]) + 1, int(data[at + 1])
    at += 2
    if kind == PACKED:
        width = (n_classes - 1).bit_length()
        if cols * width > 8 * (data.size - at):
            raise FormatError("classes are cut short")
        ids, at = gamma.unpack_fixed(data, at, np.full(cols, width))
        if ids.max() >= n_classes:
            raise FormatError(f"a class beyond the {n_classes} there are")
        return ids.astype(np.uint8), n_classes, at
    if kind != CODED:
        raise FormatError(f"classes of an unknown kind {kind}")
    freqs, at = read_models(data, at, 1, n_classes)
    length, at = gamma.read_varint(data, at)
    if length > data.size - at:
        raise FormatError("classes are cut short")
    return rans.decode(data[at : at + length], 1, cols, None, freqs)[0], n_classes, at + length
