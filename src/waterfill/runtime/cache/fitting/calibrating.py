"""Learns a model's keys and values from text: moments, samples, and what an error in them costs.

Attention's output o at a token m changes by ``sum p (v + dv)``; with g the gradient of the log-likelihood of
a sampled next token there, the Fisher information makes the harm of a change ``(g . do)^2 / 2`` nats. To
first order a key's error e changes o by ``p (q . e) scale (v - o)``, a value's by ``p e``. Summed over the
tokens that read it, either is a quadratic form in e (`harm`). One forward and one backward pass of each
window; no weight gets a gradient.

A prediction that is all but certain has no such information, yet an error that is not small may turn it. So
next tokens are sampled, and their likelihood is taken, at a temperature above 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from waterfill.runtime.cache.facts import LayerFacts, facts_of
from waterfill.runtime.cache.fitting.measuring import still_exact, to_scale
from waterfill.runtime.cache.fitting.statistics import (
    CacheStatistics,
    LayerStatistics,
    StreamStatistics,
)
from waterfill.runtime.cache.method import BLOCK
from waterfill.runtime.quick import attention_forward, standing_in, swap_attention
from waterfill.types import WaterfillError

__all__ = ["calibrate_cache"]

SAMPLES = 256  # tokens kept of each layer
ROWS = 256  # of logits that are looked at in float32 at once
PROBE = 1024  # tokens kept, at most, for the guard to try a cache on
MEASURED = 2  # windows on which the scale of harm is measured
TEMPERATURE = 2.0
READERS = 32  # keys of a window whose readers are looked at in the key's own frame


@dataclass
class _Sums:
    """Of one stream of a layer."""

    count: int = 0
    total: Any = 0.0
    square: Any = 0.0
    harm: Any = 0.0
    samples: list[torch.Tensor] = field(default_factory=list)

    def add(self, x: torch.Tensor, harm: torch.Tensor, every: int, window: int) -> None:
        """x (heads, tokens, width) and harm (heads, width, width) of a window."""
        self.count += x.shape[1]
        self.total += x.double().sum(1)
        self.square += x.double().transpose(1, 2) @ x.double()
        self.harm += harm.double()
        if window % every == 0 and sum(s.shape[1] for s in self.samples) < SAMPLES:
            at = (window // every * BLOCK) % max(1, x.shape[1] - BLOCK)
            self.samples.append(x[:, at : at + BLOCK].clone())

    def finish(self, windows: int) -> StreamStatistics:
        mean = self.total / self.count
        covariance = self.square / self.count - mean[:, :, None] * mean[:, None, :]
        arrays = mean, covariance, self.harm / windows, torch.cat(self.samples, 1)
        return StreamStatistics(*(np.asarray(a.float().cpu().numpy(), np.float32) for a in arrays))


def calibrate_cache(
    model: Any,
    windows: Sequence[Sequence[int]] | torch.Tensor,
    *,
    seed: int = 0,
    protocol: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CacheStatistics:
    """Statistics of a model's cache on text.

    Parameters
    ----------
    model : transformers.PreTrainedModel, whose attention is set to this package's
    windows : int (count, tokens), tokens of text; some dozens of full windows are plenty
    seed : of the next tokens that are sampled
    protocol : how the windows were made, kept with the result
    progress : called with windows done and windows in all

    Raises
    ------
    WaterfillError
        If the model has no cache of this kind, or its attention cannot be watched.
    """
    facts = {one.index: one for one in facts_of(model) if one is not None}
    ids = torch.as_tensor(windows)
    if ids.dim() != 2 or ids.shape[1] < 2 * BLOCK:
        raise WaterfillError(
            f"windows of at least {2 * BLOCK} tokens, please, not {tuple(ids.shape)}"
        )
    swap_attention(model)
    sums = {index: (_Sums(), _Sums()) for index in facts}
    every = max(1, len(ids) * BLOCK // SAMPLES)
    generator = torch.Generator().manual_seed(seed)
    with _only_activations(model):
        for number, window in enumerate(ids):
            watch = _Watch(facts, sums, every, number)
            with standing_in(watch.attention):
                logits = model(input_ids=window[None].to(model.device), use_cache=False).logits[0]
            if watch.seen != facts.keys() or not logits.requires_grad:
                raise WaterfillError(
                    f"the attention of {type(model).__name__} cannot be watched, or reads other things "
                    "than its cache holds: choose a method that needs no statistics, such as channel"
                )
            logits.backward(_pull(logits.detach(), generator))
            progress(number + 1, len(ids))
    layers = {
        index: LayerStatistics(*(stream.finish(len(ids)) for stream in pair))
        for index, pair in sums.items()
        if pair[0].count
    }
    layers = to_scale(model, facts, layers, ids[:: max(1, len(ids) // MEASURED)][:MEASURED])
    text = {
        "model_type": model.config.model_type,
        "windows": len(ids),
        "tokens": ids.shape[1],
        "seed": seed,
        "probe": ids[-1, :PROBE].tolist(),
        **(protocol or {}),
    }
    return CacheStatistics(layers, text)


def _pull(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient of the log-likelihood of tokens drawn from logits (tokens, vocabulary) at the temperature."""
    found = torch.empty_like(logits)
    for low in range(0, len(logits), ROWS):
        chances = (logits[low : low + ROWS].float() / TEMPERATURE).softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator)
        found[low : low + ROWS] = chances.neg_().scatter_add_(1, drawn, torch.ones(drawn.shape))
    return found


