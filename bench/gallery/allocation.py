"""Ways to spend a budget, against each other, on whole models.

KL(original || decoded) on held-out text, as in `bench.quality`, everything encoded once. Two files are
compared at equal bytes: one is made for so many bits, the other is given the size that came of it.
Only where `uniform` on rungs leaves bytes over that the other is meant to use is the budget the same
instead. Bytes of both are in the note. stories260K cannot have integers below 2.6 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from bench.gallery import ordering
from bench.harness import Row
from bench.measure import Measured, Subject
from waterfill.pipeline import plan, price_statistics
from waterfill.plan.allocation import find_allocator
from waterfill.types import BudgetError

BITS = (2.25, 2.5, 3.0, 4.0)
CODECS = ("integer", "trellis")
MINUTES = {"stories260K": 1.0, "english-7m": 3.0}  # of search


@dataclass(frozen=True)
class Claim:
    """One allocator does no worse than another.

    Attributes
    ----------
    better, worse : allocators
    size_of : the one whose file's bytes are the other's budget; "" if both have the same budget
    up_to : bits to which it is claimed
    """

    better: str
    worse: str
    size_of: str = ""
    up_to: float = 16.0


CLAIMS = (
    Claim("evolutionary", "hull", up_to=2.5),
    Claim("hull", "uniform", "uniform"),
    Claim("program", "hull", "program"),
    Claim("baq", "hull", "baq"),
    Claim("baq", "uniform"),
    Claim("lim", "uniform"),
    Claim("zd", "uniform"),
)


class Contest:
    """One model and one codec."""

    def __init__(self, model: str, codec: str, quick: bool) -> None:
        self.label, self.codec = f"{model}, {codec}", codec
        self.subject = Subject(model, 8192 if quick else 16384)
        self.minutes = MINUTES[model] * (0.25 if quick else 1.0)
        self.made = cache(self._made)

    def _made(
        self, name: str, bits: float | None = None, size: int | None = None
    ) -> Measured | None:
        """None where the budget is less than the cheapest rungs take."""
        searches = {"minutes": self.minutes} if find_allocator(name).starts_from else {}
        try:
            return self.subject.planned(
                name, bits=bits, size=size, codec={"*": self.codec}, propagate=False, allocate=name,
                **searches,
            )  # fmt: skip
        except BudgetError:
            return None

    def row(self, claim: Claim, bits: float) -> Iterator[Row]:
        """Held-out KL of the better over that of the worse."""
        first = self.made(claim.size_of or claim.worse, bits)
        if first is None or bits > claim.up_to:
            return
        found = {first.method: first}
        for name in {claim.better, claim.worse} - {first.method}:
            other = self.made(name, None, first.nbytes) if claim.size_of else None
            # Where the first is as small as a file can be, estimates say it cannot be: same budget.
            other = other or self.made(name, bits)
            if other is None:
                return
            found[name] = other
        one, two = found[claim.better], found[claim.worse]
        note = (
            f"{one.kl_nats:.4g} / {two.kl_nats:.4g} nats (standard error {two.kl_nats_stderr:.1g}), "
            f"{one.nbytes:,} / {two.nbytes:,} bytes"
        )
        name = f"{self.label}, {bits} bits: {claim.better} <= {claim.worse}"
        yield ordering(name, one.kl_nats / two.kl_nats, note)

    def predicted(self, bits: float) -> Iterator[Row]:
        """What the integer program promises, by the prices that the hull has too."""
        priced = price_statistics(self.subject.statistics, codec={"*": self.codec})
        try:
            ours, hull = (
                plan(priced, int(priced.params * bits / 8), n).predicted_nats
                for n in ("program", "hull")
            )
        except BudgetError:
            return
        name = f"{self.label}, {bits} bits: program <= hull as predicted"
        yield ordering(name, ours / hull, f"{ours:.4g} / {hull:.4g} nats")


def rows(quick: bool) -> Iterator[Row]:
    """Every claim, for all sizes that a codec can have."""
    for model in list(MINUTES)[: 1 if quick else None]:
        for codec in CODECS:
            contest = Contest(model, codec, quick)
            for bits in (2.5, 3.0) if quick else BITS:
                yield from contest.predicted(bits)
                for claim in CLAIMS:
                    yield from contest.row(claim, bits)
