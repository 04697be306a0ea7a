"""Models for the rANS coder: frequencies that sum to 4096, from counts or from two small numbers.

Three kinds go in a file, whichever makes the whole smallest: a *parametric* model (generalised
Gaussian, 2 bytes), an *explicit* table (a few bits a symbol), a *constant* (2 bytes). A decoder
must build the same integers on every machine, so the parametric kind uses only operations that
IEEE 754 rounds in one way: + - * / and the square root, in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma
from waterfill.coding.rans import TOTAL
from waterfill.types import FormatError

__all__ = ["Alphabet", "Models", "fit", "parametric", "quantise", "read_models"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Table = NDArray[np.uint16]

EXPLICIT, CONSTANT = 0, 255
MAX_SHAPE = 16
# Quarter steps of the exponent worth trying: peaked, Laplace (4), Gaussian (8), flat-topped.
SHAPES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
SCALES = 256
WEIGHT_BITS = 40
# 2**-f for f in [0, 1), by powers of f: (-ln 2)**n / n!.
EXP2 = (
    1.0,
    -0.6931471805599453,
    0.2402265069591007,
    -0.05550410866482158,
    0.009618129107628477,
    -0.0013333558146428443,
    0.0001540353039338161,
    -1.525273380405984e-05,
    1.3215486790144307e-06,
    -1.0178086009239699e-07,
)


def quantise(counts: Ints) -> Table:
    """Frequencies that sum to 4096, near those that code `counts` in the fewest bits.

    Parameters
    ----------
    counts : int64 (classes, A) or (A,)
        Occurrences, below 2**49; each row has at least one, and at most 4096 symbols occur.

    Returns
    -------
    uint16, same shape
        At least 1 for each symbol that occurs, 0 for the others; the same on every machine.
    """
    rows = np.atleast_2d(counts).astype(np.int64)
    total = rows.sum(axis=1, keepdims=True)
    if (total <= 0).any():
        raise ValueError("a class without a single symbol has no model")
    freqs = np.maximum((rows * (2 * TOTAL) + total) // (2 * total), rows > 0)
    missing = TOTAL - freqs.sum(axis=1)
    while missing.any():
        # One step for each row that is off: up where a count gains most bits, down where least.
        gain = np.where(rows > 0, rows / (freqs + 0.5), -1.0)
        loss = np.where(freqs > 1, rows / np.maximum(freqs - 0.5, 0.5), np.inf)
        for row in np.flatnonzero(missing):
            up = missing[row] > 0
            freqs[row, gain[row].argmax() if up else loss[row].argmin()] += 1 if up else -1
        missing = TOTAL - freqs.sum(axis=1)
    return freqs.astype(np.uint16).reshape(np.shape(counts))


@dataclass(frozen=True)
class Alphabet:
    """What symbols stand for: `size` symbols, the first for the value `low`, each next one more.

    Where `escape` is set the last symbol stands for every other value.
    """

    low: int
    size: int
    escape: bool

    @property
    def direct(self) -> int:
        """How many symbols stand for a value of their own."""
        return self.size - self.escape


def _weights(alphabet: Alphabet, shape: int, scale: NDArray[np.int64]) -> Ints:
    """Integer weights ``2**(40 - (|k| / s)**(shape / 4))``, one row per scale index.

    ``s = 2**(scale / 8 - 8)``. The escape gets the weight of one alphabet's length of values on
    either side.
    """
    root = np.sqrt(np.sqrt(np.sqrt(2.0)))
    steps = np.ones(8)
    for i in range(1, 8):
        steps[i] = steps[i - 1] * root
    s = np.ldexp(steps[scale % 8], (scale // 8 - 8).astype(np.int32))
    wing = alphabet.size if alphabet.escape else 0
    k = np.arange(alphabet.low - wing, alphabet.low + alphabet.direct + wing)
    quarter = np.sqrt(np.sqrt(np.abs(k)[None, :] / s[:, None]))
    exponent = quarter.copy()
    for _ in range(shape - 1):
        exponent = np.minimum(exponent * quarter, 1e6)
    exponent = np.minimum(exponent, WEIGHT_BITS + 1.0)
    whole = np.floor(exponent)
    fraction = exponent - whole
    power = np.full_like(fraction, EXP2[-1])
    for coefficient in EXP2[-2::-1]:
        power = power * fraction + coefficient
    weights = np.ldexp(power, (WEIGHT_BITS - whole).astype(np.int32)).astype(np.int64)
    if not alphabet.escape:
        return weights
    inner = weights[:, wing : wing + alphabet.direct]
    outer = weights.sum(axis=1, keepdims=True) - inner.sum(axis=1, keepdims=True)
    return np.concatenate([inner, outer], axis=1)


def parametric(alphabet: Alphabet, shape: int, scale: int) -> Table:
    """Frequencies (A,) of the generalised Gaussian with exponent shape / 4 and this scale index."""
    weights = np.maximum(_weights(alphabet, shape, np.array([scale]))[0], 1)
    return quantise(weights)


@lru_cache(maxsize=16)
def _bank(alphabet: Alphabet) -> Floats:
    """Bits of each symbol under every parametric model, (shapes * scales, A); for fitting only."""
    rows = [_weights(alphabet, shape, np.arange(SCALES)) for shape in SHAPES]
    weights = np.concatenate(rows).astype(np.float64)
    share = weights / weights.sum(axis=1, keepdims=True)
    return -np.log2(share * ((TOTAL - alphabet.size) / TOTAL) + 1.0 / TOTAL)


@dataclass(frozen=True)
class Models:
    """Models of several classes over one alphabet.

    Attributes
    ----------
    freqs : uint16 (classes, A)
    bits : float64 (classes,)
        What each class costs: its payload under the model and the model itself.
    data : bytes
        The models as they go in a file.
    """

    freqs: Table
    bits: Floats
    data: bytes


def fit(counts: Ints, alphabet: Alphabet | None = None) -> Models:
    """The cheapest model of each class of symbols.

    Parameters
    ----------
    counts : int64 (classes, A)
        Occurrences of each symbol; each row has at least one.
    alphabet : Alphabet, optional
        What the symbols mean; without it (or without a zero inside) no model is parametric.
    """
    freqs = quantise(counts)
    tag = np.full(len(counts), EXPLICIT)
    small = np.zeros(len(counts), np.int64)
    payload = _payload(counts, freqs)
    lengths, widths = _table_fields(freqs)
    bits = payload + 8 + (lengths + 1).sum(axis=1) + widths.sum(axis=1)
    single = freqs.max(axis=1) == TOTAL
    tag[single], small[single], bits[single] = CONSTANT, freqs[single].argmax(axis=1), 16
    if alphabet is not None and alphabet.low <= 0 < alphabet.low + alphabet.direct:
        costs = counts @ _bank(alphabet).T
        best = costs.argmin(axis=1)
        for row in np.flatnonzero(costs.min(axis=1) * 0.999 + 16 < bits):
            shape, scale = SHAPES[best[row] // SCALES], int(best[row] % SCALES)
            candidate = parametric(alphabet, shape, scale)
            cost = _payload(counts[row], candidate) + 16
            if cost < bits[row]:
                freqs[row], bits[row], tag[row], small[row] = candidate, cost, shape, scale
    return Models(freqs, bits, _write(freqs, tag, small))


def _payload(counts: Ints, freqs: Table) -> Floats:
    cost: Floats = (counts * (12.0 - np.log2(np.maximum(freqs, 1)))).sum(axis=-1)
    return cost


def _table_fields(freqs: Table) -> tuple[Ints, Ints]:
    """Of an explicit table: bit lengths as zigzag differences, and widths of the bits below."""
    lengths = gamma.bit_lengths(freqs)
    return gamma.zigzag(np.diff(lengths, axis=1, prepend=0)), np.maximum(lengths - 1, 0)


def _write(freqs: Table, tag: Ints, small: Ints) -> bytes:
    out = tag.astype(np.uint8).tobytes() + small[tag != EXPLICIT].astype(np.uint8).tobytes()
    explicit = freqs[tag == EXPLICIT]
    lengths, widths = _table_fields(explicit)
    fields = explicit.astype(np.int64).ravel()
    return out + gamma.pack_unary(lengths.ravel()) + gamma.pack_fixed(fields, widths.ravel())


def read_models(
    data: Bytes, at: int, n_classes: int, size: int, alphabet: Alphabet | None = None
) -> tuple[Table, int]:
    """Frequencies (classes, size) written by `fit`, and the byte where they end."""
    if at + n_classes > data.size:
        raise FormatError("models are cut short")
    tags = data[at : at + n_classes].astype(np.int64)
    at += n_classes
    small = data[at : at + np.count_nonzero(tags != EXPLICIT)]
    if small.size < np.count_nonzero(tags != EXPLICIT):
        raise FormatError("models are cut short")
    at += small.size
    freqs = np.zeros((n_classes, size), np.uint16)
    for row, number in zip(np.flatnonzero(tags != EXPLICIT), small, strict=True):
        if tags[row] == CONSTANT:
            if number >= size:
                raise FormatError(f"a constant of symbol {number}, of {size}")
            freqs[row, number] = TOTAL
        elif tags[row] <= MAX_SHAPE and alphabet is not None:
            freqs[row] = parametric(alphabet, int(tags[row]), int(number))
        else:
            raise FormatError(f"a model of unknown kind {tags[row]}")
    rows = np.flatnonzero(tags == EXPLICIT)
    steps, at = gamma.unpack_unary(data, at, rows.size * size, 26)
    lengths = np.cumsum(gamma.unzigzag(steps).reshape(rows.size, size), axis=1)
    if ((lengths < 0) | (lengths > 13)).any():
        raise FormatError("a frequency is out of range")
    widths = np.maximum(lengths - 1, 0)
    below, at = gamma.unpack_fixed(data, at, widths.ravel())
    tops = np.where(lengths > 0, np.int64(1) << widths, 0)
    table = tops + below.reshape(rows.size, size)
    if (table.sum(axis=1) != TOTAL).any():
        raise FormatError("frequencies do not sum to 4096")
    freqs[rows] = table
    return freqs, at
