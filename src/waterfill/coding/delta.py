"""What changed between two versions of a tensor <-> bytes, one bitstream for every machine.

Only the changes are coded: how many elements of the same context lie between one and the last, and
by how many representable values it moved. An element's context is its old exponent, which both ends
know: a small step changes a large weight rarely and a small one nearly always. The bitstream is
described in ``docs/format/delta.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import delta_numpy, gamma, native, rans
from waterfill.coding.delta_numpy import BLOCK, GAP_SYMBOLS, Packed, Words
from waterfill.coding.gaps import fit_gaps, read_gaps
from waterfill.coding.models import fit, read_models
from waterfill.types import FormatError

__all__ = ["decode", "encode"]

MAX_CONTEXTS = 32
# Bits that a context costs beside its changes: each symbol in its table, each block's count.
SYMBOL_BITS, COUNT_BITS, CONTEXT_BITS = 6.0, 6.0, 24.0

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Table = NDArray[np.uint16]


def encode(old: Array, new: Array, dtype: str, threads: int | None = None) -> bytes:
    """Code what turns one array into another, bit for bit.

    Parameters
    ----------
    old, new : arrays of one shape, in the storage form of `waterfill.types.DTYPES`
    dtype : their dtype, a key of `DTYPES`
    threads : int, optional
        Threads over blocks of 2**20 elements; the bytes do not depend on it.

    Returns
    -------
    bytes
        Good only together with exactly the same `old`, which they do not name.
    """
    words = Words.of(dtype)
    x, y = _flat(old, words), _flat(new, words)
    if x.size != y.size:
        raise ValueError(f"{x.size} old values and {y.size} new ones")
    if not x.size:
        return gamma.varint(0)
    threads = threads or native.threads()
    thresholds = choose_thresholds(*_survey(x, y, words, threads), -(-x.size // BLOCK))
    packed = _pack(x, y, words, thresholds, threads)
    changes = packed.gaps.size
    if not changes:
        return gamma.varint(0)
    counts = packed.counts.reshape(-1)
    order = gamma.best_order(counts)[0]
    ids = _ids(packed.counts)
    return b"".join(
        (
            gamma.varint(changes),
            bytes([thresholds.size, *thresholds, order]),
            gamma.pack(counts, order),
            _encode_symbols(packed.gaps, packed.gap_counts, ids, fit_gaps, threads),
            _encode_symbols(packed.sizes, packed.size_counts, ids, _fit_sizes, threads),
            packed.raw.tobytes(),
        )
    )


def decode(
    data: rans.Buffer,
    old: Array,
    dtype: str,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Inverse of `encode`.

    Parameters
    ----------
    data : bytes-like
        Exactly what `encode` returned.
    old, dtype : as given to `encode`
    out : array like `old`, optional
        Where the new values go; it may be `old` itself. After an error it holds anything.
    threads : int, optional

    Raises
    ------
    FormatError
        On bytes that no encoder wrote for such an `old`. Other values of `old` than the encoder's
        may go unnoticed: who calls this compares hashes.
    """
    words = Words.of(dtype)
    source = np.frombuffer(data, np.uint8)
    result = np.empty(old.shape, old.dtype) if out is None else out
    x, y = _flat(old, words), _flat(result, words)
    if x.size != y.size or (y.size and not np.may_share_memory(y, result)):
        raise ValueError("`out` must be like `old`, contiguous and aligned")
    changes, at = gamma.read_varint(source, 0)
    if not changes:
        if at != source.size:
            raise FormatError("delta: bytes left over after no change")
        y[:] = x
        return result
    if changes > x.size:
        raise FormatError(f"delta: {changes} changes of {x.size} values")
    thresholds, at = _read_thresholds(source, at)
    counts, at = _read_counts(source, at, thresholds.size + 1, x.size, changes)
    ids = _ids(counts)
    threads = threads or native.threads()
    gaps, at = _decode_symbols(source, at, ids, GAP_SYMBOLS, read_gaps, threads)
    sizes, at = _decode_symbols(source, at, ids, words.size_symbols, read_models, threads)
    _apply(x, y, words, thresholds, counts, (gaps, sizes, source[at:]), threads)
    return result


