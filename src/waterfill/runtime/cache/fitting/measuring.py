"""Sets the scale of harm by measurement: what the Fisher information predicts is right in shape only.

Each stream of each layer in turn is replaced by what a coarse coding leaves of it, and the KL divergence
of the next token is held against what the matrices predict of the very same errors. The ratio, between a
third and three on real models, scales the stream's matrices. It is measured of small errors and of large
ones, which a confident model hardly minds until they turn its answer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics, StreamStatistics
from waterfill.runtime.cache.method import BLOCK
from waterfill.runtime.cache.rotary import Rotary
from waterfill.runtime.quick import attention_forward, standing_in

__all__ = ["still_exact", "to_scale"]

# Predicted of a stream as it is coded here: seen well and still small, and as where bytes are few.
SMALL_NATS, LARGE_NATS = 3e-3, 3e-2
TOKENS = 2048  # of a window, at most: errors in a long past add up otherwise than in a short one
ROWS = 256  # queries at once
LEAST, MOST = 1 / 8, 8.0  # a ratio beyond is noise

# Tokens that a cache still has as they were: the last, about, and the first.
YOUNG, SINKS = BLOCK // 2 + 2, 4

Case = tuple[int, str, float]  # layer, stream, nats
Pair = tuple[torch.Tensor, torch.Tensor]


def still_exact(first: int, stop: int) -> torch.Tensor:
    """Which keys a cache has as they were when queries first to stop come: bool (stop - first, stop)."""
    index = torch.arange(stop)
    return (index[first:, None] - index < YOUNG) | (index < SINKS)


def to_scale(
    model: Any,
    facts: Mapping[int, LayerFacts],
    layers: Mapping[int, LayerStatistics],
    windows: torch.Tensor,
) -> dict[int, LayerStatistics]:
    """The same statistics, each stream's harm multiplied by what was measured of it over what was predicted.

    The harm of small errors; how much more, or less, large ones cost by it goes beside it as `growth`.

    Parameters
    ----------
    model : transformers.PreTrainedModel, whose attention is this package's
    facts, layers : by index of the layer
    windows : int64 (count, tokens); takes four forward passes of each window for every layer, and one more
    """
    ratios: dict[Case, list[float]] = {}
    for window in windows[:, :TOKENS]:
        exact = _chances(model, window)
        for index, stream, nats in itertools.product(
            layers, ("keys", "values"), (SMALL_NATS, LARGE_NATS)
        ):
            coarse = _Coarse(facts[index], getattr(layers[index], stream), stream, nats)
            with standing_in(coarse.attention):
                coded = _chances(model, window)
            measured = float((exact.exp() * (exact - coded)).sum(-1).mean())
            predicted = coarse.harm_nats / len(window)
            ratios.setdefault((index, stream, nats), []).append(measured / max(predicted, 1e-30))
    return {
        index: LayerStatistics(*(_scaled(one, ratios, index, s) for s in ("keys", "values")))
        for index, one in layers.items()
    }


def _chances(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every next token, (tokens, vocabulary)."""
    with torch.no_grad():
        logits = model(input_ids=window[None].to(model.device), use_cache=False).logits[0]
    found: torch.Tensor = logits.float().log_softmax(-1)
    return found


def _scaled(
    one: LayerStatistics, ratios: Mapping[Case, list[float]], index: int, stream: str
) -> StreamStatistics:
    own: StreamStatistics = getattr(one, stream)
    small, large = (
        np.clip(np.float32(np.mean(ratios[index, stream, nats])), LEAST, MOST)
        for nats in (SMALL_NATS, LARGE_NATS)
    )
    return dataclasses.replace(own, harm=own.harm * small, growth=np.array([large / small]))


class _Coarse:
    """Stands in for attention while a stream of a layer is what whole steps leave of it.

    Attributes
    ----------
    harm_nats : that the matrices predict of all errors so far
    """

    def __init__(
        self, facts: LayerFacts, statistics: StreamStatistics, stream: str, nats: float
    ) -> None:
        self.facts, self.stream, self.harm_nats = facts, stream, 0.0
        basis = statistics.basis
        self.step = _step(basis.variances, nats)
        self.mean = torch.from_numpy(statistics.mean)[:, None]
        self.down = torch.from_numpy(basis.analysis.astype(np.float32))
        self.up = torch.from_numpy(basis.synthesis.astype(np.float32))
        self.harm = torch.from_numpy(statistics.harm)

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if getattr(module, "layer_idx", None) != self.facts.index:
            return attention_forward(module, query, key, value, mask, **kwargs)
        coded_key, coded_value = key, value
        if self.stream == "keys":
            coded_key = self._coded(key, self.facts.rotary)
        else:
            coded_value = self._coded(value, None)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        exact = (key, value)
        return self._attend(query, exact, (coded_key, coded_value), scale).to(query.dtype), None

    def _attend(self, query: torch.Tensor, exact: Pair, coded: Pair, scale: float) -> torch.Tensor:
        """Attention to tokens as they were where they still are exact, else as they are coded."""
        n = query.shape[2]
        found = [
            self._attend_some(query, exact, coded, scale, low, min(low + ROWS, n))
            for low in range(0, n, ROWS)
        ]
        return torch.cat(found, 1)

    def _attend_some(
        self, query: torch.Tensor, exact: Pair, coded: Pair, scale: float, low: int, high: int
    ) -> torch.Tensor:
        """The same of queries low to high: (batch, queries, heads, width)."""
        batch, heads, _, _ = query.shape
        shared, n = exact[0].shape[1], high - low
        q = query[:, :, low:high].float().reshape(batch, shared, heads // shared * n, -1) * scale
        gap = torch.arange(low, high)[:, None] - torch.arange(high)
        window = self.facts.window
        hidden = (gap < 0) if window is None else (gap < 0) | (gap >= window)
        seen = [[x[:, :, :high].float() for x in pair] for pair in (exact, coded)]
        new = still_exact(low, high)
        new, hidden = (x.repeat(heads // shared, 1) for x in (new, hidden))
        as_was, as_coded = (q @ pair[0].transpose(2, 3) for pair in seen)
        p = torch.where(new, as_was, as_coded).masked_fill_(hidden, -torch.inf).softmax(-1)
        out: torch.Tensor = (p * new) @ seen[0][1] + p.masked_fill(new, 0.0) @ seen[1][1]
        return out.reshape(batch, heads, n, -1).transpose(1, 2)

    def _coded(self, x: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
        positions = torch.arange(x.shape[2])[None]
        turned = (
            x.float().cpu() if rotary is None else rotary.turn(x.float().cpu(), positions, True)
        )
        z = (turned - self.mean) @ self.down
        coded = torch.round(z / self.step) * self.step @ self.up + self.mean
        error = coded - turned
        self.harm_nats += float(torch.einsum("bhni,hij,bhnj->", error, self.harm, error))
        return (coded if rotary is None else rotary.turn(coded, positions)).to(x.device, x.dtype)


def _step(variances: NDArray[np.float64], nats: float) -> float:
    """The step that brings components of these variances to so many nats, or all of them to nothing."""
    low, high = -60.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if np.minimum(variances, 4.0**middle / 12).sum() > nats:
            high = middle
        else:
            low = middle
    return float(2.0**low)
