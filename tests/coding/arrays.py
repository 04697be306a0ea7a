"""Words of the kinds that checkpoints have, and of those that they had better not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from waterfill.coding.split import EXPONENT_BITS
from waterfill.types import DTYPES, from_float32

Words = Any
Random = np.random.Generator


def unsigned(dtype: str) -> np.dtype[Any]:
    return np.dtype(f"<u{DTYPES[dtype].itemsize}")


def random_bits(dtype: str, n: int, random: Random) -> Words:
    return np.frombuffer(random.bytes(n * DTYPES[dtype].itemsize), unsigned(dtype))


def weights(dtype: str, n: int, random: Random) -> Words:
    values = random.normal(0, 0.02, n).astype(np.float32)
    if dtype in ("F64", "F32", "F16", "BF16"):
        return from_float32(values, dtype).view(unsigned(dtype))
    if dtype == "F8_E5M2":
        return (values.astype("<f2").view("<u2") >> 8).astype(np.uint8)
    if dtype == "F8_E4M3":
        mantissa, exponent = np.frexp(np.abs(values) * 16)
        whole = np.clip(exponent + 7, 0, 15) << 3 | (mantissa * 16).astype(np.int64) & 7
        return (whole | (values < 0) * 128).astype(np.uint8)
    return np.rint(values * 1000).astype(np.int64).astype(unsigned(dtype))


def _fields(dtype: str, exponents: Any, random: Random) -> Words:
    """Random words with these exponents (of integers: these values in their upper byte)."""
    kind = unsigned(dtype)
    bits = EXPONENT_BITS.get(dtype, 7)
    below = kind.type(8 * kind.itemsize - 1 - bits)
    mask = kind.type((1 << bits) - 1) << below
    exponents = np.minimum(exponents, (1 << bits) - 1).astype(kind)
    return random_bits(dtype, len(exponents), random) & ~mask | exponents << below


def not_numbers(dtype: str, n: int, random: Random) -> Words:
    """NaN payloads and infinities, with a few denormals."""
    return _fields(dtype, np.where(random.random(n) < 0.99, 1 << 20, 0), random)


def denormals(dtype: str, n: int, random: Random) -> Words:
    return _fields(dtype, np.zeros(n), random)


def every_exponent(dtype: str, n: int, random: Random) -> Words:
    return _fields(dtype, np.minimum(random.geometric(0.01, n), 1 << 12), random)


def outliers(dtype: str, n: int, random: Random) -> Words:
    """Weights, and among them what is far from them at both ends."""
    wild = random.random(n) < 3 / max(n, 1)
    return np.where(wild, random_bits(dtype, n, random), weights(dtype, n, random))


def zeros(dtype: str, n: int, random: Random) -> Words:
    """Positive and negative ones, and infinities."""
    kind, width = unsigned(dtype), 8 * DTYPES[dtype].itemsize
    bits = EXPONENT_BITS.get(dtype, width - 1)
    choice = [0, 1 << width - 1, (1 << bits) - 1 << width - 1 - bits]
    return np.array(choice, kind)[random.integers(0, 3, n)]


def constant(dtype: str, n: int, random: Random) -> Words:
    return np.full(n, random_bits(dtype, 1, random)[0])


def sparse(dtype: str, n: int, random: Random) -> Words:
    kept = random.random(n) < random.choice([0.02, 0.3, 0.7])
    return np.where(kept, weights(dtype, n, random), constant(dtype, 1, random))


def sparse_bits(dtype: str, n: int, random: Random) -> Words:
    kept = random.random(n) < 0.2
    return np.where(kept, random_bits(dtype, n, random), unsigned(dtype).type(0))


def repeats(dtype: str, n: int, random: Random) -> Words:
    return np.resize(random_bits(dtype, int(random.integers(2, 90)), random), n)


def upper_half(dtype: str, n: int, random: Random) -> Words:
    """The lower half of each word is zero: bf16 in f32."""
    half = unsigned(dtype).type(4 * DTYPES[dtype].itemsize)
    return weights(dtype, n, random) >> half << half


def counters(dtype: str, n: int, random: Random) -> Words:
    first = int(random.integers(0, 200))
    return np.arange(first, first + 3 * n, 3).astype(unsigned(dtype))[:n]


def small_integers(dtype: str, n: int, random: Random) -> Words:
    return random.integers(0, int(random.choice([2, 10, 1000])), n).astype(unsigned(dtype))


def nibbles(dtype: str, n: int, random: Random) -> Words:
    """Four-bit values packed side by side."""
    each = 2 * DTYPES[dtype].itemsize
    values = np.clip(random.normal(8, 1.5, (n, each)), 0, 15).astype(np.uint64)
    packed = (values << 4 * np.arange(each, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    return packed.astype(unsigned(dtype))


KINDS: dict[str, Callable[[str, int, Random], Words]] = {
    maker.__name__: maker
    for maker in (
        random_bits, weights, not_numbers, denormals, every_exponent, outliers, zeros, constant,
        sparse, sparse_bits, repeats, upper_half, counters, small_integers, nibbles,
    )
}  # fmt: skip


def make(kind: str, dtype: str, n: int, seed: int) -> Words:
    """`n` words of the kind, writeable."""
    return KINDS[kind](dtype, n, np.random.default_rng(seed)).astype(unsigned(dtype))
