"""The cache that users hold: transformers' own interface, held to a size.

>>> cache = KVCache(model, size="64MB")                                    # doctest: +SKIP
>>> model.generate(**inputs, past_key_values=cache)                        # doctest: +SKIP
>>> cache.nbytes                                                           # doctest: +SKIP
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Cache, DynamicCache

from waterfill.runtime.cache.checking import (
    check_counts,
    check_kinds,
    check_statistics,
    total_nbytes,
)
from waterfill.runtime.cache.editing.composing import compose
from waterfill.runtime.cache.editing.splicing import splice
from waterfill.runtime.cache.facts import LayerFacts, context_of, facts_of
from waterfill.runtime.cache.fitting.planning import Budget, Choice, plan_at_scale
from waterfill.runtime.cache.fitting.statistics import FILE_NAME, CacheStatistics, load_statistics
from waterfill.runtime.cache.guard import Guard, Sentry
from waterfill.runtime.cache.held.evicting import refuse_other_attention
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.layer import CodedLayer, CodedSlidingLayer, coded_layer
from waterfill.runtime.cache.stored.levels import level_of
from waterfill.runtime.cache.stored.loading import CacheStream
from waterfill.runtime.cache.stored.loading import load as load_cache
from waterfill.runtime.cache.stored.saving import LEVEL, save, saving_of
from waterfill.runtime.quick import swap_attention
from waterfill.types import BudgetError, WaterfillError

__all__ = ["KVCache"]

SINKS, RECENT = 4, 2  # in short caches, each more takes more bytes than it is worth
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
    guard : measures harm and has layers fall back (`guard`); "auto": with its defaults where the method is
        "auto" too, since a method that is named is held as it is named, and the model says next tokens;
        None: no guard

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
        guard: Guard | Literal["auto"] | None = "auto",
    ) -> None:
        check_counts(tokens, batch, sinks, recent)
        check_kinds(method, statistics, guard)
        facts = facts_of(model)
        known = [one for one in facts if one is not None]
        if not known:
            raise WaterfillError(
                f"{type(model).__name__} keeps no keys and values that can be coded"
            )
        self.facts = facts
        self._model = weakref.ref(model)
        self.tokens = tokens or context_of(model) or LONGEST
        self.budget = _budget(known, size, bytes_per_token, bits, self.tokens, batch, sinks, recent)
        learned = _statistics(model, statistics)
        if learned is not None:
            check_statistics(learned, known, model.config)
        self.method = method
        self.choices: dict[int, Choice]
        self.statistics, self.choices = plan_at_scale(known, self.budget, method, learned)
        self.track = Track()
        super().__init__(layers=list(DynamicCache(config=model.config).layers))
        self.open_stores()
        swap_attention(model)
        if any(choice.method.evicts for choice in self.choices.values()):
            refuse_other_attention(model)
            if isinstance(guard, Guard):
                raise WaterfillError(f"{method} evicts tokens, which a guard cannot bring back")
        if guard == "auto":
            guard = Guard() if method == "auto" and model.can_generate() else None
        self.guard = None if guard is None else Sentry(self, guard)
        if self.guard is not None:
            self.guard.try_new()

    def open_stores(self) -> None:
        """Hold each layer as its choice says, from the first token on."""
        for one in self.facts:
            if one is not None:
                choice = self.choices[one.index]
                budget = self.budget
                store = choice.method.store(one, choice.coders, self.track, budget)
                store.most_nbytes = None if budget.nbytes is None else choice.nbytes
                self.layers[one.index] = coded_layer(store)

    def check(self, input_ids: torch.Tensor) -> float | None:
        """Let the guard probe if it is time to, in loops without `generate`; WaterfillError without one.

        Parameters
        ----------
        input_ids : int64 (batch, tokens or more), all tokens of the cache first

        Returns
        -------
        nats of KL that are left; None if no probe was due
        """
        if self.guard is None:
            raise WaterfillError("this cache has no guard")
        return self.guard.check(input_ids) if self.guard.due else None

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

    def save(
        self,
        path: str | Path,
        token_ids: Any,
        level: float | str | Sequence[float | str] = LEVEL,
        *,
        tokenizer: Any = None,
    ) -> int:
        """Store the cache, to be loaded elsewhere; returns the bytes of the file.

        Parameters
        ----------
        token_ids : int (tokens,) or (batch, tokens), what the cache was computed from
        level : of quality, or several: ``"exact"``; nats per number (0.000001); bytes of the file
            (1000000 or ``"1MB"``); ``"2.5bits"`` for each number, everything counted
        tokenizer : that made the ids; only the same one may load the file then

        Raises
        ------
        WaterfillError
            If there are more or fewer tokens in the cache, or layers of a kind that cannot be stored, or no
            level is named.
        BudgetError
            If a size is too small.
        """
        saving = saving_of(self, self._model(), token_ids, tokenizer)
        named = [level] if isinstance(level, (str, float, int)) else list(level)
        if not named:
            raise WaterfillError("name a level, or several: exact, 1e-6, 2.5bits, 1MB")
        levels = tuple(level_of(one, saving) for one in named)
        return save(Path(path), replace(saving, levels=levels))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Any,
        *,
        level: str | None = None,
        token_ids: Any = None,
        tokenizer: Any = None,
        positions: Any = None,
        **options: Any,
    ) -> KVCache:
        """What `save` stored, ready to go on from.

        Parameters
        ----------
        model : that computed it
        level : name of a level; None: the finest
        token_ids : of a text that must begin with the one stored; None: not looked at
        tokenizer, positions : that must be those stored; None: not looked at
        options : as for `KVCache`; without a size or method the cache is held exactly as loaded

        Raises
        ------
        FormatError
            If the file is damaged.
        WaterfillError
            If it was stored by another model or tokenizer, or for another text or other positions.
        """
        stream = cls.stream(
            model, level=level, token_ids=token_ids, tokenizer=tokenizer, positions=positions,
            name=str(path), **options,
        )  # fmt: skip
        load_cache(Path(path), stream)
        return stream.cache

    @classmethod
    def stream(
        cls,
        model: Any,
        *,
        level: str | None = None,
        token_ids: Any = None,
        tokenizer: Any = None,
        positions: Any = None,
        name: str = "stream",
        **options: Any,
    ) -> CacheStream:
        """As `load`, of bytes that are fed as they arrive."""
        if not options.keys() & {"size", "bytes_per_token", "bits", "method"}:
            options["method"] = "exact"
        cache = cls(model, **options)
        if not all(layer.store.whole for layer in cache.coded_layers):
            raise WaterfillError(
                "a stored cache says nothing of attention, by which tokens are evicted: "
                "choose a method that keeps every token"
            )
        return CacheStream(
            cache, model, level=level, token_ids=token_ids, tokenizer=tokenizer,
            positions=positions, name=name,
        )  # fmt: skip

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
            self.check_room(layer.get_seq_length() + key_states.shape[2], len(key_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def check_room(self, tokens: int, rows: int = 1) -> None:
        """BudgetError where so many tokens, or rows, are more than were planned for."""
        if self.budget.nbytes is not None and tokens > self.tokens:
            raise BudgetError(
                f"this cache of {self.budget.nbytes:,} bytes was planned for {self.tokens:,} tokens, "
                f"and {tokens:,} are wanted: make it with tokens={tokens}, or a larger size"
            )
        if self.budget.nbytes is not None and rows > self.budget.batch:
            raise BudgetError(
                f"this cache of {self.budget.nbytes:,} bytes was planned for rows: {self.budget.batch}, "
                f"and {rows} come (each beam is one): make it with batch={rows}"
            )

    @property
    def model(self) -> Any:
        """The model that this is the cache of; WaterfillError if it is gone."""
        model = self._model()
        if model is None:
            raise WaterfillError("the model of this cache is gone")
        return model

    def splice(self, start: int, stop: int, new_tokens: Sequence[int] | torch.Tensor = ()) -> None:
        """Put other tokens in the place of some, without reading what follows again: `splicing.splice`."""
        splice(self, start, stop, new_tokens)

    def compose(
        self, segments: Sequence[Sequence[int] | torch.Tensor], graph: Mapping[int, Sequence[int]]
    ) -> None:
        """Fill an empty cache with segments that each read their sources only: `composing.compose`."""
        compose(self, segments, graph)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.track.keep(0)
        if self.guard is not None:
            self.guard.next = self.guard.settings.every

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens`, or, where negative, forget the last so many."""
        for coded in self.coded_layers:
            coded.check_crop(tokens)  # all or none
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
    numbers = sum(f.numbers for f in known)
    total = total_nbytes(size, bytes_per_token, bits, numbers, tokens * batch)
    each = size is None and total is not None
    return Budget(total, tokens, batch, sinks, recent, each)


def _statistics(model: Any, given: CacheStatistics | str | Path | None) -> CacheStatistics | None:
    if given is None:
        beside = Path(str(model.name_or_path)) / FILE_NAME
        return load_statistics(beside) if beside.is_file() else None
    return given if isinstance(given, CacheStatistics) else load_statistics(Path(given))
