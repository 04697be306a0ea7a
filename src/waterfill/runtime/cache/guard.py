"""Sees to it that a cache never corrupts silently: where it harms too much, its worst layers fall back.

>>> cache = KVCache(model, size="64MB", guard=Guard(limit_nats=0.05))     # doctest: +SKIP
>>> model.generate(**inputs, past_key_values=cache, logits_processor=[cache.guard])   # doctest: +SKIP
>>> print(cache.guard.report)                                             # doctest: +SKIP

A probe compares next tokens over the coded past with those over an exact one (`probing`). Above the limit
the layers that harm most, each tried alone, go up a rung of their ladder, and in the end to exact, until
the limit is kept. When a cache is made, the probe is a text that came with the statistics, or one that
the model writes. In use, it is what the cache holds, and layers that fall back are coded anew from the
exact keys and values that the probe just made. The size is kept all the same: when a cache is made, other
layers give way; in use, where no bytes are left, the guard warns and counts it.

A probe in use reads all tokens again, which takes as long as the prompt did, and holds their exact keys
and values meanwhile. With a probe every n tokens that is what n tokens of prompt cost more, per token,
for each n tokens held.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor

from waterfill.runtime.cache.editing.replaying import Past
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.planning import Budget, Choice, choice_of, plan
from waterfill.runtime.cache.fitting.probing import (
    READ,
    Nats,
    Reference,
    draw_text,
    last_span,
    read_exactly,
    spread_spans,
)
from waterfill.runtime.cache.fitting.statistics import LayerStatistics
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.method import BLOCK, Method, find_method
from waterfill.types import BudgetError, WaterfillError

if TYPE_CHECKING:
    from waterfill.runtime.cache.cache import KVCache

__all__ = ["Guard", "Report", "Sentry", "safer"]

PROBE = 192  # tokens that the model writes where there is no text
WORST = 0.5  # of the worst layer's harm: layers above it fall back together

Choices = Mapping[int, Choice]


@dataclass(frozen=True)
class Guard:
    """What a cache may cost, and how often that is measured.

    Attributes
    ----------
    limit_nats : mean KL of the next token against an exact cache, and twice its standard error, accepted at most
    every : tokens between probes in use
    probe : token ids to try a new cache on; None: those with the statistics, or a text by the model
    """

    limit_nats: float = 0.1
    every: int = 1024
    probe: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.limit_nats > 0 or self.every < 1:
            raise WaterfillError(
                "a guard needs a limit above zero, and at least a token in between"
            )


@dataclass
class Report:
    """What a guard found and did.

    Attributes
    ----------
    probes : tokens held, and nats of KL as found, before anything fell back
    left_nats : KL after the last probe's fallbacks; None: not measured yet
    fallbacks : layer -> the methods it had and has, oldest first
    gave_way : layers that hold less so that others can hold more
    refused : probes above the limit after which no layer could fall back any further in the size
    skipped : probes for which the cache did not hold the tokens that were shown
    """

    probes: list[tuple[int, float]] = field(default_factory=list)
    left_nats: float | None = None
    fallbacks: dict[int, list[str]] = field(default_factory=dict)
    gave_way: set[int] = field(default_factory=set)
    refused: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        if not self.probes:
            return "no probe yet"
        worst = max(nats for _, nats in self.probes)
        steps = sum(len(names) - 1 for names in self.fallbacks.values())
        layers = ", ".join(f"{i}: {' > '.join(n)}" for i, n in sorted(self.fallbacks.items()))
        return (
            f"{len(self.probes)} probes, KL at most {worst:.3g} nats, {self.left_nats:.3g} after the last; "
            f"{steps} fallbacks{f' ({layers})' if layers else ''}; {len(self.gave_way)} layers gave way; "
            f"refused {self.refused}, skipped {self.skipped}"
        )


def safer(
    method: Method, facts: LayerFacts, statistics: LayerStatistics | None, budget: Budget
) -> Choice | None:
    """The next rung that a layer may fall back to: the next larger of the method's ladder, at last `exact`.

    None where it is exact already.
    """
    exact = find_method("exact")()
    if method == exact:
        return None
    own = choice_of(method, facts, statistics, budget).nbytes
    for rung in type(method).ladder(facts, statistics):
        choice = choice_of(rung, facts, statistics, budget)
        if choice.nbytes > own:
            return choice
    return choice_of(exact, facts, statistics, budget)


class Sentry(LogitsProcessor):  # type: ignore[misc]
    """A guard on duty: a transformers logits processor that changes no logits.

    Attributes
    ----------
    settings : Guard
    report : Report
    """

    def __init__(self, cache: KVCache, settings: Guard) -> None:
        self._cache = weakref.ref(cache)
        self.settings, self.report = settings, Report()
        self.next = settings.every
        self.raised: set[int] = set()  # layers that a new plan must not lower

    @property
    def cache(self) -> KVCache:
        """What is guarded."""
        cache = self._cache()
        if cache is None:
            raise WaterfillError("the cache of this guard is gone")
        return cache

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Probe if it is time to; scores are given back as they are."""
        if self.due:
            self.check(input_ids)
        return scores

    @property
    def due(self) -> bool:
        """Whether so many tokens came since the last probe."""
        return int(self.cache.get_seq_length()) >= self.next

    def check(self, input_ids: torch.Tensor) -> float | None:
        """Probe what the cache holds now, whatever the interval.

        Parameters
        ----------
        input_ids : int64 (batch, tokens or more), all tokens of the cache first

        Returns
        -------
        nats of KL after fallbacks; None if the cache does not hold these tokens in this order
        """
        cache = self.cache
        tokens = cache.get_seq_length()
        self.next = tokens + self.settings.every
        layers = cache.coded_layers
        for layer in layers:
            layer.commit()
        rows = max(layer.store.batch for layer in layers)
        # Of a composed past, reading in order would make another.
        if (
            tokens < 2
            or input_ids.shape[1] < tokens
            or len(input_ids) != rows
            or len(cache.track.runs) > 1
        ):
            self.report.skipped += 1
            return None
        stores = {layer.store.facts.index: layer.store for layer in layers}
        facts = [store.facts for store in stores.values()]
        ids = input_ids[:, :tokens].cpu()
        positions = cache.track.positions(0, tokens)
        reference = read_exactly(cache.model, facts, ids, positions, last_span(tokens))

        def shown(choices: Choices, changed: set[int]) -> dict[int, Store]:
            for index in changed:
                _code_anew(stores[index], choices[index], reference.exact[index], cache.budget)
            return {i: stores[i] for i in changed or stores}

        return self._keep_limit(reference, shown, self._in_place)

    def try_new(self) -> None:
        """Probe a cache that is still empty, and let its plan fall back before it holds anything."""
        cache = self.cache
        known = [one for one in cache.facts if one is not None]
        ids = self._probe()
        if ids is None:
            return
        tokens = ids.shape[1]
        positions = torch.arange(tokens)[None]
        reference = read_exactly(cache.model, known, ids, positions, spread_spans(tokens))
        track = Track()
        track.extend(0, tokens, positions)

        def shown(choices: Choices, changed: set[int]) -> dict[int, Store]:
            found = {}
            for one in known:
                if one.index in changed or not changed:
                    budget = cache.budget
                    store = Store(
                        one, choices[one.index].coders, track, budget.sinks, budget.recent
                    )
                    store.grow(*reference.exact[one.index].states(0, tokens))
                    found[one.index] = store
            return found

        self._keep_limit(reference, shown, self._replanned)
        cache.open_stores()

    def _probe(self) -> torch.Tensor | None:
        """int64 (1, tokens); None where nothing would be coded anyway."""
        cache, settings = self.cache, self.settings
        least = cache.budget.sinks + cache.budget.recent + BLOCK + READ
        if cache.tokens < least:
            return None
        given = settings.probe
        if given is None and cache.statistics is not None:
            given = cache.statistics.protocol.get("probe")
        if given is None:
            return draw_text(cache.model, max(least, min(PROBE, cache.tokens)))
        return torch.tensor(given)[None, : cache.tokens] if len(given) >= least else None

    def _keep_limit(
        self,
        reference: Reference,
        shown: Callable[[Choices, set[int]], dict[int, Store]],
        fallen_back: Callable[[set[int]], dict[int, Choice] | None],
    ) -> float:
        """Let layers fall back until the limit is kept or nothing can; nats that are left.

        Parameters
        ----------
        shown : pasts of layers that changed, of all if none did
        fallen_back : choices after these layers fall back; None: there are none that fit
        """
        cache, report = self.cache, self.report
        pasts = shown(cache.choices, set())
        nats = reference.nats(pasts)
        report.probes.append((reference.ids.shape[1], nats.mean))
        harms: dict[int, Nats] = {}
        best = nats, cache.choices
        while nats.bound > self.settings.limit_nats:
            for index in pasts.keys() - harms.keys():
                harms[index] = reference.nats({index: pasts[index]})
            worst = _worst(harms, cache.choices)
            choices = fallen_back(worst) if worst else None
            if choices is None:
                report.refused += 1
                self._warn(nats)
                break
            changed = self._note(choices)
            pasts |= shown(choices, changed)
            harms = {i: harm for i, harm in harms.items() if i not in changed}
            nats = reference.nats(pasts)
            best = min(best, (nats, cache.choices), key=lambda found: found[0])
        if best[0] < nats:
            nats, choices = best
            shown(choices, self._note(choices))
        report.left_nats = nats.mean
        return nats.mean

    def _note(self, choices: Choices) -> set[int]:
        """Put choices in force; the layers whose method is another now."""
        cache = self.cache
        changed = {i for i, c in choices.items() if c.method != cache.choices[i].method}
        for index in changed:
            if choices[index].nbytes < cache.choices[index].nbytes:
                self.report.gave_way.add(index)
                continue
            names = self.report.fallbacks.setdefault(index, [str(cache.choices[index].method)])
            if names[-1] != str(choices[index].method):
                names.append(str(choices[index].method))
        cache.choices = dict(choices)
        return changed

    def _in_place(self, layers: set[int]) -> dict[int, Choice] | None:
        """Choices after these layers went up a rung, or as many of them as the size has room for."""
        cache = self.cache
        choices, gained = dict(cache.choices), False
        for index in layers:
            choice = self._safer(index)
            others = sum(c.nbytes for i, c in choices.items() if i != index)
            room = cache.budget.layers_nbytes
            if choice is not None and (room is None or others + choice.nbytes <= room):
                choices[index], gained = choice, True
        return choices if gained else None

    def _replanned(self, layers: set[int]) -> dict[int, Choice] | None:
        """Choices after these layers went up a rung, others giving way where the size asks for it."""
        cache = self.cache
        choices = dict(cache.choices)
        for index in layers:
            choices[index] = self._safer(index) or choices[index]
        total = sum(choice.nbytes for choice in choices.values())
        room = cache.budget.layers_nbytes
        if room is None or total <= room:
            return choices
        self.raised |= layers
        held = {i: c for i, c in choices.items() if i in self.raised}
        rest = [one for one in cache.facts if one is not None and one.index not in held]
        taken = sum(c.nbytes for c in held.values())
        if not rest or taken > room or cache.budget.nbytes is None:
            return None
        left = dataclasses.replace(cache.budget, nbytes=cache.budget.nbytes - taken)
        try:
            return held | plan(rest, left, cache.method, cache.statistics)
        except BudgetError:
            return None

    def _safer(self, index: int) -> Choice | None:
        cache = self.cache
        facts = cache.facts[index]
        assert facts is not None
        statistics = None if cache.statistics is None else cache.statistics.layers.get(index)
        return safer(cache.choices[index].method, facts, statistics, cache.budget)

    def _warn(self, nats: Nats) -> None:
        limit = self.settings.limit_nats
        warnings.warn(
            f"the cache costs {nats.mean:.3g} nats a token, {nats.bound:.3g} with its error, above the "
            f"limit of {limit:g}, and its size leaves no room to hold layers better",
            stacklevel=5,
        )


def _worst(harms: Mapping[int, Nats], choices: Choices) -> set[int]:
    """Layers that harm most and are not exact yet."""
    exact = find_method("exact")()
    open_ = {index: harm.mean for index, harm in harms.items() if choices[index].method != exact}
    top = max(open_.values(), default=0.0)
    return {index for index, harm in open_.items() if harm >= WORST * top}


def _code_anew(store: Store, choice: Choice, exact: Past, budget: Budget) -> None:
    """Have a store hold exact keys and values in another way."""
    queries, asked = store.queries, store.asked
    store.open(choice.coders)
    store.queries, store.asked = queries, asked
    store.most_nbytes = None if budget.nbytes is None else choice.nbytes
    store.grow(*exact.states(0, exact.tokens))
