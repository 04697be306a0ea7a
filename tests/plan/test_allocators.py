"""Every way to spend a budget: within it always, and as its source says."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.test_hull import ladder, rung
from waterfill.plan import allocators as home
from waterfill.plan.allocation import Context, allocators, find_allocator
from waterfill.plan.allocators.evolutionary import OFFSPRING
from waterfill.plan.hull import Curves, curves, smallest
from waterfill.plan.rates import block_of
from waterfill.types import Floats, Point, Spec, SpecError, TensorInfo, WaterfillError

CLOSED = [name for name in allocators() if not find_allocator(name).starts_from]
RUNGS = (2, 3, 4, 6, 8)


def rungs(
    size: int, sensitivity: float, factors: Sequence[float] = (1,) * len(RUNGS)
) -> list[Point]:
    """Integers: harm falls about six decibels a bit."""
    each = zip(RUNGS, factors, strict=True)
    return [rung(size * b / 8 + 10, sensitivity * size * 4.0**-b * f, b) for b, f in each]


def context(sizes: Mapping[str, int], **more: Any) -> Context:
    """Of one-row matrices; every second one in a block of its own."""
    infos = {name: TensorInfo(name, (1, size), "F32", "linear") for name, size in sizes.items()}

    def matrix(name: str) -> Floats:
        return np.random.default_rng(sizes[name]).standard_normal((1, sizes[name]), np.float32)

    influence = {name: 1 / (i + 2) for i, name in enumerate(sizes) if i % 2}
    return Context(infos, **{"matrix": matrix, "influence": lambda: influence, **more})


def allocate(name: str, c: Curves, budget: float, context: Context) -> dict[str, Point]:
    return find_allocator(name).allocate(c, budget, context)


def total(choices: Mapping[str, Point]) -> float:
    return sum(p.nbytes for p in choices.values())


def harm(choices: Mapping[str, Point]) -> float:
    return sum(p.distortion_nats for p in choices.values())


models = st.lists(
    st.tuples(st.integers(8, 3000), st.floats(1e-3, 1e3), st.booleans(), st.integers(0, 2**32 - 1)),
    min_size=1,
    max_size=8,
)


def model(tensors: list[tuple[int, float, bool, int]]) -> tuple[dict[str, list[Point]], Context]:
    """Tensors on a continuous ladder or on rungs with bumps; and one vector that is kept."""
    prices: dict[str, list[Point]] = {}
    for i, (size, sensitivity, slides, seed) in enumerate(tensors):
        bumps = np.random.default_rng(seed).uniform(0.5, 2, len(RUNGS)).tolist()
        name = f"layers.{i}.w"
        prices[name] = (
            ladder(size, sensitivity * size) if slides else rungs(size, sensitivity, bumps)
        )
    prices["norm"] = [Point(64, 0.0, Spec("raw"))]
    return prices, context({**{n: int(p[-1].nbytes) for n, p in prices.items()}, "norm": 16})


@pytest.mark.parametrize("name", CLOSED)
@given(tensors=models, share=st.floats(0, 1.2))
@settings(max_examples=40, deadline=None)
def test_within_budget(
    name: str, tensors: list[tuple[int, float, bool, int]], share: float
) -> None:
    prices, about = model(tensors)
    c = curves(prices)
    most = sum(points[-1].nbytes for points in prices.values())
    budget = smallest(c) + share * (most - smallest(c))
    choices = allocate(name, c, budget, about)
    assert list(choices) == list(prices)
    assert total(choices) <= budget * (1 + 1e-9)
    for tensor, point in choices.items():
        assert point in prices[tensor] or (
            point.spec.id == "trellis" and 0 < point.nbytes < prices[tensor][-1].nbytes
        )


@given(tensors=models, share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_the_program_is_never_worse_than_the_hull(
    tensors: list[tuple[int, float, bool, int]], share: float
) -> None:
    prices, about = model(tensors)
    c = curves(prices)
    budget = smallest(c) + share * (sum(p[-1].nbytes for p in prices.values()) - smallest(c))
    found = allocate("program", c, budget, about)
    assert harm(found) <= harm(allocate("hull", c, budget, about)) * (1 + 1e-12)


def test_the_program_finds_the_best_of_all_choices() -> None:
    prices = {f"t{i}": rungs(90 + 37 * i, 2.0**-i, (1, 3, 1, 2, 1)) for i in range(5)}
    c, about = curves(prices), context({name: 100 for name in prices})
    better = 0
    for budget in (260.0, 333.0, 500.0, 640.0):
        found = allocate("program", c, budget, about)
        combos = (
            dict(zip(prices, combo, strict=True)) for combo in itertools.product(*prices.values())
        )
        best = min(harm(combo) for combo in combos if total(combo) <= budget)
        assert harm(found) == pytest.approx(best, rel=1e-3)
        better += harm(found) < 0.999 * harm(allocate("hull", c, budget, about))
    assert better


def test_the_program_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(WaterfillError, match="pip install 'waterfill\\[program\\]'"):
        allocate("program", curves({"a": rungs(100, 1.0)}), 100, context({"a": 100}))


@given(
    st.lists(st.tuples(st.integers(100, 9000), st.floats(1e-2, 1e2)), min_size=2, max_size=6),
    st.floats(0.05, 7.5),
)
@settings(max_examples=40, deadline=None)
def test_baq_is_the_hull_where_harm_is_exponential(
    tensors: list[tuple[int, float]], bits: float
) -> None:
    sizes = {f"t{i}": size for i, (size, _) in enumerate(tensors)}
    c = curves({f"t{i}": ladder(size, k * size) for i, (size, k) in enumerate(tensors)})
    budget = sum(sizes.values()) * bits / 8
    ours, hull = (allocate(name, c, budget, context(sizes)) for name in ("baq", "hull"))
    for name, size in sizes.items():
        assert ours[name].nbytes / size == pytest.approx(hull[name].nbytes / size, abs=1e-3)
    # Equal loss of all weights, where no ladder ends.
    inside = [
        p.distortion_nats / sizes[n] for n, p in ours.items() if 0.1 < p.nbytes / sizes[n] < 0.9
    ]
    assert inside == pytest.approx(inside[:1] * len(inside), rel=0.02)


def test_uniform_is_the_same_rung_everywhere_and_the_largest_that_fits() -> None:
    sizes = {"a": 1000, "b": 80, "c": 300}
    c = curves({name: rungs(size, 1.0) for name, size in sizes.items()})
    for bits in RUNGS[:-1]:
        budget = sum(size * bits / 8 + 10 for size in sizes.values())
        for slack in (0.5, 60):
            choices = allocate("uniform", c, budget + slack, context(sizes))
            assert {p.spec.config["bits"] for p in choices.values()} == {bits}


def test_uniform_is_one_rate_where_ladders_are_continuous() -> None:
    sizes = {"a": 1000, "b": 80, "c": 300}
    c = curves({name: ladder(size, 1.0) for name, size in sizes.items()})
    choices = allocate("uniform", c, sum(sizes.values()) * 2.3 / 8, context(sizes))
    assert [8 * p.nbytes / sizes[n] for n, p in choices.items()] == pytest.approx([2.3] * 3)


@pytest.mark.parametrize("name", ["lim", "zd"])
def test_important_blocks_go_up_first(name: str) -> None:
    """Block 2 changes most, then 0, 1, 3; and the share of large weights is the other way round."""
    importance = [0.3, 0.2, 0.9, 0.1]
    sizes = {f"model.layers.{i}.{part}": 2000 for i in range(4) for part in ("up", "down")}
    order = [2, 0, 1, 3]

    def matrix(tensor: str) -> Floats:
        large = 100 + 50 * order.index(int(tensor.split(".")[2]))
        values = np.random.default_rng(0).uniform(-1, 1, (1, 2000)).astype(np.float32)
        values[0, :large] = 12
        return values

    asked = []

    def influence() -> dict[str, float]:
        asked.append(1)
        return {tensor: importance[int(tensor.split(".")[2])] for tensor in sizes}

    def weights(tensor: str) -> Floats:
        asked.append(1)
        return matrix(tensor)

    about = context(sizes, matrix=weights, influence=influence)
    c = curves({tensor: rungs(2000, 1.0) for tensor in sizes})
    seen = []
    for budget in np.linspace(smallest(c), 1.55 * smallest(c), 60):
        bits = {n: p.spec.config["bits"] for n, p in allocate(name, c, budget, about).items()}
        per_block = [bits[f"model.layers.{i}.up"] for i in order]
        assert per_block == [bits[f"model.layers.{i}.down"] for i in order]
        assert per_block == sorted(per_block, reverse=True)
        seen.append(per_block)
    for raised in range(5):
        assert [3] * raised + [2] * (4 - raised) in seen
    assert len(asked) <= 2 * len(sizes), "model and weights are looked at for the first budget only"


def test_blocks_are_told_by_name() -> None:
    def block(name: str, index: int | None = None) -> str:
        return block_of(TensorInfo(name, (1,), "F32", index=index))

    assert block("model.layers.11.mlp.up_proj.weight") == "model.layers.11"
    assert block("h.3.attn.c_attn.weight") == "h.3"
    assert block("model.layers.1.experts.7.w1.weight") == "model.layers.1"
    assert block("model.layers.1.experts.w1[7]", 7) == "model.layers.1"
    assert block("model.embed_tokens.weight") == block("lm_head.weight") == ""


def test_names() -> None:
    assert {"hull", "evolutionary"} <= set(allocators())
    assert all(find_allocator(name).name == name for name in allocators())
    with pytest.raises(SpecError, match=r"known: .*hull"):
        find_allocator("random")
    with pytest.raises(SpecError, match="compress --allocate evolutionary"):
        allocate("evolutionary", curves({"a": rungs(100, 1.0)}), 100, context({"a": 100}))


def test_an_allocator_is_found_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of planning.md is one."""
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    example = next(
        text for text in re.findall(r"```python\n(.*?)```", page, re.S) if "def " in text
    )
    (tmp_path / "smallest_of_all.py").write_text(example)
    monkeypatch.setattr(home, "__path__", [*home.__path__, str(tmp_path)])
    assert "smallest_of_all" in allocators()
    c = curves({"a": rungs(100, 1.0), "b": ladder(300, 1.0)})
    assert total(allocate("smallest_of_all", c, 900, context({}))) == smallest(c)
    sys.modules.pop(f"{home.__name__}.smallest_of_all")


