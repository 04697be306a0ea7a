"""Transform coding with entropy-coded steps: the smallest, not the fastest, way to hold a cache.

Components of `waterfill.coding.components`, one step for all of them, coded by rANS under models fitted to
the layer's samples (`waterfill.coding.cachegen_symbols`). At a given harm that takes a half to a whole bit
a number less than codes of whole bits. Every block gets the same number of bytes, and the finest step that
fits in them: sizes are exact, whatever the text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch

from waterfill.coding.cached_steps import (
    HEAD,
    MIDDLE,
    OCTAVE,
    StepBlocks,
    StepTable,
    step_at,
    write_block,
)
from waterfill.coding.cachegen import LEAST
from waterfill.coding.cachegen_symbols import Columns, encode_chunk, fit_columns
from waterfill.coding.components import components_kept
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics, StreamStatistics
from waterfill.runtime.cache.method import BLOCK, Coded, Coder, Method, method
from waterfill.runtime.cache.tables import Rows, inverse
from waterfill.types import Floats, SpecError

__all__ = ["Entropy"]

FURTHEST = 1 << 14  # steps from zero, at most
SPARE = 1.01  # of the bytes that the samples take on average
TRIES = 8
HALF_MAX = 65504.0
CUT = np.array([-0.25, 0.25], np.float32)


@method
class Entropy(Method):
    """Components in whole steps under models of their own, a fixed number of bytes a block.

    Parameters
    ----------
    step : of every component of an average block, in roots of a nat; each block's own is near it
    """

    calibrated = True
    step: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.step < math.inf:
            raise SpecError(f"entropy: step must be positive, not {self.step}")

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        cls.known(statistics)
        yield from (cls(0.5 * 2.0 ** (-k / 2)) for k in range(24))

    def between(self, other: Self, t: float) -> Self | None:
        return type(self)(float(self.step ** (1 - t) * other.step**t))

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        return _Entropy.of(facts, self.known(statistics), self.step)


@dataclass(frozen=True, eq=False)
class _Stream:
    """Keys or values of a layer.

    Attributes
    ----------
    mean : float16 (heads, width)
    up : (heads, kept, width), what components are multiplied with
    rest : (heads, width - kept, width), the other rows of the basis, which the way down needs
    """

    mean: torch.Tensor
    up: Rows
    rest: Rows

    @classmethod
    def of(cls, stream: StreamStatistics, step: float) -> _Stream:
        kept = components_kept(stream.basis.variances > LEAST * step * step)
        mean = np.clip(stream.mean, -HALF_MAX, HALF_MAX).astype(np.float16)
        rows = stream.basis.synthesis
        return cls(torch.from_numpy(mean), Rows.of(rows[:, :kept]), Rows.of(rows[:, kept:]))

    @property
    def kept(self) -> int:
        """Components of each head that are coded."""
        return self.up.codes.shape[1]

    def components(self, x: torch.Tensor) -> torch.Tensor:
        """(..., heads, tokens, kept) of float32 (..., heads, tokens, width)."""
        down = inverse(torch.cat([self.up.floats(), self.rest.floats()], 1))
        return (x - self.mean.float()[:, None]) @ down[:, :, : self.kept]

    def vectors(self, z: torch.Tensor) -> torch.Tensor:
        """Inverse of `components`, near enough."""
        return z @ self.up.floats() + self.mean.float()[:, None]


@dataclass(frozen=True, eq=False)
class _Entropy(Coder):
    position_free: ClassVar[bool] = True

    facts: LayerFacts
    step: float
    both: tuple[_Stream, _Stream]  # keys and values
    columns: Columns
    block_nbytes: int

    @classmethod
    def of(cls, facts: LayerFacts, statistics: LayerStatistics, step: float) -> _Entropy:
        both = statistics.keys, statistics.values
        streams = _Stream.of(both[0], step), _Stream.of(both[1], step)
        samples = [
            one.components(torch.from_numpy(s.samples)).numpy()
            for one, s in zip(streams, both, strict=True)
        ]
        columns = fit_columns([z.swapaxes(1, 2) for z in samples], step)
        made, once = cls(facts, step, streams, columns, 0), columns.forgetful()
        blocks = range(0, samples[0].shape[1], BLOCK)
        nbytes = [
            len(made._pack([z[:, at : at + BLOCK] for z in samples], MIDDLE, once)) for at in blocks
        ]
        return replace(made, block_nbytes=math.ceil(SPARE * np.mean(nbytes)))

    @functools.cached_property
    def blocks(self) -> StepBlocks:
        keys, values = (
            StepTable(one.mean.numpy(), one.up.codes.numpy(), one.up.scale.numpy())
            for one in self.both
        )
        nbytes = HEAD + self.block_nbytes
        return StepBlocks(keys, values, self.columns, self.step, nbytes, self.facts.turn)

    @property
    def tables(self) -> Mapping[str, torch.Tensor]:
        found = {
            "shifts": torch.from_numpy(self.columns.shifts),
            "models": torch.from_numpy(self.columns.models),
            "pulls": torch.from_numpy(self.columns.pulls),
        }
        for name, one in zip(("keys", "values"), self.both, strict=True):
            parts = one.mean, *one.up.parts, *one.rest.parts
            found |= {f"{name}.{i}": part for i, part in enumerate(parts)}
        return found

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        plain = self.facts.unturned(keys, positions), values.float()
        z = [one.components(x).cpu().numpy() for one, x in zip(self.both, plain, strict=True)]
        columns = self.columns.forgetful()
        batch, _, tokens, _ = z[0].shape
        out = np.zeros((batch, tokens // BLOCK, HEAD + self.block_nbytes), np.uint8)
        for row in range(batch):
            for block in range(tokens // BLOCK):
                some = slice(block * BLOCK, (block + 1) * BLOCK)
                index, data = self._fit([x[row][:, some] for x in z], columns)
                write_block(index, data, out[row, block])
        return {"codes": torch.from_numpy(out)}

    def _pack(self, z: Sequence[Floats], index: int, columns: Columns) -> bytes:
        # What no step can hold is cut off: an outlier may not cost the block.
        step = step_at(self.step, index)
        reach = np.float32(FURTHEST * step)
        cut = [np.clip(x, -reach, reach).swapaxes(1, 2) for x in z]
        offsets = [np.zeros(x.shape[0] * x.shape[1], np.float32) for x in cut]
        return encode_chunk(cut, offsets, step, columns)

    def _fit(self, z: Sequence[Floats], columns: Columns) -> tuple[int, bytes]:
        """The finest step at which a block fits, near enough, and its bytes there."""
        low, high = 0, 256  # too many bytes at low - 1, few enough at high
        best: tuple[int, bytes] | None = None
        index = MIDDLE
        for _ in range(TRIES):
            data = self._pack(z, index, columns)
            spare = self.block_nbytes - len(data)
            if spare >= 0:
                best, high = (index, data), index
            else:
                low = index + 1
            active = max(1, self.columns.shifts.size) * BLOCK / 8 / OCTAVE
            index = int(np.clip(index - round(spare / active - 0.5), low, high - 1))
            if low >= high or (best is not None and 0 <= spare < active):
                break
        while best is None:
            # Beyond the coarsest step, what is largest is cut off: zeros always fit.
            z = z if low < 255 else [np.clip(x, *(np.abs(x).max() * CUT)) for x in z]
            low = min(255, low + OCTAVE)
            data = self._pack(z, low, columns)
            if len(data) <= self.block_nbytes:
                best = low, data
        return best

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.blocks.components(coded["codes"].cpu().numpy())
        keys, values = (
            one.vectors(torch.from_numpy(x)) for one, x in zip(self.both, z, strict=True)
        )
        return self.facts.turned(keys, positions), values.to(self.facts.dtype)
