"""The best linear guess of what a compressed model lacks in front of a matrix, and its worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from waterfill.coding.rounding import factor, solve
from waterfill.types import Floats

__all__ = ["TAKEN", "Pair"]

RIDGE = 0.01  # of the mean diagonal
TAKEN = 0.7  # of what would be right if nothing flowed on past a block (docs/sensitivity.md)


@dataclass
class Pair:
    """Sums over tokens at one place: of z z^T, and of z (x - z)^T by half of the text."""

    square: torch.Tensor | None = None
    lost: list[torch.Tensor | None] = field(default_factory=lambda: [None, None])

    def add(self, half: int, x: torch.Tensor, z: torch.Tensor) -> None:
        x, z = x.flatten(0, -2).float(), z.flatten(0, -2).float()
        self.square = _plus(self.square, z, z)
        self.lost[half] = _plus(self.lost[half], z, x - z)

    def guess(self, matrices: list[Callable[[], Floats]]) -> tuple[Floats, list[float]] | None:
        """P, float32 (n, n), and the share of it that pays at the outputs of each matrix (m, n).

        What one half of the text says is right as far as the other half says the same: with a and
        b the moves, weighted, that is ``2 a b / (a a + b b)``. The sums are used up.
        """
        if self.square is None or any(part is None for part in self.lost):
            return None
        lost = [part.numpy() for part in self.lost if part is not None]
        lower = factor(self.square.numpy(), RIDGE)
        self.square = None
        for part in lost:
            solve(lower, part)  # now the half's P^T, but for a factor that both have
        shares = []
        for matrix in matrices:
            weight = matrix()
            a, b = (weight @ part.T @ lower for part in lost)
            both = float(np.vdot(a, a) + np.vdot(b, b))
            shares.append(TAKEN * max(2 * float(np.vdot(a, b)) / both, 0.0) if both > 0 else 0.0)
        self.lost = []
        lost[0] += lost.pop()
        return lost[0].T, shares


def _plus(known: torch.Tensor | None, z: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return z.T @ other if known is None else known.addmm_(z.T, other)
