"""Levels that lie where numbers do, fitted on text; the largest numbers kept aside.

Keys by channel before their rotation, on scales that calibration fixed; values by token, on a scale of the
token's own. Each layer has a table of levels for either, by k-means weighted with what a squared error
costs; about 1 % of the numbers, those farthest out, are kept in half precision. With 2 bits or fewer the
levels are moved so that mean and deviation of what is read are those of what was written (Q-norm).
Source: Hooper et al. 2024, KVQuant, arXiv 2401.18079. There outliers are as many as lie beyond a threshold;
here every block has the same number, so that all blocks take the same room.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from waterfill.coding.kmeans import scaled_levels
from waterfill.runtime.cache.bits import pack, unpack
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics, StreamStatistics
from waterfill.runtime.cache.method import BLOCK, Coded, Coder, Method, in_blocks, in_order, method
from waterfill.runtime.cache.quantising import outliers, restored

__all__ = ["Kvquant"]

F32 = NDArray[np.float32]
NORMED = 2  # bits up to which levels are moved


@method
class Kvquant(Method):
    """Fitted levels, and sparse outliers.

    Parameters
    ----------
    bits : 1 to 6
    outliers : share of the numbers that is kept in half precision, 0 to 0.25
    """

    calibrated = True
    bits: int = 3
    outliers: float = 0.01

    def __post_init__(self) -> None:
        self.within("bits", 1, 6)
        self.within("outliers", 0, 0.25)

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        for bits in range(1, 7):
            yield cls(bits, 0.0)
            yield cls(bits, 0.01)

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        known = self.known(statistics)
        centre, spread, key_levels = _keys(known.keys, self.bits, self.outliers)
        return _Kvquant(
            facts,
            self.bits,
            torch.from_numpy(centre).half(),
            torch.from_numpy(spread).half(),
            torch.from_numpy(key_levels),
            torch.from_numpy(_values(known.values, self.bits, self.outliers)),
            _count(self.outliers, facts.key_width * BLOCK),
            _count(self.outliers, facts.heads * facts.value_width),
        )


def _count(share: float, numbers: int) -> int:
    """Outliers of a vector: at least one, where there are to be any."""
    return max(1, round(share * numbers)) if share else 0


@functools.lru_cache(maxsize=1024)
def _keys(stream: StreamStatistics, bits: int, share: float) -> tuple[F32, F32, F32]:
    """Mean and deviation of channels (heads, width), and the levels that all of them share."""
    centre = stream.mean.astype(np.float16).astype(np.float32)
    variance = np.diagonal(stream.covariance, axis1=1, axis2=2)
    spread = np.sqrt(np.maximum(variance, 0)).astype(np.float16).astype(np.float32)
    spread = np.maximum(spread, 1e-6)
    x = (stream.samples - centre[:, None]).swapaxes(0, 1)  # tokens, heads, width
    distance = np.abs(x) / spread
    inside = distance <= np.quantile(distance, 1 - share)
    # Fisher information of each number is not known, its mean over tokens is: a key that stands out where
    # queries look is one that is read.
    stands = np.einsum("nhi,hij,nhj->nh", x, stream.harm, x)
    stands = np.maximum(stands, 0) / np.maximum(stands.mean(0), 1e-30)
    weights = inside * _sensitivity(stream) * stands[:, :, None]
    tokens = len(x)
    levels = scaled_levels(
        x.reshape(tokens, -1), weights.reshape(tokens, -1), spread.reshape(1, -1), tokens, 2**bits
    )
    return centre, spread, _normed(levels, (x / spread)[inside], bits)


@functools.lru_cache(maxsize=1024)
def _values(stream: StreamStatistics, bits: int, share: float) -> F32:
    """The levels of all tokens, each on its own range."""
    heads, tokens, width = stream.samples.shape
    x = stream.samples.swapaxes(0, 1).reshape(tokens, heads * width)
    tensor = torch.from_numpy(x)
    count = _count(share, heads * width)
    index, _ = outliers(tensor, _farthest(tensor), count)
    held = torch.ones_like(tensor).scatter_(1, index.long(), 0.0).numpy()
    low, high = _range(tensor, held=torch.from_numpy(held))
    centre, spread = ((high + low) / 2).numpy(), ((high - low) / 2).numpy()
    weights = held * _sensitivity(stream).reshape(-1)
    levels = scaled_levels((x - centre).T, weights.T, spread.reshape(1, -1), heads * width, 2**bits)
    return _normed(levels, ((x - centre) / spread)[held > 0], bits)


def _sensitivity(stream: StreamStatistics) -> F32:
    """What a squared error of each channel costs, (heads, width), none of them nothing."""
    harm = np.diagonal(stream.harm, axis1=1, axis2=2)
    found: F32 = (np.maximum(harm, 0) + 1e-4 * max(float(harm.mean()), 1e-20)).astype(np.float32)
    return found


def _normed(levels: F32, x: F32, bits: int) -> F32:
    """Levels moved so that numbers read back have the mean and deviation they had (Q-norm)."""
    if bits > NORMED:
        return levels
    read = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    deviation = float(read.std())
    scale = float(x.std()) / deviation if deviation > 0 else 1.0
    moved: F32 = ((levels - read.mean()) * scale + x.mean()).astype(np.float32)
    return moved


def _farthest(x: torch.Tensor) -> torch.Tensor:
    """Distance from the middle of a token's numbers (..., numbers)."""
    return (x - x.median(-1, keepdim=True).values).abs()


