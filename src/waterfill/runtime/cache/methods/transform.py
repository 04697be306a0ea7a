"""Transform coding: the harm of an error decides what is coded, and how finely.

Keys before their rotation, and values, in the basis where each component's variance is what leaving it out
would cost in nats (`waterfill.coding.components`). A component gets bits for as long as the next one saves
more than the level, the same for all components of all heads and layers, keys and values alike. Tokens differ:
each head's part of one has one of eight gains, what its components are divided by, so that a large token is
not cut off and a small one is told more finely (gain-shape quantisation: Gersho & Gray 1992, of a scalar shape).
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

from waterfill.coding.cached_blocks import GAIN_BITS, CodedStream, WholeBlocks
from waterfill.coding.components import components_kept
from waterfill.runtime.cache.bits import pack, unpack
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics, StreamStatistics
from waterfill.runtime.cache.method import BLOCK, Coded, Coder, Method, in_blocks, in_order, method
from waterfill.runtime.cache.tables import Rows, inverse
from waterfill.types import SpecError

__all__ = ["Transform"]

# Uniform quantisers of a Gaussian of variance 1 by bits (Max 1960): step, and mean squared error.
STEPS = (0.0, 1.596, 0.996, 0.586, 0.335, 0.188, 0.1041, 0.0569, 0.0308)
ERRORS = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.00349, 0.00104, 0.000304, 0.0000876)
# Of a token: close together where most are, and one that few go beyond by much.
GAINS = torch.tensor([0.6, 0.75, 0.9, 1.1, 1.35, 1.7, 2.5, 8.0])
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
        known = cls.known(statistics)
        streams = (known.keys, known.values)
        top = max(float(s.basis.variances.max(initial=0)) for s in streams) or 1.0
        yield from (cls(top * 2.0**-k) for k in range(25))

    def between(self, other: Self, t: float) -> Self | None:
        return type(self)(float(self.level ** (1 - t) * other.level**t))

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        known = self.known(statistics)
        streams = (_Stream.of(s, self.level) for s in (known.keys, known.values))
        return _Transform(facts, *streams)


def _bits(variances: F64, level: float) -> NDArray[np.int64]:
    """Bits of each component: as long as the next saves more than the level."""
    saved = -np.diff(np.array(ERRORS))
    bits: NDArray[np.int64] = (variances[..., None] * saved > level).sum(-1)
    return bits


@dataclass(frozen=True, eq=False)
class _Stream:
    """Keys or values of a layer.

    Coded components of all heads lie by bits, most first: `groups` has bits, and how many have so many.
    """

    heads: int
    kept: int  # components of a head at most
    mean: torch.Tensor  # float16 (heads, width)
    place: torch.Tensor  # int32 (components,), head * kept + component of the head
    up: Rows  # what they are multiplied with, in units of their steps
    rest: Rows  # what the other components of all heads would be: the way down needs them
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, stream: StreamStatistics, level: float) -> _Stream:
        basis = stream.basis
        bits = _bits(basis.variances, level)
        heads, kept = len(bits), components_kept(bits > 0)
        order = np.argsort(-bits.reshape(-1), kind="stable")
        of_bits, counts = np.unique(-bits[bits > 0], return_counts=True)
        coded, width = int(counts.sum()), bits.shape[1]
        head, component = np.divmod(order, width)
        step = np.take(np.array(STEPS), bits) * np.sqrt(basis.variances)
        rows = basis.synthesis * np.where(bits > 0, step, 1.0)[:, :, None]
        rows = rows.reshape(heads * width, width)
        return cls(
            heads,
            kept,
            torch.from_numpy(stream.mean.astype(np.float16)),
            torch.from_numpy((head * kept + component)[:coded].astype(np.int32)),
            Rows.of(rows[order[:coded]]),
            Rows.of(rows[order[coded:]]),
            tuple((-int(b), int(n)) for b, n in zip(of_bits, counts, strict=True)),
        )

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """All that is held."""
        return self.mean, self.place, *self.up.parts, *self.rest.parts

    @property
    def coded(self) -> CodedStream:
        """The same memory, for kernels."""
        mean, place = self.mean.numpy(), self.place.numpy()
        rows, scale = self.up.codes.numpy(), self.up.scale.numpy()
        return CodedStream(self.kept, mean, place, rows, scale, self.groups)

    def synthesis(self) -> torch.Tensor:
        """What components are multiplied with, float32 (heads, width, width)."""
        rows = torch.cat([self.up.floats(), self.rest.floats()])
        heads, width, place = self.heads, rows.shape[1], self.place.long()
        at = place // self.kept * width + place % self.kept
        others = torch.ones(heads * width, dtype=torch.bool, device=place.device)
        others[at] = False
        out = torch.empty_like(rows)
        out[torch.cat([at, others.nonzero()[:, 0]])] = rows
        return out.reshape(heads, width, width)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and gains, uint8 (batch, blocks, bytes), of x float32 (batch, heads, blocks * BLOCK, width)."""
        z = (x - self.mean.float()[:, None]) @ inverse(self.synthesis())[:, :, : self.kept]
        flat = in_blocks(z).transpose(3, 4).flatten(2, 3)[:, :, self.place.long()]
        head = self.place.long() // self.kept
        which = self._gains(flat, head)
        flat = flat / GAINS.to(flat.device)[which][:, :, head]
        parts, at = [flat.new_empty((*flat.shape[:2], 0), dtype=torch.uint8)], 0
        for bits, n in self.groups:
            top = 2 ** (bits - 1)
            codes = flat[:, :, at : at + n].floor().clamp_(-top, top - 1).add_(top)
            parts.append(pack(codes, bits).flatten(2))
            at += n
        return torch.cat(parts, 2), pack(which, GAIN_BITS).flatten(2)

    def _gains(self, flat: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """The gain of least error, (batch, blocks, heads, BLOCK), of components and their heads.

        Errors count in steps: at one water level steps of all components are worth about the same.
        """
        top = flat.new_tensor([2.0 ** (b - 1) for b, n in self.groups for _ in range(n)])[:, None]
        errors = []
        for gain in GAINS.tolist():
            scaled = flat / gain
            error = (
                (scaled.floor().clamp_(-top, top - 1).add_(0.5) - scaled).square_().mul_(gain**2)
            )
            of_heads = flat.new_zeros((*flat.shape[:2], self.heads, BLOCK))
            errors.append(of_heads.index_add_(2, head, error))
        return torch.stack(errors).argmin(0)

    def decode(self, coded: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        """float32 (batch, heads, blocks * BLOCK, width)."""
        batch, blocks = coded.shape[:2]
        z = torch.zeros((batch, blocks, self.heads * self.kept, BLOCK), device=coded.device)
        at = done = 0
        for bits, n in self.groups:
            nbytes = n * BLOCK * bits // 8
            codes = unpack(coded[:, :, at : at + nbytes].reshape(batch, blocks, n, -1), bits)
            z[:, :, self.place[done : done + n].long()] = codes.float().sub_(2 ** (bits - 1) - 0.5)
            at, done = at + nbytes, done + n
        which = unpack(gains.reshape(batch, blocks, self.heads, -1), GAIN_BITS)
        gain = GAINS.to(z.device)[which.long()][:, :, :, None]
        z = z.reshape(batch, blocks, self.heads, self.kept, BLOCK) * gain
        z = in_order(z.transpose(3, 4))
        decoded: torch.Tensor = z @ self.synthesis()[:, : self.kept] + self.mean.float()[:, None]
        return decoded


@dataclass(frozen=True, eq=False)
class _Transform(Coder):
    position_free = True

    facts: LayerFacts
    keys: _Stream
    values: _Stream

    @functools.cached_property
    def blocks(self) -> WholeBlocks:
        return WholeBlocks(self.keys.coded, self.values.coded, self.facts.turn, GAINS.numpy())

    @property
    def tables(self) -> Mapping[str, torch.Tensor]:
        streams = {"keys": self.keys, "values": self.values}
        return {f"{name}.{i}": t for name, one in streams.items() for i, t in enumerate(one.tables)}

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        of_keys = self.keys.encode(self.facts.unturned(keys, positions))
        of_values = self.values.encode(values.float())
        return dict(zip(WholeBlocks.names, (*of_keys, *of_values), strict=True))

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self.keys.decode(coded["keys"], coded["keys_gain"])
        values = self.values.decode(coded["values"], coded["values_gain"])
        return self.facts.turned(keys, positions), values.to(self.facts.dtype)