class Pretend:
    """A model whose true harm is other than predicted: every tensor's by a factor of its own."""

    windows, window, seed = 24, 512, 3

    def __init__(self, c: Curves, start: Mapping[str, Point], generations: int) -> None:
        self.start, self.generations = start, generations
        self.factors = dict(zip(c.names, 4.0 ** np.arange(-3, len(c.names) - 3), strict=True))
        self.budget = sum(self.nbytes(n, p) for n, p in start.items()) + 2
        self.state: dict[str, Any] | None = None
        self.calls: list[int] = []
        self.looks = 10**9

    def nbytes(self, name: str, point: Point) -> int:
        return int(point.nbytes * (1.03 + 0.01 * np.sin(point.nbytes)))

    def slack(self, choices: Mapping[str, Point]) -> int:
        return self.budget - sum(self.nbytes(n, p) for n, p in choices.items())

    def harms(self, choices: Mapping[str, Point], windows: Sequence[int]) -> list[float]:
        assert self.slack(choices) >= 0
        self.calls.append(len(windows))
        return [sum(self.factors[n] * p.distortion_nats for n, p in choices.items())] * len(windows)

    def kept(self) -> dict[str, Any] | None:
        return self.state

    def keep(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)

    def is_over(self, generation: int) -> bool:
        self.looks -= 1
        return generation == self.generations or self.looks < 0


