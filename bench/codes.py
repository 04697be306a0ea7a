"""Search for better trellis codes than ours. ``python -m bench.codes [--json FILE] [--quick]``"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bench.harness import Row, main
from waterfill.coding.trellis import CODES

PROTOCOL = (
    "every (feedback, input) of a number of states (2000 random ones of 128 and 256) quantises the same uniform "
    "samples, whose entropy no code changes; the best tenth of a first round (16 paths of 500) on 256 paths of "
    "500; gain = 10 log10 of plain rounding's error at the same density of points over the code's, at most 1.53 dB"
)
Floats = NDArray[np.float32]
LENGTH = 500


def errors(codes: list[tuple[int, int]], states: int, samples: Floats) -> Floats:
    """Mean squared error of the cheapest paths, in squared steps, float32 (codes,)."""
    state = np.arange(states)
    top = states // 2
    feedback, source = (np.array(v)[:, None] for v in zip(*codes, strict=True))
    grid = state // top
    came = [
        ((state ^ (feedback * grid) ^ (source * parity)) << 1 | grid) & (states - 1)
        for parity in (0, 1)
    ]
    which = np.arange(len(codes))[:, None]
    cost = np.full((len(codes), states, samples.shape[1]), 1e9, np.float32)
    cost[:, 0] = 0
    for x in samples:
        # Points of the four subsets are four steps apart.
        price = [np.square((x - offset + 2) % 4 - 2) for offset in (0, 2, 3, 1)]
        of_state = [np.where(grid[:, None], price[2 + p], price[p]) for p in (0, 1)]
        reached = [cost[which, came[p]] + of_state[p] for p in (0, 1)]
        cost = np.minimum(reached[0], reached[1])
    mean: Floats = cost.min(axis=1).mean(axis=1) / len(samples)
    return mean


def candidates(states: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Codes whose feedback has the state's top bit, and whose input has it clear."""
    top = states // 2
    every = list(itertools.product(range(top, states), range(1, top)))
    if len(every) <= 2000:
        return every
    chosen = random.choice(len(every), 2000, replace=False)
    return [every[i] for i in chosen] + [CODES[states]]


def gain(error: float) -> float:
    """In dB: points of a grid are two steps apart."""
    return float(10 * np.log10(4 / 12 / error))


def run(quick: bool) -> Iterator[Row]:
    """For each number of states: our code's gain, and what the best one found has more."""
    random = np.random.default_rng(0)
    for states, ours in CODES.items():
        if states > (16 if quick else 256):
            continue
        samples = random.uniform(-2, 2, (LENGTH, 256)).astype(np.float32)
        codes = candidates(states, random)
        few = max(1, 2**21 // (states * 16))
        first = np.concatenate(
            [errors(codes[i : i + few], states, samples[:, :16]) for i in range(0, len(codes), few)]
        )
        best = [codes[i] for i in np.argsort(first)[: max(4, min(len(codes) // 10, 64))]]
        second = np.concatenate([errors([code], states, samples) for code in [ours, *best]])
        winner = [ours, *best][int(second.argmin())]
        name = f"{states} states, ours {ours}"
        yield Row(f"{name}: gain", gain(float(second[0])), "dB")
        more = gain(float(second.min())) - gain(float(second[0]))
        yield Row(f"{name}: the best found has more", more, "dB", 0.02, note=f"{winner}")


if __name__ == "__main__":
    main("codes", PROTOCOL, run)
