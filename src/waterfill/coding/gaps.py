"""Models for the distances between changes: geometric, of one byte, or an explicit table.

Where each element of a context changes with the same chance, gaps are geometric, and one number
tells their whole distribution; a table pays where changes come in clusters and there are many.
Like the models of `waterfill.coding.models` these are the same integers on every machine.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import models
from waterfill.coding.models import exp2_of_minus, quantise, read_models
from waterfill.types import FormatError

__all__ = ["fit_gaps", "geometric", "read_gaps"]

EXPLICIT = 255
STEPS = 8  # of the rate to an octave; rate 0 is 8 bits for each element passed over
FIRST_OCTAVE = 3
WEIGHT_BITS = 40
DIRECT = 16

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Table = NDArray[np.uint16]


def _least(size: int) -> Ints:
    """The least value of each symbol."""
    octave = np.maximum(np.arange(size) - DIRECT, 0)
    return np.where(np.arange(size) < DIRECT, np.arange(size), (2 | octave & 1) << octave // 2 + 3)


def _weights(rates: Ints, size: int) -> Ints:
    """Chance of each symbol in units of 2**-40; the last one stands for all that is greater."""
    root = np.sqrt(np.sqrt(np.sqrt(2.0)))
    powers = np.ones(STEPS)
    for i in range(1, STEPS):
        powers[i] = powers[i - 1] * root
    down = -(-rates // STEPS)
    rate = np.ldexp(powers[down * STEPS - rates], FIRST_OCTAVE - down.astype(np.int32))
    exponent = np.minimum(rate[:, None] * _least(size), WEIGHT_BITS + 1.0)
    beyond = np.ldexp(exp2_of_minus(exponent), WEIGHT_BITS).astype(np.int64)
    return beyond - np.append(beyond[:, 1:], np.zeros((len(rates), 1), np.int64), axis=1)


def geometric(rates: Ints, size: int) -> Table:
    """Frequencies (n, size): a gap of at least g has the chance ``2**-(g * 2**(3 - rate / 8))``."""
    return quantise(np.maximum(_weights(rates, size), 1))


@lru_cache(maxsize=64)
def _bank(size: int) -> Floats:
    """Bits of each symbol under every rate, before rounding to frequencies."""
    weights = np.maximum(_weights(np.arange(EXPLICIT), size), 1 << WEIGHT_BITS - 12)
    bits: Floats = np.log2(weights.sum(axis=1, keepdims=True)) - np.log2(weights)
    return bits


def fit_gaps(counts: Ints) -> tuple[Table, bytes]:
    """The cheapest model of each context, and how they go in a file.

    Parameters
    ----------
    counts : int64 (contexts, size)
        Occurrences of each symbol; each row has at least one.
    """
    tables = models.fit(counts)
    rates = (counts @ _bank(counts.shape[1]).T).argmin(axis=1)
    freqs = geometric(rates, counts.shape[1])
    bits = (counts * (12.0 - np.log2(freqs))).sum(axis=1)
    explicit = tables.bits < bits
    freqs[explicit] = tables.freqs[explicit]
    data = np.where(explicit, EXPLICIT, rates).astype(np.uint8).tobytes()
    return freqs, data + (models.fit(counts[explicit]).data if explicit.any() else b"")


def read_gaps(data: Bytes, at: int, contexts: int, size: int) -> tuple[Table, int]:
    """Frequencies (contexts, size) written by `fit_gaps`, and the byte where they end."""
    rates = data[at : at + contexts].astype(np.int64)
    if rates.size < contexts:
        raise FormatError("models of gaps are cut short")
    explicit = rates == EXPLICIT
    freqs = geometric(np.where(explicit, 0, rates), size)
    freqs[explicit], at = read_models(data, at + contexts, int(explicit.sum()), size)
    return freqs, at
