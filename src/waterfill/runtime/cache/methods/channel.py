"""Integers, keys by channel and values by token, from nothing but the block itself.

Keys of some models have channels far larger than others; a scale for each channel keeps them from drowning
the rest, before the rotary embedding mixes pairs of them (Liu et al. 2024, KIVI, arXiv 2402.02750; Hooper
et al. 2024, KVQuant, arXiv 2401.18079). Needs no calibration.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from waterfill.coding.cached_blocks import GridBlocks
from waterfill.runtime.cache.bits import pack, unpack
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics
from waterfill.runtime.cache.method import BLOCK, Coded, Coder, Method, in_blocks, in_order, method
from waterfill.runtime.cache.quantising import fit, grouped, reals, steps

__all__ = ["Channel"]


@method
class Channel(Method):
    """Integers of so many bits; a grid for 32 tokens of a key's channel, and for a token's value or a few.

    Parameters
    ----------
    bits : 1 to 8
    value_bits : of values, 1 to 8; 0: as many as of keys
    """

    usual = True
    bits: int = 4
    value_bits: int = 0

    def __post_init__(self) -> None:
        self.within("bits", 1, 8)
        self.within("value_bits", 0, 8)

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        for bits in range(1, 9):
            yield cls(bits)
            if bits < 8:
                # The next bit is worth more in keys.
                yield cls(bits + 1, bits)

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        return _Channel(facts, self.bits, self.value_bits or self.bits)


@functools.cache
def _sizes() -> NDArray[np.float32]:
    """Of steps, by their byte: the same for all layers."""
    sizes: NDArray[np.float32] = steps(torch.arange(256)).numpy()
    return sizes


@dataclass(frozen=True, eq=False)
class _Channel(Coder):
    position_free = True

    facts: LayerFacts
    key_bits: int
    value_bits: int

    @functools.cached_property
    def blocks(self) -> GridBlocks:
        facts = self.facts
        groups = grouped(torch.empty(BLOCK, facts.value_width)).shape[-2]
        shape, bits = (
            (facts.heads, facts.key_width, facts.value_width),
            (self.key_bits, self.value_bits),
        )
        return GridBlocks(shape, bits, facts.turn, _sizes(), groups)

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        k = in_blocks(self.facts.unturned(keys, positions)).transpose(3, 4)
        v = in_blocks(values.float())
        key_codes, key_step, key_centre = fit(k, self.key_bits)
        value_codes, value_step, value_centre = fit(grouped(v), self.value_bits)
        # Tokens last: a multiple of 8 whatever the width.
        by_channel = value_codes.reshape(v.shape).transpose(3, 4)
        return {
            "keys": pack(key_codes, self.key_bits),
            "keys_step": key_step,
            "keys_centre": key_centre,
            "values": pack(by_channel, self.value_bits),
            "values_step": value_step,
            "values_centre": value_centre,
        }

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = unpack(coded["keys"], self.key_bits)
        k = reals(codes, coded["keys_step"], coded["keys_centre"], self.key_bits)
        codes = unpack(coded["values"], self.value_bits).transpose(3, 4)
        v = reals(
            grouped(codes), coded["values_step"], coded["values_centre"], self.value_bits
        ).reshape(codes.shape)
        keys = self.facts.turned(in_order(k.transpose(3, 4)), positions)
        return keys, in_order(v).to(self.facts.dtype)
