"""How much keys are looked at, from a few late queries.

What a key receives is summed over the queries that can see it and divided by how many these are: without
that, early keys would win by their age alone. A few probe queries stand for all (He et al. 2024, ZipCache,
arXiv 2405.14256). Attention is normalised over the keys that are at hand exactly; what is coded already
is left out, which would take longer to read than to attend to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

__all__ = ["Probes"]

CHUNK = 1024  # keys scored at once


class Probes:
    """Late queries, and the keys they may look at.

    Parameters
    ----------
    queries : (batch, query heads, count, width), of tokens `stop` - count to `stop`
    stop : index after the last query's token
    window : tokens that a query sees, its own included; None: all before it
    """

    def __init__(self, queries: torch.Tensor, stop: int, window: int | None = None) -> None:
        self.queries, self.window = queries.float(), window
        self.index = torch.arange(stop - queries.shape[2], stop, device=queries.device)
        self.total: torch.Tensor | None = None  # (batch, heads, group, count, 1), log of the sum

    def look(self, keys: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Normalise over these keys.

        Parameters
        ----------
        keys : index of the first of some, and (batch, heads, tokens, width)
        """
        for start, some in keys:
            for at, part in _parts(start, some):
                scores, _ = self._scores(at, part)
                more = scores.logsumexp(-1, keepdim=True)
                self.total = more if self.total is None else torch.logaddexp(self.total, more)

    def saliency(self, start: int, keys: torch.Tensor) -> torch.Tensor:
        """Mean attention by the queries that see each key: float32 (batch, heads, tokens); 0 where none does.

        Parameters
        ----------
        start : index of the first key
        keys : (batch, heads, tokens, width), among those that `look` was given
        """
        assert self.total is not None
        means = []
        for at, part in _parts(start, keys):
            scores, seen = self._scores(at, part)
            # A query that sees nothing here has no total either.
            weights = (scores - self.total).exp().nan_to_num(0.0)
            means.append(weights.mean(2).sum(2) / seen.sum(0).clamp_min(1))
        return torch.cat(means, 2)

    def _scores(self, start: int, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (batch, heads, group, count, keys), -inf where unseen, and what is seen (count, keys)."""
        batch, heads, tokens, width = keys.shape
        q = self.queries.reshape(batch, heads, -1, *self.queries.shape[2:])
        scores = q @ keys.float()[:, :, None].transpose(3, 4) * width**-0.5
        gap = self.index[:, None] - torch.arange(start, start + tokens, device=keys.device)
        seen = gap >= 0 if self.window is None else (gap >= 0) & (gap < self.window)
        return scores.masked_fill_(~seen, -torch.inf), seen


def _parts(start: int, keys: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    for low in range(0, keys.shape[2], CHUNK):
        yield start + low, keys[:, :, low : low + CHUNK]