@pytest.mark.parametrize("make", [ladder, rungs])
def test_evolution_finds_what_predictions_miss(make: Any) -> None:
    sizes = {f"t{i}": 400 + 90 * i for i in range(7)}
    c = curves({name: make(size, 0.01) for name, size in sizes.items()})
    about = context(sizes)
    start = allocate("hull", c, sum(sizes.values()) * 3.4 / 8, about)
    trial = Pretend(c, start, 40)
    before = trial.harms(start, [0])
    found = allocate("evolutionary", c, 0, context(sizes, trial=trial))
    assert trial.slack(found) >= 0
    assert trial.harms(found, [0])[0] < 0.8 * before[0]
    assert trial.state is not None and trial.state["generation"] == 40
    # Growing numbers of tokens for fewer and fewer.
    assert set(trial.calls) == {1, 4, 24}
    assert 40 * OFFSPRING + 2 >= trial.calls.count(1) > 2 * trial.calls.count(4)
    assert trial.calls.count(4) >= trial.calls.count(24) - 1 > 2

    halves = Pretend(c, start, 17)
    allocate("evolutionary", c, 0, context(sizes, trial=halves))
    halves.generations = 40
    assert allocate("evolutionary", c, 0, context(sizes, trial=halves)) == found


def test_a_generation_cut_short_counts_for_nothing() -> None:
    sizes = {f"t{i}": 400 + 90 * i for i in range(5)}
    c = curves({name: ladder(size, 0.01) for name, size in sizes.items()})
    start = allocate("hull", c, 500, context(sizes))
    trial = Pretend(c, start, 40)
    for looks in (5, 12):  # while children are made, and while they are tried
        trial.looks = looks
        assert allocate("evolutionary", c, 0, context(sizes, trial=trial)) == start
        assert trial.state is None


def test_nothing_to_move_is_no_error() -> None:
    c = curves({"a": [rung(100, 0.5, 4)], "b": [rung(50, 0.1, 3)]})
    start = allocate("hull", c, 150, context({"a": 200, "b": 100}))
    trial = Pretend(c, start, 3)
    trial.factors = {"a": 1.0, "b": 1.0}
    assert allocate("evolutionary", c, 0, context({"a": 200, "b": 100}, trial=trial)) == start
