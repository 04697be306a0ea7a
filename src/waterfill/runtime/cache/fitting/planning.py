"""Which method and rung each layer gets, so that the whole cache keeps to its size.

A rung is priced by coding the layer's own samples: real bytes of a block, and nats of harm by the matrices
that calibration left. One water level then splits the budget over layers, as for weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from waterfill.plan.hull import cheapest, curves
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.filling import fill as fill_budget
from waterfill.runtime.cache.fitting.statistics import CacheStatistics, LayerStatistics
from waterfill.runtime.cache.held.evicting import fit
from waterfill.runtime.cache.method import (
    BLOCK,
    Coder,
    Method,
    find_method,
    make_method,
    method_ids,
    parse_method,
)
from waterfill.types import BudgetError, Point

__all__ = ["Budget", "Choice", "choice_of", "plan", "plan_at_scale"]

UNKNOWN_DECAY = 4.0  # harm falls by so much for each bit where nothing was measured
LARGE_NATS = 3e-4  # of keys or values of a layer, beyond which errors count as large
RUNS = 4  # of positions, that a size leaves room for


@dataclass(frozen=True)
class Budget:
    """Bytes of a cache and what they are for.

    Attributes
    ----------
    nbytes : of the whole; None: the best rungs there are
    tokens, batch : that it holds then
    sinks, recent : tokens that are kept as they were
    each : whether the size is so much for each token
    """

    nbytes: int | None
    tokens: int
    batch: int
    sinks: int
    recent: int
    each: bool = False

    @property
    def positions_nbytes(self) -> int:
        """Room for the positions of tokens."""
        return RUNS * 8 * (1 + self.batch)

    @property
    def layers_nbytes(self) -> int | None:
        """What all layers may take; the rest is for the positions of their tokens."""
        return None if self.nbytes is None else self.nbytes - self.positions_nbytes

    def coded_tokens(self, facts: LayerFacts) -> int:
        """Tokens of a layer that are coded when the cache is full, at most."""
        held = self.tokens if facts.window is None else min(self.tokens, facts.window + BLOCK)
        return max(0, held - self.sinks - self.recent) // BLOCK * BLOCK

    @property
    def recent_room(self) -> int:
        """Tokens after the last block, at most."""
        room = self.recent + BLOCK
        return room if self.nbytes is None else min(room, self.tokens)

    def exact_nbytes(self, facts: LayerFacts) -> int:
        """Bytes of a layer's tokens that are kept as they were."""
        exact = min(self.tokens, self.sinks) + self.recent_room
        return exact * self.batch * facts.token_nbytes

    def too_small(self, what: str, need_nbytes: int) -> BudgetError:
        """The error where all layers take so much at least."""
        advice = "more for each, or more tokens" if self.each else "a larger size, or fewer tokens"
        return BudgetError(
            f"a cache of {self.nbytes:,} bytes for {self.tokens:,} tokens is too small: {what} take "
            f"{need_nbytes + self.positions_nbytes:,}; name {advice}"
        )


@dataclass(frozen=True, eq=False)
class Choice:
    """What a layer gets.

    Attributes
    ----------
    method : and its rung
    coders : newest tier first, with blocks of that age at most
    nbytes : of the full layer, exact tokens and tables included
    nats : predicted harm per token of text; None: not measured
    """

    method: Method
    coders: list[tuple[Coder, int | None]] = field(repr=False)
    nbytes: int
    nats: float | None


def plan_at_scale(
    facts: Sequence[LayerFacts], budget: Budget, method: str, statistics: CacheStatistics | None
) -> tuple[CacheStatistics | None, dict[int, Choice]]:
    """As `plan`, and the statistics by which it is: of large errors, where the size leaves no others."""
    choices = plan(facts, budget, method, statistics)
    nats = [one.nats for one in choices.values() if one.nats is not None]
    if statistics is None or not nats or sum(nats) / (2 * len(nats)) < LARGE_NATS:
        return statistics, choices
    statistics = statistics.of_large_errors
    return statistics, plan(facts, budget, method, statistics)


def plan(
    facts: Sequence[LayerFacts], budget: Budget, method: str, statistics: CacheStatistics | None
) -> dict[int, Choice]:
    """A choice for each layer.

    Raises
    ------
    BudgetError
        If even the cheapest rungs do not fit.
    """
    kept = fit(method, facts, budget)
    if kept is not None:
        evictor, sizes = kept
        return {
            one.index: Choice(evictor, [], nbytes, None)
            for one, nbytes in zip(facts, sizes, strict=True)
        }
    own = {
        one.index: None if statistics is None else statistics.layers.get(one.index) for one in facts
    }
    prices: dict[str, list[Point]] = {}
    for one in facts:
        rungs = _candidates(method, one, own[one.index])
        prices[str(one.index)] = [_price(rung, one, own[one.index], budget) for rung in rungs]
    c = curves(prices, make_method)

    def choose(points: Mapping[str, Point]) -> dict[int, Choice]:
        return {
            one.index: _open(points[str(one.index)], one, own[one.index], budget) for one in facts
        }

    if budget.layers_nbytes is None:
        return choose(
            {n: min(points, key=lambda p: p.distortion_nats) for n, points in prices.items()}
        )

    def real_nbytes(points: Mapping[str, Point]) -> dict[str, int]:
        return {str(index): one.nbytes for index, one in choose(points).items()}

    least = cheapest(c)
    need = sum(real_nbytes(least).values())
    if need > budget.layers_nbytes:
        raise budget.too_small("the cheapest rungs", need)
    return choose(fill_budget(c, prices, least, budget.layers_nbytes, real_nbytes))