def _range(x: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest of the numbers (..., numbers) where `held` is 1, as the cache says them."""
    low = torch.where(held > 0, x, torch.inf).amin(-1, True)
    high = torch.where(held > 0, x, -torch.inf).amax(-1, True)
    low, high = (e.clamp(-6e4, 6e4).half().float() for e in (low, high))
    return low, torch.maximum(high, low + 1e-6)


@dataclass(frozen=True, eq=False)
class _Kvquant(Coder):
    position_free = True

    facts: LayerFacts
    bits: int
    centre: torch.Tensor  # float16 (heads, width)
    spread: torch.Tensor
    key_levels: torch.Tensor  # float32 (2**bits,)
    value_levels: torch.Tensor
    key_outliers: int  # of a head's block
    value_outliers: int  # of a token

    @property
    def tables(self) -> Mapping[str, torch.Tensor]:
        names = ("centre", "spread", "key_levels", "value_levels")
        return {name: getattr(self, name) for name in names}

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        k = in_blocks(self.facts.unturned(keys, positions)).transpose(3, 4)
        centre, spread = self._scales()
        scaled = (k - centre) / spread
        key_index, key_numbers = outliers(k.flatten(3), scaled.abs().flatten(3), self.key_outliers)
        v = in_blocks(values.float()).transpose(2, 3).flatten(3)  # tokens, all heads' numbers
        value_index, value_numbers = outliers(v, _farthest(v), self.value_outliers)
        low, high = _range(v, torch.ones_like(v).scatter_(3, value_index.long(), 0.0))
        on_range = (v - (high + low) / 2) / ((high - low) / 2)
        return {
            "keys": pack(_nearest(scaled, self.key_levels), self.bits),
            "keys_index": key_index,
            "keys_outliers": key_numbers,
            "values": pack(_nearest(on_range, self.value_levels).transpose(2, 3), self.bits),
            "values_low": low[..., 0].half(),
            "values_high": high[..., 0].half(),
            "values_index": value_index,
            "values_outliers": value_numbers,
        }

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        centre, spread = self._scales()
        k = self.key_levels[unpack(coded["keys"], self.bits).int()] * spread + centre
        k = restored(k.flatten(3), coded["keys_index"], coded["keys_outliers"]).reshape(k.shape)
        low, high = coded["values_low"].float(), coded["values_high"].float()
        high = torch.maximum(high, low + 1e-6)
        v = self.value_levels[unpack(coded["values"], self.bits).int()].transpose(2, 3)
        v = v * ((high - low) / 2)[..., None] + ((high + low) / 2)[..., None]
        v = restored(v, coded["values_index"], coded["values_outliers"])
        v = v.reshape(*v.shape[:3], self.facts.heads, self.facts.value_width).transpose(2, 3)
        keys = self.facts.turned(in_order(k.transpose(3, 4)), positions)
        return keys, in_order(v).to(self.facts.dtype)

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.centre.float()[:, :, None], self.spread.float().clamp_min(1e-6)[:, :, None]


def _nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index of the nearest level, int64."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)
