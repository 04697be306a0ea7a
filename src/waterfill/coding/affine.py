"""Learned block-diagonal transforms of a layer's inputs: weights that are easier to round.

With W = T B, an error e of T is the error ``e B`` of W, so T is rounded under the second moment
``B S B^T``. B is ``diag(d) (I + U)`` in blocks of b columns, U zero on the diagonal and less than 1 in the
absolute sum of each row: strictly diagonally dominant, so that it can always be inverted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.scales import decode_grid, encode_grid, from_grid
from waterfill.coding.sections import join, split
from waterfill.types import Array, Floats, FormatError

PER_OCTAVE = 8  # steps of d
LIMIT = 8 * PER_OCTAVE
PARTS = 32  # steps of U to one
GROUP = 128  # columns that share a step, as far as learning is concerned
POWER = 16  # of the mean that stands for a maximum
STEPS = 100
RATE = 0.02  # of Adam, falling to nothing
DECAYS = 0.9, 0.99
OPENED = 0.5  # share of the steps after which every entry of a block may move
EXPONENTS = (-0.25, -0.125, 0.0, 0.125, 0.25, 0.375, 0.5)  # of the diagonals to begin with
TINY = 1e-300
ROWS_AT_ONCE = 1 << 20  # weights multiplied at a time

Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Transform:
    """B as it is stored.

    Attributes
    ----------
    exponents : int32 (n,)
        ``d = 2 ** (exponent / 8)``.
    codes : int32 (n, b)
        U in steps of 1/32; row j of a block is row j of its columns.
    """

    exponents: Ints
    codes: Ints

    def blocks(self) -> Floats:
        """Float32 (ceil(n / b), b, b): exact; beyond column n the identity."""
        n, b = self.codes.shape
        matrix = np.zeros((-(-n // b) * b, b), np.float32)
        matrix[np.arange(len(matrix)), np.arange(len(matrix)) % b] = 1
        matrix[:n] += self.codes.astype(np.float32) / PARTS
        matrix[:n] *= from_grid(self.exponents, PER_OCTAVE)[:, None]
        return matrix.reshape(-1, b, b)

    def to_bytes(self) -> bytes:
        """Inverse of `from_bytes`."""
        n, b = self.codes.shape
        off = self.codes[_off_diagonal(n, b)].reshape(n, b - 1)
        return join([encode_grid(self.exponents), encode_ints(off)])

    @classmethod
    def from_bytes(cls, data: bytes, n: int, b: int) -> Transform:
        """For n columns in blocks of b.

        Raises
        ------
        FormatError
            Where the bytes are damaged, or B is not strictly diagonally dominant.
        """
        diagonal, rest = split(data, 2)
        exponents = decode_grid(diagonal, n, LIMIT)
        off = decode_ints(rest, n, b - 1)
        if (np.abs(off.astype(np.int64)).sum(axis=1) >= PARTS).any():
            raise FormatError("a transform is not strictly diagonally dominant")
        codes = np.zeros((n, b), np.int32)
        codes[_off_diagonal(n, b)] = off.reshape(-1)
        return cls(exponents, codes)


def _off_diagonal(n: int, b: int) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = np.arange(b) != (np.arange(n) % b)[:, None]
    return mask


def apply(values: Floats, blocks: Floats) -> Floats:
    """``T B`` for T float32 (m, n): the products of a block in order, float32, the same bits everywhere."""
    m, n = values.shape
    count, b, _ = blocks.shape
    out = np.empty((m, n), np.float32)
    step = max(1, ROWS_AT_ONCE // max(n, 1))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for first in range(0, m, step):
            some = _in_blocks(values[first : first + step], count, b)
            total = some[:, :, 0, None] * blocks[:, 0]
            for j in range(1, b):
                total += some[:, :, j, None] * blocks[:, j]
            out[first : first + step] = total.reshape(len(some), -1)[:, :n]
    return out


def undo(weight: Floats, blocks: Floats) -> Floats:
    """``W B^-1``, float32 (m, n): what there is to round."""
    count, b, _ = blocks.shape
    inverse = np.linalg.inv(blocks.astype(np.float64)).astype(np.float32)
    turned = _in_blocks(weight, count, b).swapaxes(0, 1) @ inverse
    return np.ascontiguousarray(
        turned.swapaxes(0, 1).reshape(len(weight), -1)[:, : weight.shape[1]]
    )


def congruent(moment: Floats | None, blocks: Floats, n: int) -> Floats:
    """``B S B^T``: float32 (n,) where both are diagonal, else (n, n)."""
    count, b, _ = blocks.shape
    moment = np.ones(n, np.float32) if moment is None else moment
    if moment.ndim == 1 and b == 1:
        return moment * np.square(blocks.reshape(-1))
    full = np.diag(moment) if moment.ndim == 1 else moment
    for _ in range(2):  # rows, then by symmetry columns
        turned = blocks @ _in_blocks(full.T, count, b).transpose(1, 2, 0)
        full = np.ascontiguousarray(turned.reshape(-1, n)[:n].T)
    return full


def _in_blocks(matrix: Array, count: int, b: int) -> Any:
    """(m, n) as (m, count, b), zeros beyond column n."""
    m, n = matrix.shape
    if n < count * b:
        matrix = np.pad(matrix, ((0, 0), (0, count * b - n)))
    return matrix.reshape(m, count, b)


@dataclass(frozen=True, eq=False)
class Harm:
    """What B is learned by: harm of errors as large as T's range makes them, over groups of columns.

    ``sum over groups g of (sum_i s_ig^2) (sum over columns j of g of (B S B^T)_jj)``, s_ig a smooth
    maximum of ``|T|`` in the group: the step of row i, whatever the bits.

    Attributes
    ----------
    weight : float64 (rows, blocks, b)
    moment : float64 (blocks, b, b)
    group : blocks to a group
    """

    weight: Doubles
    moment: Doubles
    group: int

    def __call__(self, blocks: Doubles) -> tuple[float, Doubles]:
        """Logarithm of the harm of B (blocks, b, b), and its gradient."""
        inverse = np.linalg.inv(blocks)
        turned = (self.weight.swapaxes(0, 1) @ inverse).swapaxes(0, 1)
        starts = np.arange(0, len(blocks), self.group)
        group = np.arange(len(blocks)) // self.group
        power = np.square(turned) ** (POWER // 2)
        sums = np.maximum(np.add.reduceat(power.sum(axis=2), starts, axis=1), TINY)
        steps = sums ** (2 / POWER)
        weighted = blocks @ self.moment
        noise = np.add.reduceat((weighted * blocks).sum(axis=(1, 2)), starts)
        energy = steps.sum(axis=0)
        total = float(energy @ noise) + TINY
        power *= 2 * (steps / sums * noise)[:, group, None]
        pull = np.divide(power, turned, out=power, where=turned != 0)
        slope = 2 * weighted * energy[group, None, None]
        slope -= (turned.transpose(1, 2, 0) @ pull.swapaxes(0, 1)) @ inverse.swapaxes(1, 2)
        return float(np.log(total)), slope / total


def learn(weight: Floats, moment: Floats, b: int) -> Transform:
    """A transform for weights (rows, n), rows weighed in, under S: (n, n), or (n,) where it is diagonal.

    It starts from the best of a family of diagonals: powers of the inputs' energy (AWQ, Lin et al.
    2023) and of the columns'. Then entries further and further off the diagonal are let in, as in
    AffineQuant (Ma et al. 2024).
    """
    n = weight.shape[1]
    count = -(-n // b)
    inside = (np.arange(count * b) < n).reshape(count, b)
    within = np.zeros((count, b, b))
    for k in range(count):
        some = slice(k * b, min(n, (k + 1) * b))
        own = np.diag(moment[some]) if moment.ndim == 1 else moment[some, some]
        within[k, : len(own), : len(own)] = own
    harm = Harm(_in_blocks(weight.astype(np.float64), count, b), within, max(1, GROUP // b))
    log_d = _first_diagonal(harm, inside)
    log_d, u = _follow(harm, log_d, inside)
    exponents = np.rint(log_d / np.log(2) * PER_OCTAVE).astype(np.int32).reshape(-1)[:n]
    codes = np.rint(u * PARTS)
    over = np.abs(codes).sum(axis=2, keepdims=True) >= PARTS
    codes = np.where(over, np.trunc(u * PARTS), codes).astype(np.int32)
    return Transform(np.clip(exponents, -LIMIT, LIMIT), codes.reshape(-1, b)[:n])


def _first_diagonal(harm: Harm, inside: Array) -> Doubles:
    """Logarithms (blocks, b) of the best diagonal to begin with."""
    eye = np.eye(inside.shape[1])
    energy = np.einsum("kjj->kj", harm.moment)
    found = []
    for base in (energy, 1 / np.maximum(np.square(harm.weight).mean(axis=0), TINY)):
        log = np.log(np.clip(base, *np.quantile(base[inside], (0.001, 0.999)).clip(TINY, 1 / TINY)))
        log = np.where(inside, log - log[inside].mean(), 0)
        for exponent in EXPONENTS:
            trial = np.clip(-exponent / 2 * log, -4, 4)
            found.append((harm(np.exp(trial)[..., None] * eye)[0], trial))
    return min(found, key=lambda pair: pair[0])[1]


def _follow(harm: Harm, log_d: Doubles, inside: Array) -> tuple[Doubles, Doubles]:
    """Adam on ``log d`` and U from a diagonal; the best there was on the way."""
    b = inside.shape[1]
    eye, distance = np.eye(b), np.abs(np.subtract.outer(np.arange(b), np.arange(b)))
    ours = inside[:, :, None] & inside[:, None, :] & (distance > 0)
    u = np.zeros(harm.moment.shape)
    best, least = (log_d, u), np.inf
    moments = [np.zeros((2, *log_d.shape)), np.zeros((2, *u.shape))]
    for step in range(STEPS):
        matrix = np.exp(log_d)[..., None] * (eye + u)
        found, slope = harm(matrix)
        if found < least:
            best, least = (log_d, u), found
        reach = b * (step + 1) / (OPENED * STEPS)
        slopes = (
            (slope * matrix).sum(axis=2) * inside,
            slope * np.exp(log_d)[..., None] * (ours & (distance <= reach)),
        )
        log_d, u = (
            value - RATE * (1 - step / STEPS) * _adam(kept, own, step + 1)
            for value, kept, own in zip((log_d, u), moments, slopes, strict=True)
        )
        log_d = np.clip(log_d, -5, 5)
        u *= np.minimum(1, (PARTS - 1) / PARTS / np.maximum(np.abs(u).sum(2, keepdims=True), TINY))
    return best


def _adam(kept: Doubles, slope: Doubles, step: int) -> Doubles:
    """A step of Adam; mean and mean square in `kept` (2, ...) move on."""
    for k, (value, decay) in enumerate(zip((slope, slope * slope), DECAYS, strict=True)):
        kept[k] += (1 - decay) * (value - kept[k])
    mean, square = (kept[k] / (1 - decay**step) for k, decay in enumerate(DECAYS))
    moved: Doubles = mean / (np.sqrt(square) + 1e-12)
    return moved