def _candidates(method: str, facts: LayerFacts, statistics: LayerStatistics | None) -> list[Method]:
    name, _, options = method.partition(":")
    if options:
        return [parse_method(method)]
    if name != "auto":
        return list(find_method(name).ladder(facts, statistics))
    found: list[Method] = []
    for id in method_ids():
        cls = find_method(id)
        if cls.usual and (statistics is not None or not cls.calibrated):
            found += cls.ladder(facts, statistics)
    return found


def choice_of(
    chosen: Method, facts: LayerFacts, statistics: LayerStatistics | None, budget: Budget
) -> Choice:
    """What a layer gets if it gets this method."""
    return _open(_price(chosen, facts, statistics, budget), facts, statistics, budget)


def _open(
    point: Point, facts: LayerFacts, statistics: LayerStatistics | None, budget: Budget
) -> Choice:
    chosen = make_method(point.spec)
    coders: list[tuple[Coder, int | None]] = []
    nbytes, left = float(budget.exact_nbytes(facts)), budget.coded_tokens(facts)
    for tier in chosen.tiers():
        coder = tier.method.open(facts, statistics)
        most = None if tier.tokens is None else tier.tokens // BLOCK
        tokens = left if most is None else min(left, most * BLOCK)
        nbytes += block_nbytes(coder, facts) / BLOCK * tokens * budget.batch
        nbytes += coder.nbytes
        left -= tokens
        coders.append((coder, most))
    return Choice(chosen, coders, int(np.ceil(nbytes)), float(point.distortion_nats))


def _price(
    rung: Method, facts: LayerFacts, statistics: LayerStatistics | None, budget: Budget
) -> Point:
    """Bytes of the full layer and nats of harm per token of text."""
    choice = _open(Point(0, 0, rung.spec), facts, statistics, budget)
    # Newest first: what is in a tier has been through all those before it.
    coders = [coder for coder, _ in choice.coders]
    if statistics is not None:
        each = harms(coders, facts, statistics)
    else:
        bits = [8 * block_nbytes(coder, facts) / BLOCK / facts.numbers for coder in coders]
        each = [float(UNKNOWN_DECAY**-b) for b in bits]
    nats = float(np.average(each, weights=_tokens(choice.coders, budget.coded_tokens(facts))))
    return Point(choice.nbytes, nats, rung.spec)


def _tokens(coders: Sequence[tuple[Coder, int | None]], tokens: int) -> list[int]:
    """Tokens of each age when so many are coded; of the first, one at least."""
    found, left = [], max(tokens, 1)
    for _, most in coders:
        found.append(left if most is None else min(left, most * BLOCK))
        left -= found[-1]
    return found


def block_nbytes(coder: Coder, facts: LayerFacts) -> int:
    """Bytes of a coded block of one row."""
    keys = torch.zeros((1, facts.heads, BLOCK, facts.key_width), dtype=facts.dtype)
    values = torch.zeros((1, facts.heads, BLOCK, facts.value_width), dtype=facts.dtype)
    coded = coder.encode(keys, values, torch.arange(BLOCK)[None])
    return sum(t.numel() * t.element_size() for t in coded.values())


def harm(coder: Coder, facts: LayerFacts, statistics: LayerStatistics) -> float:
    """Nats per token of text that coding the layer's samples costs."""
    return harms([coder], facts, statistics)[0]


def harms(coders: Sequence[Coder], facts: LayerFacts, statistics: LayerStatistics) -> list[float]:
    """As `harm`, after each of several codings, every one of what the last gave back."""
    streams = (statistics.keys, statistics.values)
    plain, exact = (torch.from_numpy(s.samples)[None] for s in streams)
    positions = torch.arange(plain.shape[2])[None]
    states = facts.turned(plain, positions), exact.to(facts.dtype)
    found = []
    for coder in coders:
        states = coder.decode(coder.encode(*states, positions), positions)
        keys, values = facts.unturned(states[0], positions), states[1].float()
        found.append(
            sum(
                float(torch.einsum("bhni,hij,bhnj->", e, torch.from_numpy(s.harm), e)) / e.shape[2]
                for e, s in zip((keys - plain, values - exact), streams, strict=True)
            )
        )
    return found
