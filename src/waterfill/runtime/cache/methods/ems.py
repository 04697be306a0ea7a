"""Evict, then merge: importance of each head's own, and what resembles a kept token is not lost.

Importance is the attention a token received from all queries that could see it, and from the last few.
The least important are dropped; those in between are merged into the kept token whose key is most like
theirs, unless none is like it ("zero class") (Li et al. 2024, EMS, arXiv 2412.08521).

A merged key and value is the mean weighted by importance, so that tokens nobody looks at hardly move one
that is looked at; in the scores it weighs as many as it stands for.
"""

from __future__ import annotations

import torch

from waterfill.runtime.cache.held.attending import SCORES
from waterfill.runtime.cache.held.evicting import Evictor
from waterfill.runtime.cache.held.kept import Held, Moment
from waterfill.runtime.cache.method import method
from waterfill.types import SpecError

__all__ = ["Ems"]

LITTLE = 1e-9  # importance below which shares of it say nothing


@method
class Ems(Evictor):
    """Tokens of most attention, others merged into them.

    Parameters
    ----------
    threshold : cosine of keys above which tokens are merged
    candidates : evicted tokens that are weighed for merging, as a multiple of those kept
    """

    late = 32
    threshold: float = 0.6
    candidates: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.threshold <= 1 or not self.candidates >= 0:
            raise SpecError("ems: threshold must be -1 to 1, and candidates not negative")

    def evict(self, held: Held, moment: Moment) -> Held:
        importance = importance_of(held, moment)
        order = moment.ranked(importance).argsort(2, descending=True)
        kept = order[:, :, : moment.keep].sort(2).values
        found = held.take(kept)
        more = min(held.slots - moment.keep, int(self.candidates * moment.keep))
        if not more:
            return found
        evicted = order[:, :, moment.keep : moment.keep + more]
        own = importance.gather(2, kept)
        stays = (moment.forced | moment.gone).gather(2, kept)
        shares = importance.gather(2, evicted).masked_fill_(moment.gone.gather(2, evicted), 0.0)
        target, similarity = nearest(held.take(evicted).keys, found.keys, stays)
        shares = shares.masked_fill_(similarity <= self.threshold, 0.0)
        return _merged(found, own, held.take(evicted), shares, target)


def importance_of(held: Held, moment: Moment) -> torch.Tensor:
    """float32 (batch, heads, slots): mean attention of all queries that saw a token, and of the last ones."""
    mean = (held.mass / moment.age.clamp_min(1)).masked_fill_(moment.gone, 0.0)
    late = held.late.masked_fill(moment.gone, 0.0)
    # The two are of one scale when each head's sum to the same.
    scale = late.sum(2, True) / mean.sum(2, True).clamp_min(LITTLE)
    return mean.mul_(scale).add_(late)


def nearest(
    keys: torch.Tensor, kept: torch.Tensor, barred: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept key that is most like each, and the cosine between them.

    Parameters
    ----------
    keys, kept : (batch, heads, n or m, width)
    barred : bool (batch, heads, m), kept ones that take nothing in
    """
    to = torch.nn.functional.normalize(kept.float(), dim=3).transpose(2, 3)
    most = max(1, SCORES // max(1, barred.numel()))
    found = []
    for low in range(0, keys.shape[2], most):
        some = keys[:, :, low : low + most].float()
        cosine = torch.nn.functional.normalize(some, dim=3) @ to
        found.append(cosine.masked_fill_(barred[:, :, None], -torch.inf).max(3))
    return torch.cat([f.indices for f in found], 2), torch.cat([f.values for f in found], 2)


def _merged(
    kept: Held, own: torch.Tensor, evicted: Held, shares: torch.Tensor, target: torch.Tensor
) -> Held:
    """Kept slots with evicted ones, of so much importance, in those they are merged into."""
    own = own.clamp_min(LITTLE)
    total = own.scatter_add(2, target, shares)
    taken = shares > 0
    weight = kept.weight.scatter_add(2, target, evicted.weight * taken)
    alone = (weight == kept.weight)[..., None]

    def moved(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        at = target[..., None].expand(-1, -1, -1, x.shape[3])
        sums = (x.float() * own[..., None]).scatter_add_(2, at, y.float() * shares[..., None])
        # Those that took nothing in stay as they are to the bit.
        return torch.where(alone, x, (sums / total[..., None]).to(x.dtype))

    grown = total / own
    return Held(
        moved(kept.keys, evicted.keys), moved(kept.values, evicted.values),
        kept.index, weight, kept.mass * grown, kept.late * grown,
    )  # fmt: skip