def _flat(array: Array, words: Words) -> Array:
    # Tensors of a mapped file may begin anywhere; the core reads whole words.
    whole = np.require(np.ascontiguousarray(array).reshape(-1), requirements="A")
    return whole.view(words.unsigned)


def _survey(x: Array, y: Array, words: Words, threads: int) -> tuple[Ints, Ints]:
    core = native.core()
    if core is None:
        return delta_numpy.survey(x, y, words)
    elements = np.zeros((1, 256), np.int64)
    sizes = np.zeros((256, words.size_symbols), np.int64)
    core.delta_survey(words.for_core, x.view(np.uint8), y.view(np.uint8), elements, sizes, threads)
    return elements[0], sizes


def _pack(x: Array, y: Array, words: Words, thresholds: Bytes, threads: int) -> Packed:
    core = native.core()
    if core is None:
        return delta_numpy.pack(x, y, words, thresholds)
    contexts = thresholds.size + 1
    counts = np.zeros((contexts, -(-x.size // BLOCK)), np.int64)
    tables = np.zeros((2, contexts, 256), np.int64)
    octets = x.view(np.uint8), y.view(np.uint8)
    coded = core.delta_pack(words.for_core, *octets, thresholds, counts, *tables, threads)
    gaps, sizes, raw = (np.frombuffer(part, np.uint8) for part in coded)
    return Packed(counts, tables[0], tables[1], gaps, sizes, raw)


def _apply(
    x: Array,
    y: Array,
    words: Words,
    thresholds: Bytes,
    counts: Ints,
    coded: tuple[Bytes, Bytes, Bytes],
    threads: int,
) -> None:
    core = native.core()
    if core is None:
        delta_numpy.apply(x, y, words, thresholds, counts, *coded)
        return
    octets = x.view(np.uint8), y.view(np.uint8)
    try:
        core.delta_apply(words.for_core, *octets, thresholds, counts, *coded, threads)
    except RuntimeError as error:
        raise FormatError(str(error)) from None


def choose_thresholds(elements: Ints, sizes: Ints, blocks: int) -> Bytes:
    """First exponents of all contexts but the lowest: the cut into runs that costs the fewest bits.

    Parameters
    ----------
    elements : int64 (256,)
        Elements of each exponent.
    sizes : int64 (256, S)
        Changes of each exponent by the symbol of their size.
    blocks : int
    """
    used = np.flatnonzero((elements > 0) | sizes.any(axis=1))
    per = -(-used.size // (2 * MAX_CONTEXTS))
    firsts = used[::per]
    elements = np.add.reduceat(elements, firsts)
    sizes = np.add.reduceat(sizes, firsts, axis=0)
    extra = CONTEXT_BITS + COUNT_BITS * blocks
    cost = _run_costs(elements, sizes)
    while True:
        cuts = _cheapest(cost + extra)
        if len(cuts) < MAX_CONTEXTS:
            return firsts[cuts].astype(np.uint8)
        extra *= 2


def _run_costs(elements: Ints, sizes: Ints) -> Floats:
    """Bits of coding runs of exponents [i, j) as one context, infinite where j <= i."""
    n = elements.size
    present = np.flatnonzero(sizes.any(axis=0))
    ends = np.zeros((n + 1, present.size))
    np.cumsum(sizes[:, present], axis=0, out=ends[1:])
    total = np.concatenate([[0.0], np.cumsum(elements)])
    i, j = np.triu_indices(n + 1, 1)
    of_size = ends[j] - ends[i]
    changes = of_size.sum(axis=1)
    unchanged = np.maximum(total[j] - total[i] - changes, 0)
    bits = _plogp(unchanged + changes) - _plogp(unchanged) - _plogp(changes)
    bits += _plogp(changes) - _plogp(of_size).sum(axis=1)
    bits += SYMBOL_BITS * (of_size > 0).sum(axis=1)
    cost = np.full((n + 1, n + 1), np.inf)
    cost[i, j] = bits
    return cost


def _plogp(x: Any) -> Floats:
    value: Floats = x * np.log2(np.maximum(x, 1))
    return value


def _cheapest(cost: Floats) -> list[int]:
    """Where the cheapest path of runs from 0 to the end is cut."""
    last = len(cost) - 1
    best, before = np.zeros(last + 1), np.zeros(last + 1, np.int64)
    for j in range(1, last + 1):
        options = best[:j] + cost[:j, j]
        before[j] = int(options.argmin())
        best[j] = options[before[j]]
    cuts = []
    at = int(before[last])
    while at:
        cuts.append(at)
        at = int(before[at])
    return cuts[::-1]


def _ids(counts: Ints) -> Bytes:
    """The model of each change: contexts that have any, numbered."""
    of_context = counts.sum(axis=1)
    of_context = of_context[of_context > 0]
    return np.repeat(np.arange(of_context.size, dtype=np.uint8), of_context)


def _fit_sizes(counts: Ints) -> tuple[Table, bytes]:
    models = fit(counts)
    return models.freqs, models.data


def _encode_symbols(
    symbols: Bytes,
    counts: Ints,
    ids: Bytes,
    fit: Callable[[Ints], tuple[Table, bytes]],
    threads: int,
) -> bytes:
    """Alphabet, models, length of the stream, stream."""
    used = counts[counts.any(axis=1)]
    size = int(np.flatnonzero(used.any(axis=0))[-1]) + 1
    freqs, data = fit(used[:, :size])
    coded = rans.encode(symbols[None], ids, freqs, _lanes(symbols.size), threads)
    return bytes([size - 1]) + data + gamma.varint(len(coded)) + coded


def _decode_symbols(
    source: Bytes,
    at: int,
    ids: Bytes,
    most: int,
    read: Callable[[Bytes, int, int, int], tuple[Table, int]],
    threads: int,
) -> tuple[Bytes, int]:
    if at >= source.size or source[at] >= most:
        raise FormatError("delta: an alphabet beyond what changes need")
    freqs, at = read(source, at + 1, int(ids[-1]) + 1, int(source[at]) + 1)
    length, at = gamma.read_varint(source, at)
    if length > source.size - at:
        raise FormatError("delta: symbols are cut short")
    coded = source[at : at + length]
    return rans.decode(coded, 1, ids.size, ids, freqs, threads)[0], at + length


def _lanes(count: int) -> int:
    # Of few changes a decoder makes quick work in any case: states that cost little go first.
    return rans.choose_lanes(count if count >= 1 << 20 else count >> 3)


def _read_thresholds(source: Bytes, at: int) -> tuple[Bytes, int]:
    count = int(source[at]) if at < source.size else MAX_CONTEXTS
    end = at + 1 + count
    if count >= MAX_CONTEXTS or end > source.size:
        raise FormatError("delta: contexts are cut short, or too many")
    thresholds = source[at + 1 : end].copy()
    if (np.diff(thresholds.astype(np.int64), prepend=0) <= 0).any():
        raise FormatError("delta: contexts out of order")
    return thresholds, end


def _read_counts(source: Bytes, at: int, contexts: int, n: int, changes: int) -> tuple[Ints, int]:
    blocks = -(-n // BLOCK)
    if at >= source.size or source[at] > gamma.MAX_ORDER:
        raise FormatError("delta: counts are cut short")
    counts, at = gamma.unpack(source, at + 1, contexts * blocks, int(source[at]))
    counts = counts.reshape(contexts, blocks)
    room = np.full(blocks, BLOCK)
    room[-1] = n - (blocks - 1) * BLOCK
    if (counts < 0).any() or (counts.sum(axis=0) > room).any() or counts.sum() != changes:
        raise FormatError("delta: counts of changes that do not fit")
    return counts, at
