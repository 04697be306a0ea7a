"""Models for the rANS coder: frequencies that sum to 4096, from counts or from two small numbers.

Three kinds go in a file, whichever makes the whole smallest: a *parametric* model (generalised
Gaussian, 2 bytes), an *explicit* table (a few bits a symbol), a *constant* (2 bytes). A decoder
must build the same integers on every machine, so the parametric kind uses only operations that
IEEE 754 rounds in one way: + - * / and the square root, in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import gamma
from waterfill.coding.rans import TOTAL
from waterfill.types import FormatError

__all__ = [
    "Alphabet",
    "Models",
    "exp2_of_minus",
    "fit",
    "parametric",
    "parametric_weights",
    "quantise",
    "read_models",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Table = NDArray[np.uint16]

EXPLICIT, CONSTANT = 0, 255
MAX_SHAPE = 16
# Quarter steps of the exponent worth trying: peaked, Laplace (4), Gaussian (8), flat-topped.
SHAPES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
# Scales tried first, from 2**-3 to 2**9 in half octaves; then all around the best of them.
SCALE_STEP = 4
COARSE_SCALES = np.arange(40, 137, SCALE_STEP)
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
    rare = (rows > 0) & (rows * TOTAL < total)
    common = np.where(rare, 0, rows)
    shared = TOTAL - rare.sum(axis=1, keepdims=True)
    weight = common.sum(axis=1, keepdims=True)
    freqs = np.maximum((common * (2 * shared) + weight) // (2 * weight), rows > 0)
    missing = TOTAL - freqs.sum(axis=1)
    while missing.any():
        # One step for each row that is off: up where a count gains most bits, down where least.
        if (up := np.flatnonzero(missing > 0)).size:
            gain = np.where(rows[up] > 0, rows[up] / (freqs[up] + 0.5), -1.0)
            freqs[up, gain.argmax(axis=1)] += 1
        if (down := np.flatnonzero(missing < 0)).size:
            held = freqs[down]
            loss = np.where(held > 1, rows[down] / np.maximum(held - 0.5, 0.5), np.inf)
            freqs[down, loss.argmin(axis=1)] -= 1
        missing = TOTAL - freqs.sum(axis=1)
    out: Table = freqs.astype(np.uint16).reshape(np.shape(counts))
    return out


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


def exp2_of_minus(exponent: Floats) -> Floats:
    """``2 ** -exponent`` for exponents from 0 to 1000, the same bits on every machine."""
    whole = np.floor(exponent)
    fraction = exponent - whole
    power = np.full_like(fraction, EXP2[-1])
    for coefficient in EXP2[-2::-1]:
        power = power * fraction + coefficient
    return np.ldexp(power, -whole.astype(np.int32))


def parametric_weights(alphabet: Alphabet, shape: int, scale: Ints) -> Ints:
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
    weights: Ints = np.ldexp(exp2_of_minus(exponent), WEIGHT_BITS).astype(np.int64)
    if not alphabet.escape:
        return weights
    inner = weights[:, wing : wing + alphabet.direct]
    outer = weights.sum(axis=1, keepdims=True) - inner.sum(axis=1, keepdims=True)
    return np.concatenate([inner, outer], axis=1)


def parametric(alphabet: Alphabet, shape: Ints, scale: Ints) -> Table:
    """Frequencies (n, A) of generalised Gaussians: exponents shape / 4, scales by index."""
    weights = np.empty((len(shape), alphabet.size), np.int64)
    for one in np.unique(shape):
        rows = np.flatnonzero(shape == one)
        weights[rows] = parametric_weights(alphabet, int(one), scale[rows])
    return quantise(np.maximum(weights, 1))


def _bits(alphabet: Alphabet, shape: int, scales: Ints) -> Floats:
    """Bits of each symbol under parametric models, before rounding to frequencies; (scales, A)."""
    weights = parametric_weights(alphabet, shape, scales).astype(np.float64)
    share = weights / weights.sum(axis=1, keepdims=True)
    bits: Floats = -np.log2(share * ((TOTAL - alphabet.size) / TOTAL) + 1.0 / TOTAL)
    return bits


@lru_cache(maxsize=64)
def _bank(alphabet: Alphabet) -> Floats:
    """Bits of each symbol under every shape at coarse scales, (shapes * scales, A)."""
    return np.concatenate([_bits(alphabet, shape, COARSE_SCALES) for shape in SHAPES])


def _nearest(counts: Ints, alphabet: Alphabet) -> tuple[Ints, Ints]:
    """Shape and scale index of the parametric model that codes each row in the fewest bits."""
    best = (counts.astype(np.float64) @ _bank(alphabet).T).argmin(axis=1)
    shape = np.array(SHAPES)[best // COARSE_SCALES.size]
    scale = COARSE_SCALES[best % COARSE_SCALES.size]
    for row, count in enumerate(counts):
        near = scale[row] + np.arange(1 - SCALE_STEP, SCALE_STEP)
        scale[row] = near[(_bits(alphabet, int(shape[row]), near) @ count).argmin()]
    return shape, scale


@dataclass(frozen=True, eq=False)
class Models:
    """Models of several classes over one alphabet.

    Attributes
    ----------
    freqs : uint16 (classes, A)
    bits : float64 (classes,)
        What each class costs: its payload under the model and the model itself.
    tag, small : int64 (classes,)
        Kind of each model, and its number where it has one.
    """

    freqs: Table
    bits: Floats
    tag: Ints
    small: Ints

    @cached_property
    def data(self) -> bytes:
        """The models as they go in a file."""
        return _write(self.freqs, self.tag, self.small)


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
        shape, scale = _nearest(counts, alphabet)
        candidates = parametric(alphabet, shape, scale)
        costs = _payload(counts, candidates) + 16
        won = costs < bits
        freqs[won], bits[won] = candidates[won], costs[won]
        tag[won], small[won] = shape[won], scale[won]
    return Models(freqs, bits, tag, small)


def _payload(counts: Ints, freqs: Table) -> Floats:
    cost: Floats = (counts * (12.0 - np.log2(np.maximum(freqs, 1)))).sum(axis=-1)
    return cost


def _table_fields(freqs: Table) -> tuple[Ints, Ints]:
    """Of an explicit table: bit lengths as zigzag differences, and widths of the bits below."""
    lengths = gamma.bit_lengths(freqs)
    return gamma.zigzag(np.diff(lengths, axis=1, prepend=0)), np.maximum(lengths - 1, 0)


def _write(freqs: Table, tag: Ints, small: Ints) -> bytes:
    numbers = small[tag != EXPLICIT].astype(np.uint8)
    kinds: bytes = tag.astype(np.uint8).tobytes() + numbers.tobytes()
    explicit = freqs[tag == EXPLICIT]
    lengths, widths = _table_fields(explicit)
    fields = explicit.astype(np.int64).ravel()
    below = gamma.pack_fixed(fields, widths.ravel())
    return kinds + gamma.pack_unary(lengths.ravel()) + below


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
    number = np.zeros(n_classes, np.int64)
    number[tags != EXPLICIT] = small
    fitted = np.flatnonzero((tags > EXPLICIT) & (tags <= MAX_SHAPE))
    single = np.flatnonzero(tags == CONSTANT)
    if np.count_nonzero(tags) != fitted.size + single.size or (fitted.size and alphabet is None):
        raise FormatError("a model of unknown kind")
    if (number[single] >= size).any():
        raise FormatError("a constant beyond the alphabet")
    freqs[single, number[single]] = TOTAL
    if fitted.size and alphabet is not None:
        freqs[fitted] = parametric(alphabet, tags[fitted], number[fitted])
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
