"""The controller: deadlines are kept where they can be, and then nothing better was left out."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.cache.models import decoder, tokens
from waterfill.coding.cachegen_file import Reader
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.stored.link import RECOMPUTE, Choice, Offer, choose, offers_of, send

ORDER = (0, 1, 2)


def offer(scale: int, seconds: float | None) -> Offer:
    return Offer((9 * scale, 4 * scale, scale), seconds)


class Link:
    """A link whose bandwidth changes with time: (from second, bytes per second)."""

    def __init__(self, offers: list[Offer], trace: list[tuple[float, float]]) -> None:
        self.offers, self.trace, self.now = offers, trace, 0.0

    def transfer(self, chunk: int, level: int) -> tuple[int, float]:
        nbytes = self.offers[chunk].nbytes[level]
        left, start = float(nbytes), self.now
        while True:
            rate = [rate for at, rate in self.trace if at <= self.now][-1]
            until = min([at for at, _ in self.trace if at > self.now], default=float("inf"))
            if left <= rate * (until - self.now):
                self.now += left / rate
                return nbytes, self.now - start
            left -= rate * (until - self.now)
            self.now = until

    def compute(self, chunk: int) -> float:
        seconds = self.offers[chunk].seconds
        assert seconds is not None
        self.now += seconds
        return seconds

    def run(self, deadline: float) -> list[Choice]:
        first = self.trace[0][1]
        return send(self.offers, ORDER, deadline, first, self.transfer, self.compute)


offers = st.lists(
    st.builds(offer, st.integers(1, 50), st.one_of(st.none(), st.floats(0.1, 50))),
    min_size=1,
    max_size=8,
)


@given(offers, st.floats(1, 100), st.floats(0.1, 500))
def test_a_steady_link_keeps_every_deadline_that_can_be_kept(
    offers: list[Offer], rate: float, deadline: float
) -> None:
    least = sum(min([o.nbytes[2] / rate, *([o.seconds] if o.seconds else [])]) for o in offers)
    done = Link(offers, [(0.0, rate)]).run(deadline)[-1].done
    assert done <= max(deadline, least) * 1.000001


@given(offers, st.floats(1, 100), st.floats(0.1, 500), st.lists(st.floats(0.1, 20), max_size=4))
def test_a_link_that_gets_faster_keeps_them_too(
    offers: list[Offer], rate: float, deadline: float, steps: list[float]
) -> None:
    trace = [(0.0, rate)]
    for gap in steps:
        trace.append((trace[-1][0] + gap, trace[-1][1] * 1.5))
    least = sum(min([o.nbytes[2] / rate, *([o.seconds] if o.seconds else [])]) for o in offers)
    if least <= deadline:
        assert Link(offers, trace).run(deadline)[-1].done <= deadline * 1.000001


@given(offers, st.floats(1, 100), st.floats(0.1, 500))
def test_the_choice_is_the_best_that_fits(
    offers: list[Offer], rate: float, deadline: float
) -> None:
    level = choose(offers, ORDER, rate, deadline)
    better = ORDER[: ORDER.index(level)] if level != RECOMPUTE else ()
    for one in better:
        assert sum(o.nbytes[one] for o in offers) / rate > deadline
    if level != RECOMPUTE and all(o.seconds is not None for o in offers):
        assert sum(o.seconds or 0 for o in offers) > deadline


def test_a_link_that_breaks_down_is_met_with_coarser_levels() -> None:
    offers = [offer(100, None)] * 10
    steady = Link(offers, [(0.0, 900.0)]).run(11.0)
    assert [c.level for c in steady] == [0] * 10
    falling = Link(offers, [(0.0, 900.0), (3.5, 150.0)]).run(14.0)
    levels = [c.level for c in falling]
    assert levels[:4] == [0] * 4 and levels[4] == 2 and 0 not in levels[4:]
    assert falling[-1].done <= 14.0
    rising = Link(offers, [(0.0, 120.0), (2.0, 900.0)]).run(9.0)
    assert rising[0].level == 2 and rising[-1].level < 2 and rising[-1].done <= 9.0


def test_text_is_computed_again_where_that_is_soonest() -> None:
    fast = [offer(1000, 0.5)] * 4
    assert [c.level for c in Link(fast, [(0.0, 10.0)]).run(3.0)] == [RECOMPUTE] * 4
    assert [c.level for c in Link(fast, [(0.0, 1e6)]).run(0.4)] == [0] * 4


def test_offers_count_every_byte_of_a_file(tmp_path: Path) -> None:
    model, ids = decoder(), tokens(2, 100)
    cache = KVCache(model, method="exact")
    model(input_ids=ids, past_key_values=cache)
    cache.save(tmp_path / "one.kv", ids, 1e-6)
    with Reader(tmp_path / "one.kv") as reader:
        found, order = offers_of(reader, prefill_tokens_per_second=50.0)
    assert sum(o.nbytes[0] for o in found) == (tmp_path / "one.kv").stat().st_size
    assert sum(o.seconds or 0 for o in found) == 4.0 and order == (0,)
    cache.save(tmp_path / "two.kv", ids, [1e-3, "exact", 1e-6])
    with Reader(tmp_path / "two.kv") as reader:
        found, order = offers_of(reader)
        assert len(found) == reader.header.count
    assert order == (1, 2, 0)
    assert found[0].nbytes[1] > found[0].nbytes[2] > found[0].nbytes[0]
