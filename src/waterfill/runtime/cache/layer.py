"""What transformers calls: a cache layer that remembers in blocks.

Only what `CacheLayerMixin` names in every version from 5.0 on is used or given; arguments that came and
went between versions are taken as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from waterfill.runtime.cache.held.lying import Write, receive
from waterfill.runtime.cache.held.states import View
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.patching import fit
from waterfill.types import WaterfillError

__all__ = ["CodedLayer", "CodedSlidingLayer", "coded_layer"]


class _Remembering:
    """What layers with and without a window share; mixed in before transformers' own class."""

    store: Store
    keys: Any
    values: Any
    is_initialized: bool

    def _open(self, store: Store) -> None:
        self.store = store
        self._view: View | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values; give back all that attention may look at."""
        self.commit()
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        with torch.no_grad():
            self._make_room(key_states.shape[2])
            self._view = View(self.store, key_states, value_states, self._first())
        self._count(key_states.shape[2])
        return self._view.states()

    def commit(self) -> None:
        """Remember what the last forward pass brought, if attention has not done so."""
        if self._view is not None:
            self._view.commit()
            self._view = None

    def get_seq_length(self, *args: Any) -> int:
        """Tokens so far."""
        if self._view is not None and not self._view.committed:
            return self.store.tokens + self._view.keys.shape[2]
        return self.store.tokens

    def _make_room(self, coming: int) -> None:
        self.store.settle(coming)
        fit(self.store, coming)

    def _first(self) -> int:
        """Index of the first token that the next query may look at."""
        return 0

    def _count(self, tokens: int) -> None:
        """Take note of new tokens."""

    def _check_crop(self, kept: int) -> None:
        """WaterfillError if so few tokens cannot be gone back to."""

    def resume(self, dtype: torch.dtype, device: torch.device, start: int) -> None:
        """Begin with what was remembered elsewhere, from token `start` on; `restore` is given it next."""
        self.reset()
        self.dtype, self.device, self.is_initialized = dtype, device, True
        self.store.dropped = start
        self._count(start)

    def restore(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Remember tokens that were read elsewhere, (batch, heads, tokens, width) each."""
        self.commit()
        self.store.append(keys, values)
        self._count(keys.shape[2])

    def receive(self, batch: int, tokens: int, write: Write) -> None:
        """As `restore`, of tokens that `write` puts where it is told to: `lying.receive`."""
        self.commit()
        facts = self.store.facts
        keys, values = (
            torch.empty((batch, facts.heads, 0, width), dtype=self.dtype, device=self.device)
            for width in (facts.key_width, facts.value_width)
        )
        receive(self.store, (keys, values), tokens, write)
        self._count(tokens)

    def reset(self) -> None:
        """Forget everything."""
        self._count(-self.get_seq_length())
        self._view = None
        self.is_initialized = False
        self.store.clear()

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens`, or, where negative, forget the last so many."""
        self.check_crop(tokens)
        if tokens:
            before = self.store.tokens
            self.store.keep(tokens if tokens > 0 else max(0, before + tokens))
            self._count(self.store.tokens - before)

    def check_crop(self, tokens: int) -> None:
        """WaterfillError if `crop` would have to bring back what is gone."""
        self.commit()
        if tokens:
            before = self.store.tokens
            self._check_crop(min(before, tokens if tokens > 0 else max(0, before + tokens)))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take rows of the batch in this order."""
        self.commit()
        self.store.rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch so many times."""
        self.commit()
        rows = self.store.batch
        if rows:
            self.store.rows(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these rows of the batch."""
        self.commit()
        rows = self.store.batch
        if rows:
            self.store.rows(torch.arange(rows)[indices.to("cpu")])

    def offload(self) -> None:
        """Nothing: what is coded stays where it is."""

    def prefetch(self) -> None:
        """Nothing: what is coded stays where it is."""


class CodedLayer(_Remembering, DynamicLayer):  # type: ignore[misc]
    """A layer that attends to everything before it."""

    def __init__(self, store: Store) -> None:
        DynamicLayer.__init__(self)
        self._open(store)


class CodedSlidingLayer(_Remembering, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that attends to a window."""

    def __init__(self, store: Store, window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, window)
        self._open(store)

    def crop(self, tokens: int) -> None:
        """As of other layers; with the past recorded, what no window can see any more goes now."""
        super().crop(tokens)
        self.store.drop_before(self._first())

    def _make_room(self, coming: int) -> None:
        super()._make_room(coming)
        if not getattr(self, "record_past", False):
            self.store.drop_before(self._first())

    def _first(self, tokens: int | None = None) -> int:
        held = self.store.tokens if tokens is None else tokens
        return max(0, held - int(self.sliding_window) + 1)

    def _check_crop(self, kept: int) -> None:
        gone = self.store.sink_tokens + self.store.dropped
        if self.store.dropped and kept < self.store.tokens and self._first(kept) < gone:
            raise WaterfillError(
                f"tokens that left a window of {self.sliding_window} cannot come back, and {kept} "
                "tokens would need them: call activate_past_recording() before the forward pass, "
                "or read the text again"
            )

    def _count(self, tokens: int) -> None:
        self.cumulative_length += tokens


def coded_layer(store: Store) -> CodedLayer | CodedSlidingLayer:
    """The cache layer over a store."""
    if store.facts.window is None:
        return CodedLayer(store)
    return CodedSlidingLayer(store, store.facts.window)
