"""Integers, the largest numbers kept aside, and a few directions of what the integers missed.

A block is outliers, plus a coarse grid, plus a low-rank approximation of the grid's error, which errors of a
head share (Kang et al. 2024, GEAR, arXiv 2403.05527). Keys by channel and values by token, as in `channel`;
the error's leading directions by power iteration, half a byte a number. Needs no calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch

from waterfill.runtime.cache.bits import pack, unpack
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics
from waterfill.runtime.cache.method import Coded, Coder, Method, in_blocks, in_order, method
from waterfill.runtime.cache.quantising import (
    bundled,
    fit,
    grouped,
    outliers,
    reals,
    restored,
)

__all__ = ["Gear"]

FACTOR_BITS = 4
ITERATIONS = 2
# What shares a grid: each row of a key's channels, values of a token or a few.
GRIDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "keys": torch.Tensor.contiguous,
    "values": grouped,
}


@method
class Gear(Method):
    """Integers, a low-rank correction, and sparse outliers.

    Parameters
    ----------
    bits : 1 to 8
    rank : of the correction of each head's block, 0 to 8
    outliers : share of the numbers that is kept in half precision, 0 to 0.25
    """

    bits: int = 2
    rank: int = 2
    outliers: float = 0.02

    def __post_init__(self) -> None:
        self.within("bits", 1, 8)
        self.within("rank", 0, 8)
        self.within("outliers", 0, 0.25)

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        for bits in range(1, 8):
            for rank, share in ((0, 0.0), (1, 0.0), (1, 0.01), (2, 0.02)):
                yield cls(bits, rank, share)

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        return _Gear(facts, self.bits, self.rank, self.outliers)


@dataclass(frozen=True, eq=False)
class _Gear(Coder):
    position_free = True

    facts: LayerFacts
    bits: int
    rank: int
    share: float

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        # Keys a channel a row, values a token a row: what shares a grid.
        k = in_blocks(self.facts.unturned(keys, positions)).transpose(3, 4)
        coded = self._encode("keys", k) | self._encode("values", in_blocks(values.float()))
        by_channel = coded["values"].transpose(3, 4)
        return coded | {
            "keys": pack(coded["keys"], self.bits),
            # Tokens last: a multiple of 8 whatever the width.
            "values": pack(by_channel, self.bits),
        }

    def _encode(self, name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x (batch, blocks, heads, rows, numbers); codes are not packed yet."""
        mean = x.mean(-1, True)
        spread = (x - mean).square().mean(-1, True).sqrt().clamp_min(1e-20)
        some = bundled(x)
        count = round(self.share * some.shape[-1])
        index, numbers = outliers(some, bundled(((x - mean) / spread).abs()), count)
        aside = torch.zeros_like(some).scatter_(-1, index.long(), 1.0).reshape(x.shape) > 0
        kept = torch.where(aside, mean, x)
        codes, step, centre = fit(GRIDS[name](kept), self.bits)
        coded = {
            name: codes.reshape(x.shape),
            f"{name}_step": step,
            f"{name}_centre": centre,
            f"{name}_index": index,
            f"{name}_outliers": numbers,
        }
        if self.rank:
            coarse = reals(codes, step, centre, self.bits).reshape(x.shape)
            missed = torch.where(aside, 0.0, x - coarse)
            for side, factor in zip(("left", "right"), _factors(missed, self.rank), strict=True):
                fitted = fit(factor.transpose(3, 4), FACTOR_BITS)
                factor, coded[f"{name}_{side}_step"], coded[f"{name}_{side}_centre"] = fitted
                coded[f"{name}_{side}"] = pack(_padded(factor), FACTOR_BITS)
        return coded

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = self._decode("keys", coded, unpack(coded["keys"], self.bits))
        v = self._decode("values", coded, unpack(coded["values"], self.bits).transpose(3, 4))
        keys = self.facts.turned(in_order(k.transpose(3, 4)), positions)
        return keys, in_order(v).to(self.facts.dtype)

    def _decode(self, name: str, coded: Coded, codes: torch.Tensor) -> torch.Tensor:
        scale = coded[f"{name}_step"], coded[f"{name}_centre"]
        x = reals(GRIDS[name](codes), *scale, self.bits).reshape(codes.shape)
        if self.rank:
            left, right = (
                reals(
                    unpack(coded[f"{name}_{side}"], FACTOR_BITS)[..., :length],
                    coded[f"{name}_{side}_step"],
                    coded[f"{name}_{side}_centre"],
                    FACTOR_BITS,
                )
                for side, length in zip(("left", "right"), x.shape[3:], strict=True)
            )
            x = x + left.transpose(3, 4) @ right
        index, numbers = coded[f"{name}_index"], coded[f"{name}_outliers"]
        return restored(bundled(x), index, numbers).reshape(x.shape)


def _padded(codes: torch.Tensor) -> torch.Tensor:
    """With zeros at the end, to a multiple of 8."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))


def _factors(x: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left (..., rows, rank) and right (..., numbers, rank) of the best approximation of so low a rank.

    Power iteration from a start that is the same for all.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(x.shape[-1], rank, generator=generator).to(x.device)
    right = start.expand(*x.shape[:-2], *start.shape)
    for _ in range(ITERATIONS):
        right = torch.linalg.qr(x.transpose(-1, -2) @ (x @ right)).Q
    return x @ right, right
