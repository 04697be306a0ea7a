"""How much is kept of tensors in layers: the best first, larger sizes hold smaller ones."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from waterfill.plan.layers import fit, keep, nats_at

PREFIXES = {
    "a": [(10, 8.0), (110, 2.0), (210, 1.0)],
    "b": [(5, 4.0), (55, 3.0), (105, 0.5)],  # its first step gains less than its second
}


def test_steps_are_taken_in_order_of_gain_for_a_byte() -> None:
    assert keep(PREFIXES, 0) == {"a": 10, "b": 5}
    assert keep(PREFIXES, 15 + 60) == {"a": 70, "b": 5}
    assert keep(PREFIXES, 15 + 100 + 40) == {"a": 110, "b": 45}
    assert keep(PREFIXES, 15 + 100 + 100 + 1) == {"a": 111, "b": 105}
    assert keep(PREFIXES, 10**6) == {"a": 210, "b": 105}


def test_harm_between_two_prefixes() -> None:
    assert nats_at(PREFIXES["a"], 60) == 5.0
    assert nats_at(PREFIXES["a"], 210) == 1.0


prefixes = st.lists(st.tuples(st.integers(0, 50), st.floats(0, 9)), min_size=1, max_size=6).map(
    lambda steps: [
        (nbytes, nats)
        for nbytes, (_, nats) in zip(itertools.accumulate(s for s, _ in steps), steps, strict=True)
    ]
)


@given(st.dictionaries(st.sampled_from("abcdef"), prefixes, max_size=6), st.data())
def test_larger_rooms_hold_smaller_ones(
    found: dict[str, list[tuple[int, float]]], data: st.DataObject
) -> None:
    least = sum(p[0][0] for p in found.values())
    whole = sum(p[-1][0] for p in found.values())
    rooms = sorted(data.draw(st.lists(st.integers(least, whole), min_size=2, max_size=5)))
    kept = [keep(found, room) for room in rooms]
    for room, each in zip(rooms, kept, strict=True):
        assert sum(each.values()) == room
    for smaller, larger in itertools.pairwise(kept):
        assert all(smaller[name] <= larger[name] for name in found)


def test_a_file_is_filled_though_its_index_moves() -> None:
    def file_nbytes(kept: dict[str, int]) -> int:
        payload = sum(kept.values()) // 7 * 7  # rows
        return payload + 100 + hash(str(kept)) % 4

    for budget in range(130, 420, 13):
        kept = fit(PREFIXES, budget, file_nbytes)
        assert kept is not None and 0 <= budget - file_nbytes(kept) <= 14
    assert fit(PREFIXES, 90, file_nbytes) is None
