"""Random rotations of the columns of a matrix, of any width: signs, then Hadamard, in blocks.

Blocks of a power of two follow each other from the left; where they do not fill the width, one block
more ends at the right edge and overlaps. Both steps are orthogonal, so their product is: nothing is
padded, and no column stays out of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from waterfill.coding.hadamard import Signs, hadamard
from waterfill.types import Floats, Weighting

TOGETHER = 1 << 20  # numbers copied at a time


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R (n, n), by three numbers.

    Attributes
    ----------
    n : int
    block : int
        A power of two from 2 to `waterfill.coding.hadamard.MAX_BLOCK`: the most that a block may have.
    seed : int
        From 0 to 2**63 - 1, of the signs.
    """

    n: int
    block: int
    seed: int = 0

    @property
    def size(self) -> int:
        """Columns to a block: the largest power of two that `block` and n allow; 1 is no rotation."""
        return min(self.block, 1 << max(self.n.bit_length() - 1, 0))

    def rotate(self, matrix: Floats, inverse: bool = False) -> None:
        """``matrix @ R`` in place, or with `inverse` ``matrix @ R.T``: the same bits on every machine.

        Parameters
        ----------
        matrix : float32 (m, n), contiguous
        """
        steps = list(self._steps())
        for first, signs in reversed(steps) if inverse else steps:
            last = first + len(signs)
            rows = max(1, TOGETHER // max(self.n, 1))
            for at in range(0, len(matrix), rows):
                # All columns are turned where they are; some, in a copy.
                part = matrix[at : at + rows, first:last]
                near = np.ascontiguousarray(part)
                hadamard(near, self.size, signs, inverse, out=near)
                part[...] = near

    def weighting(self, weighting: Weighting) -> Weighting:
        """What an error in ``matrix @ R`` costs, where this weighting says it of the matrix."""
        moment = weighting.second_moment
        if moment is None:
            return weighting
        turned = np.diag(moment) if moment.ndim == 1 else moment.copy()
        for _ in range(2):
            self.rotate(turned)
            turned = np.ascontiguousarray(turned.T)
        return Weighting(turned, weighting.row_weights)

    def _steps(self) -> Iterator[tuple[int, Signs]]:
        """First column of each run of blocks, and its signs."""
        if self.size < 2:
            return
        whole = self.n // self.size * self.size
        yield 0, random_signs(whole, self.seed)
        if whole < self.n:
            yield self.n - self.size, random_signs(self.size, self.seed, whole)


def random_signs(count: int, seed: int, first: int = 0) -> Signs:
    """Numbers `first` onwards of a stream of 1 and -1: int8 (count,).

    The top bit of SplitMix64 (Steele, Lea & Flood 2014), number i from the state
    ``seed + (i + 1) * 0x9e3779b97f4a7c15``; no generator of a library, which may change.
    """
    z = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (1 - 2 * (z >> np.uint64(63)).astype(np.int8)).astype(np.int8)
