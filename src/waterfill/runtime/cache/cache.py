"""The cache that users hold: transformers' own interface, held to a size.

>>> cache = KVCache(model, size="64MB")                                    # doctest: +SKIP
>>> model.generate(**inputs, past_key_values=cache)                        # doctest: +SKIP
>>> cache.nbytes                                                           # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache

from waterfill.runtime.cache.checking import check_counts, check_statistics, total_nbytes
from waterfill.runtime.cache.facts import LayerFacts, context_of, facts_of
from waterfill.runtime.cache.layer import CodedLayer, CodedSlidingLayer, coded_layer
from waterfill.runtime.cache.planning import Budget, Choice, plan
from waterfill.runtime.cache.statistics import FILE_NAME, CacheStatistics, load_statistics
from waterfill.runtime.cache.store import Store
from waterfill.runtime.cache.track import Track
from waterfill.runtime.quick import swap_attention
from waterfill.types import BudgetError, WaterfillError

__all__ = ["KVCache"]

SINKS, RECENT = 4, 16
LONGEST = 1 << 15  # tokens planned for where neither user nor model says


class KVCache(Cache):  # type: ignore[misc]
    """Keys and values of a model, held to a size.

    Parameters
    ----------
    model : transformers.PreTrainedModel with a cache; its attention is set to this package's where it is
        transformers' sdpa, so that coded blocks are read where they lie
    size : bytes of the whole cache, a number or text (``"64MB"``), for `tokens` tokens of `batch` rows
    bytes_per_token : instead of `size`: of one token of one row, all layers, everything counted
    bits : instead of `size`: of each number in keys and values, everything counted
    tokens : that `size` is for; the model's context by default
    batch : rows that `size` is for
    method : id of a method in `waterfill.runtime.cache.methods`, with options; "auto" chooses
    statistics : what `calibrate_cache` learned, or a file of it; by default the file beside the model
    sinks, recent : tokens kept as they were, at the beginning, and at least at the end

    Raises
    ------
    BudgetError
        If no choice of rungs fits the size, or, from `update`, if the cache is full.
    WaterfillError
        If the model has no such cache, or the arguments do not fit each other.
    """

    def __init__(
        self,
        model: Any,
        size: int | float | str | None = None,
        *,
        bytes_per_token: float | None = None,
        bits: float | None = None,
        tokens: int | None = None,
        batch: int = 1,
        method: str = "auto",
        statistics: CacheStatistics | str | Path | None = None,
        sinks: int = SINKS,
        recent: int = RECENT,
    ) -> None:
        check_counts(tokens, batch, sinks, recent)
        facts = facts_of(model)
        known = [one for one in facts if one is not None]
        if not known:
            raise WaterfillError(
                f"{type(model).__name__} keeps no keys and values that can be coded"
            )
        self.facts = facts
        self.tokens = tokens or context_of(model) or LONGEST
        self.budget = _budget(known, size, bytes_per_token, bits, self.tokens, batch, sinks, recent)
        own = _statistics(model, statistics)
        if own is not None:
            check_statistics(own, known, model.config)
        self.choices: dict[int, Choice] = plan(known, self.budget, method, own)
        self.track = Track()
        layers = list(DynamicCache(config=model.config).layers)
        for one in known:
            choice = self.choices[one.index]
            store = Store(one, choice.coders, self.track, sinks, recent)
            layers[one.index] = coded_layer(store)
        super().__init__(layers=layers)
        swap_attention(model)

    @property
    def coded_layers(self) -> list[CodedLayer | CodedSlidingLayer]:
        """The layers that are held in blocks."""
        return [
            layer for layer in self.layers if isinstance(layer, (CodedLayer, CodedSlidingLayer))
        ]

    @property
    def nbytes(self) -> int:
        """Bytes held now: codes, tables, exact tokens, positions, and layers of other kinds."""
        held = self.track.nbytes
        for layer in self.layers:
            if isinstance(layer, (CodedLayer, CodedSlidingLayer)):
                layer.commit()
                held += layer.store.nbytes
            else:
                tensors = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
                held += sum(t.numel() * t.element_size() for t in tensors)
        return held

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers' `Cache.update`; BudgetError where the tokens are more than were planned for."""
        layer = self.layers[layer_idx]
        if isinstance(layer, (CodedLayer, CodedSlidingLayer)):
            after = layer.get_seq_length() + key_states.shape[2]
            if self.budget.nbytes is not None and after > self.tokens:
                raise BudgetError(
                    f"this cache of {self.budget.nbytes:,} bytes was planned for {self.tokens:,} tokens, "
                    f"and {after:,} are wanted: make it with tokens={after}, or a larger size"
                )
            if self.budget.nbytes is not None and len(key_states) > self.budget.batch:
                raise BudgetError(
                    f"this cache of {self.budget.nbytes:,} bytes was planned for {self.budget.batch} rows, "
                    f"and {len(key_states)} come (each beam is one): make it with batch={len(key_states)}"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.track.keep(0)

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens`, or, where negative, forget the last so many."""
        for layer in self.layers:
            layer.crop(tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take rows of the batch in this order."""
        super().reorder_cache(beam_idx)
        self.track.rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch so many times."""
        rows = self.coded_layers[0].store.batch
        super().batch_repeat_interleave(repeats)
        self.track.rows(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these rows of the batch."""
        rows = self.coded_layers[0].store.batch
        super().batch_select_indices(indices)
        self.track.rows(torch.arange(rows)[indices.to("cpu")])

    def __repr__(self) -> str:
        return f"KVCache({self.get_seq_length()} tokens, {self.nbytes:,} bytes)"


def _budget(
    known: list[LayerFacts],
    size: int | float | str | None,
    bytes_per_token: float | None,
    bits: float | None,
    tokens: int,
    batch: int,
    sinks: int,
    recent: int,
) -> Budget:
    numbers = sum(f.heads * (f.key_width + f.value_width) for f in known)
    total = total_nbytes(size, bytes_per_token, bits, numbers, tokens * batch)
    return Budget(total, tokens, batch, sinks, recent)


def _statistics(model: Any, given: CacheStatistics | str | Path | None) -> CacheStatistics | None:
    if given is None:
        beside = Path(str(model.name_or_path)) / FILE_NAME
        return load_statistics(beside) if beside.is_file() else None
    return given if isinstance(given, CacheStatistics) else load_statistics(Path(given))
