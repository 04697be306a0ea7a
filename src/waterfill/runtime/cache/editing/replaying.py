"""Has a model read tokens over a cache's past without the cache taking note of them.

Splices, composed segments and the guard's probes all do: a `Past` is in the place of a layer's store, shows
tokens that others hold, and keeps the new ones to itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache

from waterfill.runtime.cache.facts import LayerFacts, quiet
from waterfill.runtime.cache.held.pieces import Pair, Piece, between, exact_piece
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.layer import CodedLayer, CodedSlidingLayer, coded_layer
from waterfill.runtime.cache.naming import as_argument
from waterfill.types import WaterfillError

__all__ = ["Past", "ids_of", "read_tokens"]


def ids_of(model: Any, tokens: Any) -> torch.Tensor:
    """Token ids as int64, of whatever shape; WaterfillError if they are none of the model's."""
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        raise WaterfillError(f"token ids, please, not {tokens!r}") from None
    if not ids.numel():
        return ids.long()
    known = model.config.get_text_config(decoder=True).vocab_size
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or int(ids.min()) < 0 or int(ids.max()) >= known:
        raise WaterfillError(f"token ids of this model are whole numbers from 0 to {known - 1}")
    return ids.long()


class Past(Store):
    """What a layer has seen, and what it reads now, all exact or held by others.

    Parameters
    ----------
    facts : of the layer
    shown : pieces in order, up to the last token; a layer with a window may do without the first
    """

    def __init__(self, facts: LayerFacts, shown: Sequence[Piece] = ()) -> None:
        super().__init__(facts, [], Track(), 0, 0)
        self.shown = list(shown)

    @classmethod
    def of(cls, store: Store, stop: int) -> Past:
        """The first `stop` tokens of a store."""
        pieces = [p for p in store.pieces() if p.start < stop]
        return cls(store.facts, [between(piece, 0, stop) for piece in pieces])

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self.shown[-1].stop if self.shown else 0

    def split(self, run: Piece) -> Iterator[Piece]:
        """What is shown is in parts already, and where it is others know."""
        yield run

    def runs(self, first: int = 0) -> tuple[Piece, ...]:
        """As of any store."""
        return tuple(between(piece, first) for piece in self.shown if piece.stop > first)

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
    ) -> None:
        """Keep new tokens as they are."""
        self.show((keys, values))

    def show(self, pair: Pair) -> None:
        """Have seen these tokens too."""
        self.shown.append(exact_piece(self.tokens, pair))

    def settle(self, coming: int = 0) -> None:
        """Nothing is coded."""

    def drop_before(self, first: int) -> None:
        """Nothing is dropped."""

    def states(self, start: int, stop: int) -> Pair:
        """Keys and values of tokens from index `start` to `stop`."""
        parts = [
            between(p, start, stop).read() for p in self.shown if p.start < stop and p.stop > start
        ]
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)


@torch.no_grad()
def read_tokens(
    model: Any,
    pasts: Mapping[int, Past],
    others: Sequence[Any],
    ids: torch.Tensor,
    positions: torch.Tensor,
    logits: int = 1,
) -> torch.Tensor:
    """Logits of a model that reads tokens after others; their keys and values are added to `pasts`.

    Parameters
    ----------
    pasts : layer -> what it has seen
    others : all layers of a cache; those not in `pasts` are used as they are, and change
    ids : int64 (batch, tokens)
    positions : int64 (batch or 1, tokens seen and new ones), below zero for padding
    logits : of how many last tokens, at least

    Returns
    -------
    (batch, `logits` or more, vocabulary)
    """
    layers = [coded_layer(pasts[i]) if i in pasts else layer for i, layer in enumerate(others)]
    for layer in layers:
        if isinstance(layer, CodedSlidingLayer):
            layer.cumulative_length = layer.store.tokens
    padded = bool((positions < 0).any())
    rows = (len(ids), -1)
    kept = {"logits_to_keep": logits} if _keeps_logits(type(model)) else {}
    with quiet(model):
        found = model(
            input_ids=ids.to(model.device),
            attention_mask=(positions >= 0).long().expand(rows).to(model.device)
            if padded
            else None,
            position_ids=positions[:, -ids.shape[1] :].clamp_min(0).expand(rows).to(model.device),
            **as_argument(model, Cache(layers=layers)),
            use_cache=True,
            **kept,
        )
    for layer in layers:
        if isinstance(layer, (CodedLayer, CodedSlidingLayer)):
            layer.commit()
    whole: torch.Tensor = found.logits
    return whole


def _keeps_logits(cls: Any) -> bool:
    return "logits_to_keep" in inspect.signature(cls.forward).parameters
