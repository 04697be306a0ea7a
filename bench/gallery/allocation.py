"""Ways to spend a budget, against each other: ``python -m bench.gallery allocation``.

KL(original || decoded) on held-out text, as in `bench.quality`, everything encoded once. Two files are
compared at the bytes of the first: the second gets what the first has used as its budget. Where rungs
alone are at hand it may not be able to use it all; bytes of both are in the note.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from bench.harness import Row
from bench.measure import Measured, Subject
from waterfill.pipeline import plan, price_statistics
from waterfill.plan.allocation import allocators, find_allocator
from waterfill.types import BudgetError

BITS = (2.25, 2.5, 3.0, 4.0)
LOW = 2.5  # bits to which errors meet, so that a search should find what predictions miss
MODELS = ("stories260K", "english-7m")
CODECS = ("integer", "trellis")
MINUTES = {"stories260K": 1.0, "english-7m": 3.0}


class Contest:
    """One model and one codec."""

    def __init__(self, model: str, codec: str, quick: bool) -> None:
        self.model, self.codec = model, codec
        self.subject = Subject(model, 8192 if quick else 16384)
        self.minutes = MINUTES[model] * (0.5 if quick else 1.0)
        self.made = cache(self._made)

    def _made(
        self, name: str, bits: float | None = None, size: int | None = None
    ) -> Measured | None:
        searches = {"minutes": self.minutes} if find_allocator(name).starts_from else {}
        try:
            return self.subject.planned(
                name, bits=bits, size=size, codec={"*": self.codec}, propagate=False, allocate=name,
                **searches,
            )  # fmt: skip
        except BudgetError:
            return None  # less than the cheapest rungs take

    def against(self, name: str, other: str, bits: float, fair: bool = True) -> Iterator[Row]:
        """One over the other in KL; at the bytes of the first, or at the same budget."""
        one = self.made(name, bits)
        if one is None:
            return
        two = self.made(other, None, one.nbytes) if fair else self.made(other, bits)
        if two is None:
            return
        ratio = one.kl_nats / two.kl_nats
        note = (
            f"{verdict(ratio)}: {one.kl_nats:.4g} / {two.kl_nats:.4g} nats (held-out, stderr "
            f"{one.kl_nats_stderr:.2g}), {one.nbytes:,} / {two.nbytes:,} bytes"
        )
        yield Row(
            f"{self.model}, {self.codec}, {bits} bits: {name} over {other}", ratio, "", note=note
        )

    def predicted(self, bits: float) -> Iterator[Row]:
        """What the integer program promises over the hull, by the same prices."""
        priced = price_statistics(self.subject.statistics, codec={"*": self.codec})
        budget = int(priced.params * bits / 8)
        try:
            ours, hull = (plan(priced, budget, name) for name in ("program", "hull"))
        except BudgetError:
            return
        ratio = ours.predicted_nats / hull.predicted_nats
        note = f"{verdict(ratio)}: {ours.predicted_nats:.4g} / {hull.predicted_nats:.4g} nats"
        name = f"{self.model}, {self.codec}, {bits} bits: program over hull, predicted"
        yield Row(name, ratio, "", 1.0 + 1e-9, note=note)


def verdict(ratio: float) -> str:
    """Whether the first did no worse, as its source says."""
    return "reproduced" if ratio <= 1 else "contradicted"


def rows(quick: bool) -> Iterator[Row]:
    """Every pair that a source ranks: the better one, as it says, over the other."""
    baselines = ("hull", "uniform")
    others = [name for name in allocators() if name not in (*baselines, "evolutionary")]
    for model in MODELS[:1] if quick else MODELS:
        for codec in CODECS:
            contest = Contest(model, codec, quick)
            for bits in (2.5, 3.0) if quick else BITS:
                yield from contest.predicted(bits)
                if bits <= LOW:
                    yield from contest.against("evolutionary", "hull", bits, fair=False)
                yield from contest.against("hull", "uniform", bits, fair=False)
                for name in others:
                    yield from contest.against(name, "hull", bits)
                    yield from contest.against(name, "uniform", bits, fair=False)
