"""Older tokens in fewer bits: 8, then 4, 3 and 2.

The newest tokens are looked at most, so blocks are coded finely at first and more coarsely as they age, each
time from their coded form: what an older block has lost is what all its codings lost, and is priced so.
A prompt's blocks go at once to where their age puts them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics
from waterfill.runtime.cache.method import BLOCK, Coder, Method, Tier, method, parse_method
from waterfill.types import SpecError

__all__ = ["Staircase"]

STEPS = (8, 4, 3, 2)
LONGEST = 1 << 14  # tokens at 8 bits, of the last rung


@method
class Staircase(Method):
    """Blocks that age through rungs of another method.

    Parameters
    ----------
    of : "channel", whose bits the steps are, or "transform", where a bit less is four times the level
    eight, four, three : newest tokens at 8 bits, those before them at 4, and at 3; whole blocks of 32.
        All older ones are at 2; 0 leaves a step out
    level : of "transform" at 2 bits, nats per token
    """

    of: str = "channel"
    eight: int = 64
    four: int = 256
    three: int = 512
    level: float = 1e-3

    def __post_init__(self) -> None:
        if self.of not in ("channel", "transform"):
            raise SpecError(f"staircase: of must be channel or transform, not {self.of!r}")
        for name in ("eight", "four", "three"):
            tokens = getattr(self, name)
            if tokens < 0 or tokens % BLOCK:
                raise SpecError(f"staircase: {name} must be a multiple of {BLOCK}, not {tokens}")
        self._rung(STEPS[-1])

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        doubling = [BLOCK << k for k in range((LONGEST // BLOCK).bit_length())]
        rungs = [(0, 0, 0)]
        for tokens in doubling:
            rungs += [(0, 0, tokens), (0, tokens, tokens), (tokens, tokens, 2 * tokens)]
        # By the bits they spend above the last step's.
        above = [bits - STEPS[-1] for bits in STEPS[:-1]]
        rungs.sort(key=lambda rung: sum(a * b for a, b in zip(rung, above, strict=True)))
        yield from (cls(eight=e, four=f, three=t) for e, f, t in rungs)

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        return self.tiers()[0].method.open(facts, statistics)

    def tiers(self) -> tuple[Tier, ...]:
        most = (self.eight, self.four, self.three, None)
        steps = zip(STEPS, most, strict=True)
        return tuple(Tier(self._rung(bits), tokens) for bits, tokens in steps if tokens != 0)

    def _rung(self, bits: int) -> Method:
        if self.of == "channel":
            return parse_method(f"channel:bits={bits}")
        return parse_method(f"transform:level={self.level / 4.0 ** (bits - STEPS[-1])!r}")
