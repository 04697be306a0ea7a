"""Anchors and buckets: the prompt's most attended tokens, each with the mean of what lies around it.

While a prompt is read, the tokens that received most attention become anchors, and every other token is
merged into the anchor closest to it. While text is written, tokens leave at a fixed distance from the
cache's end as it was after the prompt, so that the first and the most recent ones stay (Liu et al. 2024,
Elastic Cache, arXiv 2407.18121). All heads of a layer keep the same tokens.

As in the paper the mean is plain, and attention is summed over all queries. Where few tokens are kept that
blurs an anchor with many that lie around it, and favours those that were there early: a needle is lost so.
Both can be chosen otherwise. Other than in the paper, an anchor weighs in the scores as many as it stands for.
"""

from __future__ import annotations

import torch

from waterfill.runtime.cache.held.evicting import Evictor
from waterfill.runtime.cache.held.kept import Held, Moment
from waterfill.runtime.cache.method import method
from waterfill.types import SpecError

__all__ = ["Elastic"]


@method
class Elastic(Evictor):
    """Anchors of most attention, their neighbours merged into them.

    Parameters
    ----------
    distance : slots from the end at which tokens leave while text is written
    merged : whether what is no anchor is merged into one, 1, or dropped, 0
    attention : that makes an anchor: the "sum" over all queries, or the "mean" over those that see a token
    """

    distance: int = 25
    merged: int = 1
    attention: str = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merged not in (0, 1):
            raise SpecError(f"elastic: merged must be 0 or 1, not {self.merged}")
        if self.attention not in ("sum", "mean"):
            raise SpecError(f"elastic: attention must be sum or mean, not {self.attention}")
        if self.distance < 0:
            raise SpecError(f"elastic: distance must not be negative, not {self.distance}")

    def evict(self, held: Held, moment: Moment) -> Held:
        return self._anchored(held, moment) if moment.prompt else self._slid(held, moment)

    def _anchored(self, held: Held, moment: Moment) -> Held:
        mass = held.mass if self.attention == "sum" else held.mass / moment.age.clamp_min(1)
        importance = mass.mean(1, True).expand_as(mass)
        order = moment.ranked(importance).argsort(dim=2, descending=True, stable=True)
        kept = order[:, :, : moment.keep].sort(2).values
        evicted = order[:, :, moment.keep :]
        found, other = held.take(kept), held.take(evicted)
        if not self.merged:
            return found
        closed = (moment.forced | moment.gone).gather(2, kept)
        anchors = found.index.float().masked_fill(closed, torch.inf)
        target = _closest(anchors, other.index)
        counts = other.weight.masked_fill(moment.gone.gather(2, evicted), 0.0)
        counts = counts.masked_fill(closed.gather(2, target), 0.0)
        total = found.weight.scatter_add(2, target, counts)

        def moved(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            at = target[..., None].expand(-1, -1, -1, x.shape[3])
            sums = x.float() * found.weight[..., None]
            sums = sums.scatter_add_(2, at, y.float() * counts[..., None])
            # Those that took nothing in stay as they are to the bit.
            return torch.where(
                (total == found.weight)[..., None], x, (sums / total[..., None]).to(x.dtype)
            )

        keys, values = moved(found.keys, other.keys), moved(found.values, other.values)
        return Held(keys, values, found.index, total, found.mass, found.late)

    def _slid(self, held: Held, moment: Moment) -> Held:
        point = max(0, moment.keep - self.distance)
        slots = torch.arange(held.slots, dtype=torch.float32, device=held.index.device)
        first_or_recent = torch.where(slots < point, torch.inf, slots).expand(held.index.shape)
        order = moment.ranked(first_or_recent).argsort(dim=2, descending=True, stable=True)
        return held.take(order[:, :, : moment.keep].sort(2).values)


def _closest(anchors: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Slot of the anchor whose index is closest to each.

    Parameters
    ----------
    anchors : float32 (batch, heads, m), indices; inf: no anchor
    index : (batch, heads, n)
    """
    ordered, slots = anchors.sort(2)
    wanted = index.float()
    right = torch.searchsorted(ordered, wanted).clamp_max(anchors.shape[2] - 1)
    left = (right - 1).clamp_min(0)
    before = (wanted - ordered.gather(2, left)).abs() <= (ordered.gather(2, right) - wanted).abs()
    return slots.gather(2, torch.where(before, left, right))
