"""Integers by token: a scale and a zero for each head's key and value, from nothing but themselves.

What stock quantised caches do, keys as attention gets them. A channel far larger than the others takes the
whole range, and the rest of the key is lost: models with such channels collapse. Here as the baseline.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

from waterfill.coding.cached_blocks import GridBlocks
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics
from waterfill.runtime.cache.integers import from_integers, to_integers
from waterfill.runtime.cache.method import Coded, Coder, Method, in_blocks, in_order, method

__all__ = ["Token"]


@method
class Token(Method):
    """Integers of so many bits, a scale and a zero for each key and each value.

    Parameters
    ----------
    bits : 1 to 8
    """

    bits: int = 4

    def __post_init__(self) -> None:
        self.within("bits", 1, 8)

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        yield from (cls(bits) for bits in range(1, 9))

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        return _Token(facts, self.bits)


@dataclass(frozen=True, eq=False)
class _Token(Coder):
    facts: LayerFacts
    bits: int

    @functools.cached_property
    def blocks(self) -> GridBlocks:
        facts = self.facts
        shape = facts.heads, facts.key_width, facts.value_width
        return GridBlocks(shape, (self.bits, self.bits), None)

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        coded = {}
        for name, x in (("keys", keys), ("values", values)):
            parts = to_integers(in_blocks(x.float()), 4, self.bits)
            coded[name], coded[f"{name}_step"], coded[f"{name}_low"] = parts
        return coded

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            in_order(
                from_integers(
                    coded[name], coded[f"{name}_step"], coded[f"{name}_low"], self.bits
                ).to(self.facts.dtype)
            )
            for name in ("keys", "values")
        )
        return keys, values
