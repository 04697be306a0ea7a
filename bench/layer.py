"""One layer against Shannon's bound, real bytes. ``python -m bench.layer [--json FILE] [--quick]``"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bench.harness import Row, main
from bench.models import source_of, statistics_of
from waterfill.codecs.trellis import Trellis
from waterfill.types import Encoded, TensorInfo, Weighting

PROTOCOL = (
    "gap = 8 * bytes / weights (payload, models, side information and headers) minus reverse water-filling at "
    "the distortion reached: mean over eigenvalues l of S of max(0, log2(v l / theta) / 2). Synthetic: W iid "
    "Gaussian 4096 x 512, eigenvalues log-uniform over e^7 (e^3) in a random basis, steps searched for the rate, "
    "mmse=0.3, no damping. Real layers: default settings but the step, S of 32768 tokens, v = mean square weight "
    "(they are no iid Gaussians: their gap may be negative)"
)
Floats = NDArray[np.float64]
RATES = (3.5, 2.5, 1.8, 1.2)
BARS = {4: (0.11, 0.17, 0.24, 0.28), 256: (0.09, 0.14, 0.20, 0.25)}
GOALS = (0.05, 0.08, 0.12, 0.15)


def synthetic(spread: float, m: int = 4096, n: int = 512) -> tuple[NDArray[np.float32], Floats]:
    """Weights (m, n), and S (n, n) with eigenvalues log-uniform over ``e ** spread``."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((m, n), np.float32)
    eigenvalues = np.exp(random.uniform(-spread / 2, spread / 2, n))
    basis = np.linalg.qr(random.standard_normal((n, n)))[0]
    return weight, (basis * eigenvalues) @ basis.T


def bound(eigenvalues: Floats, distortion: float) -> float:
    """Bits per weight that a Gaussian of these variances needs for this mean squared error."""
    low, high = 1e-30, float(eigenvalues.max())
    for _ in range(200):
        level = (low * high) ** 0.5
        low, high = (
            (low, level) if np.minimum(level, eigenvalues).mean() > distortion else (level, high)
        )
    return float(np.maximum(0, np.log2(np.maximum(eigenvalues, 1e-30) / level) / 2).mean())


def rate_and_gap(
    codec: Trellis, weight: NDArray[np.float32], moment: Floats
) -> tuple[float, float]:
    """Real bits per weight, and how many of them the bound would not have needed."""
    info = TensorInfo("weight", weight.shape, "F32", "linear", "")
    parts, extra = codec.encode(weight, info, Weighting(moment.astype(np.float32)))
    error = (weight - codec.decode(parts, extra, info)).astype(np.float64)
    distortion = float(np.einsum("ij,ij->", error @ moment, error)) / weight.size
    rate = 8 * Encoded(codec.spec, info, parts, extra).nbytes / weight.size
    variance = float(np.square(weight, dtype=np.float64).mean())
    return rate, rate - bound(variance * np.linalg.eigvalsh(moment), distortion)


def at_rate(
    codec: Trellis, rate: float, weight: NDArray[np.float32], moment: Floats
) -> tuple[float, float]:
    """`rate_and_gap` within 0.02 bits of a rate: the step is searched."""
    step = 2.0 ** (1.2 - rate)
    for _ in range(6):
        got, gap = rate_and_gap(dataclasses.replace(codec, step=step), weight, moment)
        if abs(got - rate) < 0.02:
            break
        step *= 2.0 ** ((got - rate) * (1.0 if rate > 2 else 1.4))
    return got, gap


def synthetic_rows(quick: bool) -> Iterator[Row]:
    for spread in (7,) if quick else (7, 3):
        weight, moment = synthetic(spread)
        for states in (1, 4, 64, 256):
            if quick and states not in BARS:
                continue
            codec = Trellis(states=states, mmse=0.3, rows=0, damping=0)
            for i, rate in enumerate(RATES):
                got, gap = at_rate(codec, rate, weight, moment)
                bar = BARS[states][i] if states in BARS and spread == 7 else None
                note = f"at {got:.3f} bits; goal beyond the bar {GOALS[i]:g}"
                name = f"e^{spread}, {states} states, {rate} bits: gap"
                yield Row(name, gap, "bits/weight", bar, note=note)


def real_rows(name: str) -> Iterator[Row]:
    """Mean gap of a model's layers, those of fewer than 512 rows apart."""
    source, statistics = source_of(name), statistics_of(name)
    gaps: dict[tuple[float, bool, int], list[tuple[float, float, int]]] = defaultdict(list)
    for tensor, info in statistics.infos.items():
        weighting = statistics.weighting(tensor) if info.kind == "linear" else None
        if weighting is None or weighting.second_moment is None:
            continue
        weight = info.matrix(source.read(tensor))
        moment = weighting.second_moment.astype(np.float64)
        damped = moment + 0.01 * np.trace(moment) / len(moment) * np.eye(len(moment))
        for step in (0.25, 0.5, 1.0):
            for states in (1, 64):
                # Half the step: one state has no second grid.
                codec = Trellis(step=step * (0.62 if states > 1 else 1.0), states=states, rows=0)
                got = rate_and_gap(codec, weight, damped)
                gaps[step, len(weight) < 512, states].append((*got, weight.size))
    for (_, few, states), found in sorted(gaps.items()):
        rates, differences, sizes = (np.array(v) for v in zip(*found, strict=True))
        note = f"at {np.average(rates, weights=sizes):.2f} bits, {len(found)} layers"
        kind = "under 512 rows" if few else "512 rows or more"
        label = f"{name}, {kind}, {states} states: gap"
        yield Row(label, float(np.average(differences, weights=sizes)), "bits/weight", note=note)


def run(quick: bool) -> Iterator[Row]:
    """Gaps of synthetic layers with their bars, then of real ones."""
    yield from synthetic_rows(quick)
    for name in ("stories260K",) if quick else ("stories260K", "demo", "english-7m"):
        yield from real_rows(name)


if __name__ == "__main__":
    main("layer", PROTOCOL, run)
