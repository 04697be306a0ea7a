"""Transform coding: the harm of an error decides what is coded, and how finely.

Keys before their rotation, and values, in the basis where each component's variance is what leaving it out
would cost in nats (`waterfill.coding.components`). A component gets bits for as long as the next one saves
more than the level, the same for all components of all heads and layers, keys and values alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from waterfill.coding.cached_attention import CodedStream
from waterfill.coding.components import Basis, basis_of, components_kept
from waterfill.runtime.cache.bits import pack, unpack
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.method import BLOCK, Coded, Coder, Method, in_blocks, in_order, method
from waterfill.runtime.cache.statistics import LayerStatistics, StreamStatistics
from waterfill.types import SpecError, WaterfillError

__all__ = ["Transform"]

# Uniform quantisers of a standard normal, by bits: step, and mean squared error (Max 1960).
STEPS = (0.0, 1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
ERRORS = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.00349, 0.00104, 0.000304, 0.0000877)
NEEDS = "transform needs statistics of the cache: waterfill calibrate --cache makes them"
F64 = NDArray[np.float64]


@method
class Transform(Method):
    """Components of keys and values in the basis of least harm, each with bits of its own.

    Parameters
    ----------
    level : nats per token that the last bit of every component saves
    """

    calibrated = True
    usual = True
    level: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.level < math.inf:
            raise SpecError(f"transform: level must be positive, not {self.level}")

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        if statistics is None:
            raise WaterfillError(NEEDS)
        streams = (statistics.keys, statistics.values)
        top = max(float(_basis(s).variances.max(initial=0)) for s in streams) or 1.0
        yield from (cls(top * 2.0**-k) for k in range(25))

    def between(self, other: Self, t: float) -> Self | None:
        return type(self)(float(self.level ** (1 - t) * other.level**t))

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        if statistics is None:
            raise WaterfillError(NEEDS)
        return _Transform(
            facts,
            _Stream.of(statistics.keys, self.level),
            _Stream.of(statistics.values, self.level),
        )


@functools.lru_cache(maxsize=1024)
def _basis(stream: StreamStatistics) -> Basis:
    return basis_of(stream.covariance, stream.harm)


def _bits(variances: F64, level: float) -> NDArray[np.int64]:
    """Bits of each component: as long as the next saves more than the level."""
    saved = -np.diff(np.array(ERRORS))
    bits: NDArray[np.int64] = (variances[..., None] * saved > level).sum(-1)
    return bits


@dataclass(frozen=True, eq=False)
class _Stream:
    """Keys or values of a layer.

    Components lie by bits, most first: `groups` has bits, and the components of so many, as indices of
    head and place.
    """

    mean: torch.Tensor  # (heads, width)
    analysis: torch.Tensor  # (heads, width, kept), columns divided by their step
    synthesis: torch.Tensor  # (heads, kept, width)
    groups: tuple[tuple[int, torch.Tensor], ...]  # bits, flat index into (heads, kept)

    @classmethod
    def of(cls, stream: StreamStatistics, level: float) -> _Stream:
        basis = _basis(stream)
        bits = _bits(basis.variances, level)
        kept = components_kept(bits > 0)
        bits = bits[:, :kept]
        step = np.take(np.array(STEPS), bits) * np.sqrt(basis.variances[:, :kept])
        safe = np.where(step > 0, step, 1.0)
        flat = bits.reshape(-1)
        groups = tuple(
            (b, torch.from_numpy(np.flatnonzero(flat == b)))
            for b in range(8, 0, -1)
            if (flat == b).any()
        )
        return cls(
            torch.from_numpy(stream.mean),
            torch.from_numpy((basis.analysis[:, :, :kept] / safe[:, None]).astype(np.float16)),
            torch.from_numpy((basis.synthesis[:, :kept] * step[:, :, None]).astype(np.float16)),
            groups,
        )

    @functools.cached_property
    def coded(self) -> CodedStream:
        """For kernels."""
        groups = tuple((bits, index.numpy()) for bits, index in self.groups)
        return CodedStream(self.mean.numpy(), self.synthesis.numpy(), groups)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 (batch, blocks, bytes) of x float32 (batch, heads, blocks * BLOCK, width)."""
        z = (x - self.mean[:, None]) @ self.analysis.float()
        blocks = in_blocks(z).transpose(3, 4)
        flat = blocks.flatten(2, 3)
        parts = []
        for bits, index in self.groups:
            top = 2 ** (bits - 1)
            codes = flat[:, :, index].floor_().clamp_(-top, top - 1).add_(top)
            parts.append(pack(codes, bits).flatten(2))
        return torch.cat(parts, 2) if parts else flat.new_empty((*flat.shape[:2], 0)).byte()

    def decode(self, coded: torch.Tensor) -> torch.Tensor:
        """float32 (batch, heads, blocks * BLOCK, width)."""
        heads, kept, _ = self.synthesis.shape
        batch, blocks = coded.shape[:2]
        z = torch.zeros((batch, blocks, heads * kept, BLOCK), device=coded.device)
        at = 0
        for bits, index in self.groups:
            n = len(index) * BLOCK * bits // 8
            codes = unpack(coded[:, :, at : at + n].reshape(batch, blocks, len(index), -1), bits)
            z[:, :, index] = codes.float().sub_(2 ** (bits - 1) - 0.5)
            at += n
        z = in_order(z.reshape(batch, blocks, heads, kept, BLOCK).transpose(3, 4))
        decoded: torch.Tensor = z @ self.synthesis.float() + self.mean[:, None]
        return decoded


@dataclass(frozen=True, eq=False)
class _Transform(Coder):
    facts: LayerFacts
    keys: _Stream
    values: _Stream

    def streams(self) -> tuple[CodedStream, CodedStream]:
        return self.keys.coded, self.values.coded

    @property
    def tables(self) -> Mapping[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, stream in (("keys", self.keys), ("values", self.values)):
            found |= {f"{name}.{n}": getattr(stream, n) for n in ("mean", "analysis", "synthesis")}
        return found

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
        return {
            "keys": self.keys.encode(keys),
            "values": self.values.encode(values.float()),
        }

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys.decode(coded["keys"]), self.values.decode(coded["values"])
        if self.facts.rotary is not None:
            keys = self.facts.rotary.turn(keys, positions)
        return keys.to(self.facts.dtype), values.to(self.facts.dtype)
