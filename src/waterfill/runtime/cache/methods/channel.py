"""Integers, keys by channel and values by token, from nothing but the block itself.

Keys of some models have channels far larger than others; a scale for each channel keeps them from drowning
the rest, before the rotary embedding mixes pairs of them (Liu et al. 2024, KIVI, arXiv 2402.02750; Hooper
et al. 2024, KVQuant, arXiv 2401.18079). Needs no calibration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.integers import from_integers, to_integers
from waterfill.runtime.cache.method import Coded, Coder, Method, in_blocks, in_order, method
from waterfill.runtime.cache.statistics import LayerStatistics
from waterfill.types import SpecError

__all__ = ["Channel"]


@method
class Channel(Method):
    """Integers of so many bits, a scale and a zero for 32 tokens of a key's channel and for each value.

    Parameters
    ----------
    bits : 1 to 8
    """

    usual = True
    bits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise SpecError(f"channel: bits must be 1 to 8, not {self.bits}")

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        yield from (cls(bits) for bits in range(1, 9))

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        return _Channel(facts, self.bits)


@dataclass(frozen=True, eq=False)
class _Channel(Coder):
    position_free = True

    facts: LayerFacts
    bits: int

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        keys = keys.float()
        if self.facts.rotary is not None:
            keys = self.facts.rotary.turn(keys, positions, backwards=True)
        coded = {}
        for name, x, axis in (("keys", keys, 3), ("values", values.float(), 4)):
            parts = to_integers(in_blocks(x), axis, self.bits)
            coded[name], coded[f"{name}_step"], coded[f"{name}_low"] = parts
        return coded

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = []
        for name in ("keys", "values"):
            scale = coded[f"{name}_step"], coded[f"{name}_low"]
            out.append(in_order(from_integers(coded[name], *scale, self.bits)))
        keys, values = out
        if self.facts.rotary is not None:
            keys = self.facts.rotary.turn(keys, positions)
        return keys.to(self.facts.dtype), values.to(self.facts.dtype)