@contextlib.contextmanager
def _only_activations(model: Any) -> Iterator[None]:
    """Without gradients of weights, and without dropout, while it runs."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.eval()
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        model.train(training)


class _Watch:
    """Stands in for attention while a window is read, and looks at what goes in and comes back."""

    def __init__(
        self,
        facts: dict[int, LayerFacts],
        sums: dict[int, tuple[_Sums, _Sums]],
        every: int,
        number: int,
    ) -> None:
        self.facts, self.sums, self.every, self.number = facts, sums, every, number
        self.seen: set[int] = set()

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        with torch.enable_grad():
            query = query if query.requires_grad else query.detach().requires_grad_()
            out, _ = attention_forward(module, query, key, value, mask, **kwargs)
        index = getattr(module, "layer_idx", None)
        if index in self.facts and out.requires_grad and self._as_cached(index, key, value):
            self.seen.add(index)
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            window = self.facts[index].window
            states = tuple(x.detach()[0] for x in (query, key, value, out.transpose(1, 2)))

            def learn(gradient: torch.Tensor) -> None:
                with torch.no_grad():
                    g = gradient[0].transpose(0, 1).float()
                    self._learn(self.facts[index], states, g, scale, window)

            out.register_hook(learn)  # type: ignore[no-untyped-call]
        return out, None

    def _as_cached(self, index: int, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether attention reads what the cache holds: some models make it from that."""
        one = self.facts[index]
        held = (one.heads, one.key_width), (one.heads, one.value_width)
        return held == ((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))

    def _learn(
        self,
        facts: LayerFacts,
        states: tuple[torch.Tensor, ...],
        g: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        # Until here they are those that the graph holds anyway.
        q, k, v, o = (x.float() for x in states)
        heads, n, _ = q.shape
        group = heads // k.shape[0]
        positions = torch.arange(n)
        plain = facts.unturned(k[None], positions[None])[0]
        key_harm = k.new_zeros((k.shape[0], k.shape[2], k.shape[2]))
        value_harm = v.new_zeros((v.shape[0], v.shape[2], v.shape[2]))
        gap = positions[:, None] - positions[None]
        hidden = (gap < 0) if window is None else (gap < 0) | (gap >= window)
        exact = still_exact(0, n)
        readers = torch.linspace(0, n - 1, min(READERS, n)).long()
        for head in range(heads):
            own = head // group
            p = (q[head] @ k[own].T * scale).masked_fill(hidden, -torch.inf).softmax(-1)
            p = p.masked_fill(exact, 0.0)
            pull = g[head] @ v[own].T - (g[head] * o[head]).sum(-1, keepdim=True)
            w = 0.5 * (scale * p * pull).square_()  # of reader m and key n
            value_harm[own] += 0.5 * (g[head].T * p.square().sum(1)) @ g[head] / n
            for at in readers.tolist():
                asked = q[head]
                if facts.rotary is not None:
                    # As seen from the key's own frame.
                    asked = facts.rotary.turn(asked[None, None], torch.full((1, n), at), True)[0, 0]
                key_harm[own] += (asked.T * w[:, at]) @ asked / len(readers)
        keys, values = self.sums[facts.index]
        keys.add(plain, key_harm, self.every, self.number)
        values.add(v, value_harm, self.every, self.number)
