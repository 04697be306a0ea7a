"""More bits for the tokens that are looked at.

The tokens of each block that late queries attend to most are coded with more bits than the rest.
Keys have a grid for each channel; values have their channels divided by the root of the largest number
there, then a grid for each token (channel-separable token-wise), so that neither a large channel nor a large
token drowns others. Source: He et al. 2024, ZipCache, arXiv 2405.14256. There a share of all tokens is
salient, here the same share of every block, so that all blocks take the same room. Needs no calibration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

from waterfill.runtime.cache.bits import pack, unpack
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics
from waterfill.runtime.cache.method import BLOCK, Coded, Coder, Method, in_blocks, in_order, method
from waterfill.runtime.cache.quantising import (
    fit,
    reals,
    step_codes,
    steps,
)
from waterfill.types import SpecError

__all__ = ["Zipcache"]

# Share of a block's range that levels of few bits should span: Max's (1960) steps for a normal density,
# over the 4.14 deviations between the ends of 32 numbers.
SPAN = {1: 0.385, 2: 0.722}


@method
class Zipcache(Method):
    """Integers of more bits for salient tokens.

    Parameters
    ----------
    high, low : bits of salient tokens and of others, 1 to 8; high is not less than low
    salient : tokens of each block of 32 that are salient, a multiple of 8 from 8 to 24
    """

    high: int = 4
    low: int = 2
    salient: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= 8:
            raise SpecError(
                f"zipcache: bits must be 1 to 8, high not less than low, not {self.high}, {self.low}"
            )
        if self.salient not in range(8, BLOCK, 8):
            raise SpecError(f"zipcache: salient must be 8, 16 or 24, not {self.salient}")

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        for low in range(1, 7):
            yield from (cls(low + 2, low, salient) for salient in (8, 16))

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        return _Zipcache(facts, self.high, self.low, self.salient)


@dataclass(frozen=True, eq=False)
class _Zipcache(Coder):
    position_free = True
    wants_saliency = True

    facts: LayerFacts
    high: int
    low: int
    salient: int

    @property
    def classes(self) -> tuple[tuple[str, int, slice], ...]:
        """Name, bits, and places in a block whose salient tokens come first."""
        return (
            ("high", self.high, slice(0, self.salient)),
            ("low", self.low, slice(self.salient, BLOCK)),
        )

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        k = in_blocks(self.facts.unturned(keys, positions))
        v = in_blocks(values.float())
        if saliency is None:
            saliency = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        asked = saliency.mean(1).reshape(k.shape[0], k.shape[1], BLOCK)
        chosen = torch.zeros(asked.shape, dtype=torch.uint8, device=k.device)
        chosen.scatter_(2, asked.topk(self.salient, -1).indices, 1)
        order = _order(chosen)
        # Tokens last, salient ones first: a multiple of 8 whatever the width.
        k = k.gather(3, order.expand_as(k)).transpose(3, 4)
        v = v.gather(3, order.expand_as(v)).transpose(3, 4)
        channel = step_codes(v.abs().amax(-1).sqrt())
        v = (v / steps(channel)[..., None]).flatten(2, 3)
        _, key_step, key_centre = fit(k, self.high)
        coded = {
            "salient": pack(chosen, 1),
            "keys_step": key_step,
            "keys_centre": key_centre,
            "values_channel": channel.to(torch.uint8),
        }
        for name, bits, some in self.classes:
            size, middle = self._key_grid(key_step, key_centre, bits)
            top = 2**bits - 1
            codes = ((k[..., some] - middle) / size + top / 2).round_().clamp_(0, top)
            coded[f"keys_{name}"] = pack(codes, bits)
            codes, step, centre = fit(v[..., some].transpose(2, 3), bits)
            coded[f"values_{name}"] = pack(codes.transpose(2, 3), bits)
            coded[f"values_{name}_step"], coded[f"values_{name}_centre"] = step, centre
        return coded

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = [], []
        for name, bits, _ in self.classes:
            size, middle = self._key_grid(coded["keys_step"], coded["keys_centre"], bits)
            codes = unpack(coded[f"keys_{name}"], bits).float()
            keys.append((codes - (2**bits - 1) / 2) * size + middle)
            codes = unpack(coded[f"values_{name}"], bits).transpose(2, 3)
            values.append(
                reals(codes, coded[f"values_{name}_step"], coded[f"values_{name}_centre"], bits)
            )
        k = torch.cat(keys, 4).transpose(3, 4)
        v = torch.cat(values, 2).transpose(2, 3).unflatten(2, (self.facts.heads, -1))  # type: ignore[no-untyped-call]
        v = (v * steps(coded["values_channel"])[..., None]).transpose(3, 4)
        order = _order(unpack(coded["salient"], 1))
        k, v = (torch.empty_like(x).scatter_(3, order.expand_as(x), x) for x in (k, v))
        return self.facts.turned(in_order(k), positions), in_order(v).to(self.facts.dtype)

    def _key_grid(
        self, step: torch.Tensor, centre: torch.Tensor, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and middle of a class's levels: all classes share the grid of the highest bits."""
        size = steps(step)
        middle = size * centre.float() * 2**self.high / 16
        if bits < self.high:
            size = size * ((2**self.high - 1) / (2**bits - 1) * SPAN.get(bits, 1.0))
        return size[..., None], middle[..., None]


def _order(chosen: torch.Tensor) -> torch.Tensor:
    """Tokens of a block (batch, blocks, BLOCK), salient ones first, as an index of (..., 1, BLOCK, 1)."""
    return chosen.argsort(dim=-1, descending=True, stable=True)[:, :, None, :, None]
