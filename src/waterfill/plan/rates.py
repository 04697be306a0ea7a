"""Points at a given rate: what allocators that think in bits per weight share.

A rung means the same everywhere: ``integer:bits=3`` is three bits and a little for all tensors, though
that little differs with their shapes. So a rung's rate is that of all tensors which have it, taken
together, and tensors take it all at once. Continuous codecs are taken at the very rate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from waterfill.plan.hull import Curves, point_on
from waterfill.types import Point, TensorInfo

__all__ = ["Rates", "block_of", "graded"]

F64 = NDArray[np.float64]
STEPS = 60  # of bisection
SPREAD = 1.0  # bits per weight between the most and the least important block
_BLOCK = re.compile(r"^(?:.*?\.)?\d+(?=\.)")


@dataclass(frozen=True)
class Rates:
    """The segments of some curves, with their rates.

    Attributes
    ----------
    curves : Curves
    owner : int (segments,) tensor of each segment
    sizes : float64 (tensors,) weights
    needs : float64 (segments,) bits per weight from which on a segment may be taken
    """

    curves: Curves
    owner: NDArray[np.intp]
    sizes: F64
    needs: F64

    @classmethod
    def of(cls, c: Curves, infos: Mapping[str, TensorInfo]) -> Rates:
        """Of curves whose tensors are known."""
        sizes = np.array([max(infos[name].size, 1) for name in c.names], np.float64)
        owner = np.repeat(np.arange(len(c.names)), np.diff([*c.start, len(c.b0)]))
        sliding = {(t, c.ends[s][0].spec.id) for s, t in enumerate(owner) if c.b1[s] > c.b0[s]}
        needs = 8 * c.b0 / sizes[owner]
        alike: dict[str, list[int]] = {}
        for s, t in enumerate(owner):
            spec = c.ends[s][0].spec
            if (t, spec.id) not in sliding:
                alike.setdefault(json.dumps(spec.to_json()), []).append(s)
        for same in alike.values():
            needs[same] = 8 * c.b0[same].sum() / sizes[owner[same]].sum()
        return cls(c, owner, sizes, needs)

    def at(self, rates: F64) -> tuple[F64, NDArray[np.intp]]:
        """Bytes and segment of each tensor at so many bits per weight: the least harm it can have.

        A tensor with nothing so cheap takes what it has of fewest bytes.
        """
        c = self.curves
        rate = rates[self.owner]
        nbytes = np.clip(rate * self.sizes[self.owner] / 8, c.b0, c.b1)
        nats = c.d0 * np.exp(-c.decay * (nbytes - c.b0))
        able = self.needs <= rate * (1 + 1e-12)
        # Those that fit by harm, then all others by size; among equals the smallest.
        order = np.lexsort((nbytes, np.where(able, nats, c.b0), ~able, self.owner))
        pick = order[c.start]
        return nbytes[pick], pick

    def fill(self, offsets: F64, budget: float) -> dict[str, Point]:
        """Every tensor at a common rate plus an offset of its own: the largest rate that fits.

        Parameters
        ----------
        offsets : float64 (tensors,), bits per weight
        budget : bytes
        """
        low, high = -1.0 - float(offsets.max()), 65.0 - float(offsets.min())
        for _ in range(STEPS):
            middle = (low + high) / 2
            fits = self.at(middle + offsets)[0].sum() <= budget
            low, high = (middle, high) if fits else (low, middle)
        nbytes, pick = self.at(low + offsets)
        chosen = zip(self.curves.names, pick, nbytes, strict=True)
        return {name: point_on(self.curves, int(s), float(b)) for name, s, b in chosen}


def block_of(info: TensorInfo) -> str:
    """Name of the block that a tensor is part of, as far as its name tells; "" for none."""
    found = _BLOCK.match(info.tensor)
    return found[0] if found else ""


def graded(names: Sequence[str], importance: Mapping[str, float]) -> F64:
    """Offsets by rank: the more important, the more bits; up to `SPREAD` apart.

    On rungs a bit apart this is the order of Dumitru et al. (2024): with a growing budget one group
    after the other goes a rung up, the most important first. Tensors of no known importance are in
    the middle.
    """
    levels = sorted(set(importance.values()))
    place = {value: (i + 0.5) / len(levels) for i, value in enumerate(levels)}
    ranks = [place[importance[name]] if name in importance else 0.5 for name in names]
    return SPREAD * np.array(ranks, np.float64)
