"""Keys and values as the model made them: the lossless rung."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch

from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics
from waterfill.runtime.cache.method import Coded, Coder, Method, in_blocks, in_order, method

__all__ = ["Exact"]


@method
class Exact(Method):
    """Keys and values as the model made them."""

    usual = True

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        yield cls()

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        return _Exact()


class _Exact(Coder):
    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        return {"keys": in_blocks(keys), "values": in_blocks(values)}

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return in_order(coded["keys"]), in_order(coded["values"])
