"""Keys and values as the model made them: the lossless rung."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

from waterfill.coding.cached_blocks import PlainBlocks
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics
from waterfill.runtime.cache.method import Coded, Coder, Method, in_blocks, in_order, method
from waterfill.runtime.weights import KERNEL_DTYPES

__all__ = ["Exact"]


@method
class Exact(Method):
    """Keys and values as the model made them."""

    usual = True

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        yield cls()

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        return _Exact(facts)


@dataclass(frozen=True, eq=False)
class _Exact(Coder):
    facts: LayerFacts

    @functools.cached_property
    def blocks(self) -> PlainBlocks | None:
        facts = self.facts
        name = KERNEL_DTYPES.get(facts.dtype)
        shape = facts.heads, facts.key_width, facts.value_width
        return None if name is None else PlainBlocks(shape, name)

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        # Tokens last, as kernels read components.
        return {
            name: in_blocks(x).transpose(3, 4) for name, x in (("keys", keys), ("values", values))
        }

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (in_order(coded[name].transpose(3, 4)) for name in ("keys", "values"))
        return keys, values

    def views(self, coded: Coded) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (coded[name].permute(0, 2, 1, 4, 3) for name in ("keys", "values"))
        return keys, values
