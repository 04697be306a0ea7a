"""Attention over a cache in pieces, none of which needs to be a tensor for longer than it is read.

The softmax runs over the pieces one after another, rescaled whenever a larger score comes (Milakov and
Gimelshein 2018, arXiv 1805.02867). Sums and softmax are in float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from waterfill.runtime.cache.held.native import attend_natively
from waterfill.runtime.cache.held.states import View

__all__ = ["attend"]

SCORES = 1 << 24  # at once, at most: bounds what a long prompt takes

Seen = tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def attend(
    view: View, queries: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """``softmax(scale q k' + mask) v`` over a view of the past and the new tokens.

    Parameters
    ----------
    queries : (batch, heads, m, width); heads are a multiple of the view's
    mask : (batch or 1, heads or 1, m or 1, tokens), bool or to be added; None: causal

    Returns
    -------
    (batch, m, heads, value width), the dtype of the queries
    """
    quick = attend_natively(view, queries, mask, scale)
    if quick is not None:
        return quick
    batch, heads, m, _ = queries.shape
    most = max(1, SCORES // max(1, batch * heads * 1024))
    parts = []
    for low in range(0, m, most):
        some = slice(low, min(low + most, m))
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, some]
        parts.append(_attend(view, queries[:, :, some], part, scale, m - some.stop))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _attend(
    view: View, queries: torch.Tensor, mask: torch.Tensor | None, scale: float, later: int
) -> torch.Tensor:
    """As `attend`, of queries that `later` others follow."""
    batch, heads, m, width = queries.shape
    shared = view.keys.shape[1]
    q = queries.float().reshape(batch, shared, heads // shared, m, width) * scale
    top = q.new_full((*q.shape[:-1], 1), -torch.inf)
    total = torch.zeros_like(top)
    sums = q.new_zeros((*q.shape[:-1], view.values.shape[3]))
    for seen, keys, values, bias in _tensors(view):
        scores = q @ keys.float()[:, :, None].transpose(3, 4)
        if isinstance(seen, slice):
            scores = _masked(scores, mask, seen, view.tokens - later)
        else:
            scores = _masked_by_index(scores, mask, seen)
        if bias is not None:
            scores = scores.add_(bias[:, :, None, None])
        new = torch.maximum(top, scores.amax(-1, keepdim=True))
        safe = torch.where(new == -torch.inf, 0.0, new)
        weights = (scores - safe).exp_()
        decay = (top - safe).exp_()
        total = total * decay + weights.sum(-1, keepdim=True)
        sums = sums * decay + weights @ values.float()[:, :, None]
        top = new
    out = sums / torch.where(total == 0, 1.0, total)
    return out.reshape(batch, heads, m, -1).transpose(1, 2).to(queries.dtype)


def _tensors(view: View) -> Iterable[Seen]:
    """Which of the view's tokens, their keys and values, and what their scores get added."""
    for piece in view.past:
        if piece.index is not None:
            yield piece.index - view.first, *piece.read(), piece.bias
        else:
            start = piece.start - view.first
            yield slice(start, start + piece.stop - piece.start), *piece.read(), None
    yield slice(view.tokens - view.keys.shape[2], view.tokens), view.keys, view.values, None


def _masked(
    scores: torch.Tensor, mask: torch.Tensor | None, seen: slice, stop: int
) -> torch.Tensor:
    """Scores (batch, shared, group, m, keys) of the keys `seen`; the last query sees those before `stop`."""
    _, shared, group, m, _ = scores.shape
    if mask is None:
        last = torch.arange(stop - m, stop, device=scores.device)[:, None]
        hidden = torch.arange(seen.start, seen.stop, device=scores.device) > last
        return scores.masked_fill_(hidden, -torch.inf) if seen.stop > stop - m else scores
    part = mask[..., seen]
    if part.shape[1] not in (1, shared * group):
        part = part.expand(-1, shared * group, -1, -1)
    part = (
        part[:, :, None] if part.shape[1] == 1 else part.reshape(-1, shared, group, *part.shape[2:])
    )
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~part, -torch.inf)
    return scores.add_(part)


def _masked_by_index(
    scores: torch.Tensor, mask: torch.Tensor | None, seen: torch.Tensor
) -> torch.Tensor:
    """Scores of past tokens that each head has its own of: `seen` (batch, shared, keys), below 0: none."""
    batch, shared, group, _, n = scores.shape
    scores = scores.masked_fill_((seen < 0)[:, :, None, None], -torch.inf)
    if mask is None:
        return scores
    own = (shared, group) if mask.shape[1] == shared * group else (1, 1)
    part = mask.reshape(-1, *own, *mask.shape[2:])
    part = part.expand(batch, shared, *part.shape[2:])
    at = seen.clamp_min(0).long()[:, :, None, None]
    part = part.gather(4, at.expand(-1, -1, part.shape[2], part.shape[3], n))
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~part, -torch.inf)
    return scores.add_(part)
