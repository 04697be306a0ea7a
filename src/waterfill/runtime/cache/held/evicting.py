"""Methods that keep some tokens of each head: what they share, and how a size becomes a share.

What an evicted token would have cost depends on the queries still to come, so no nats are predicted: these
methods are chosen by name only, and all layers get the same share of their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics
from waterfill.runtime.cache.held.kept import SLOT_NBYTES, Held, KeptStore, Moment
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.method import BLOCK, Coder, Method, find_method, parse_method
from waterfill.runtime.quick import ATTENTION
from waterfill.types import SpecError, WaterfillError

if TYPE_CHECKING:
    from waterfill.runtime.cache.fitting.planning import Budget

__all__ = ["Evictor", "fit", "refuse_other_attention"]

LEAST = 8  # slots beside sinks and recent tokens, at least
ROUNDS = 40


@dataclass(frozen=True)
class Evictor(Method):
    """Keeps so many tokens of each head.

    Parameters
    ----------
    share : of the tokens that the cache is for (of the window, where a layer has one), above 0 to 1
    count : tokens, instead of a share; 0: by share
    """

    evicts: ClassVar[bool] = True
    late: ClassVar[int] = 1  # last queries whose attention is told apart
    share: float = 1.0
    count: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SpecError(f"{self.id}: share must be above 0 and at most 1, not {self.share}")
        if self.count < 0:
            raise SpecError(f"{self.id}: count must not be negative, not {self.count}")

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        yield from (cls(share=2.0**-k) for k in range(6, -1, -1))

    def between(self, other: Self, t: float) -> Self | None:
        return replace(self, share=self.share ** (1 - t) * other.share**t)

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        raise WaterfillError(f"{self.id} keeps tokens as they are: there are no blocks to code")

    def capacity(self, facts: LayerFacts, budget: Budget) -> int:
        """Slots of each head of a layer: tokens kept, sinks and recent ones among them."""
        seen = budget.tokens if facts.window is None else min(budget.tokens, facts.window)
        wanted = self.count or int(self.share * seen)
        if wanted >= seen:
            # What left a window is evicted by batches.
            return budget.tokens if facts.window is None else seen + BLOCK
        return max(wanted, budget.sinks + budget.recent + LEAST)

    def nbytes(self, facts: LayerFacts, budget: Budget) -> int:
        """Bytes of a full layer."""
        slot = facts.token_nbytes + facts.heads * SLOT_NBYTES
        return self.capacity(facts, budget) * slot * budget.batch

    def store(
        self,
        facts: LayerFacts,
        coders: list[tuple[Coder, int | None]],
        track: Track,
        budget: Budget,
    ) -> KeptStore:
        capacity = self.capacity(facts, budget)
        return KeptStore(facts, self.evict, track, capacity, budget.sinks, budget.recent, self.late)

    def evict(self, held: Held, moment: Moment) -> Held:
        """The slots that stay, at most `moment.keep` of each head, in the order of their index."""
        raise NotImplementedError


def fit(
    method: str, facts: Sequence[LayerFacts], budget: Budget
) -> tuple[Evictor, list[int]] | None:
    """The method with the largest share that fits, and bytes of each full layer; None: it evicts nothing.

    Raises
    ------
    BudgetError
        If even the smallest share, or the one that is named, is too large.
    """
    name, _, options = method.partition(":")
    cls = None if name == "auto" else find_method(name)
    if cls is None or not issubclass(cls, Evictor):
        return None
    named = parse_method(method)
    assert isinstance(named, Evictor)

    def sizes(rung: Evictor) -> list[int]:
        return [rung.nbytes(one, budget) for one in facts]

    if budget.nbytes is None or budget.layers_nbytes is None:
        return named, sizes(named)
    room = budget.layers_nbytes
    low = named if options else replace(named, share=1e-9)
    if sum(sizes(low)) > room:
        raise budget.too_small(f"layers of {low}", sum(sizes(low)))
    if options:
        return low, sizes(low)
    best, bounds = low, [low.share, 1.0]
    for share in (1.0, *[0.0] * ROUNDS):
        rung = replace(named, share=share or sum(bounds) / 2)
        fits = sum(sizes(rung)) <= room
        bounds[0 if fits else 1] = rung.share
        best = rung if fits else best
    return best, sizes(best)


def refuse_other_attention(model: Any) -> None:
    """WaterfillError where a model's attention cannot read other tokens for each head."""
    own = model.config.get_text_config(decoder=True)._attn_implementation
    if own != ATTENTION:
        raise WaterfillError(
            f"{type(model).__name__} computes attention its own way ({own}), which cannot read other tokens for "
            'each head: load it with attn_implementation="sdpa", or choose a method that keeps every token'
        )
