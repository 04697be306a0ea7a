"""Price a model's tensors and choose an operating point for each: no encoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from waterfill import __version__
from waterfill.calibrate import Statistics
from waterfill.container import file_nbytes, payload_nbytes
from waterfill.pipeline.prices import PriceList
from waterfill.plan.allocation import DEFAULT, Context, Trial, find_allocator
from waterfill.plan.hull import Curves, at_level, cheapest, curves, smallest, solve_level
from waterfill.plan.price import Rules, contenders, price
from waterfill.registry import Codec, make_codec
from waterfill.sources import Source, open_source
from waterfill.types import (
    Array,
    BudgetError,
    Floats,
    Plan,
    Point,
    Spec,
    TensorInfo,
    WaterfillError,
)

Progress = Callable[[str, int, int], None]


def quiet(stage: str, done: int, total: int) -> None:
    """The default progress: none."""


@dataclass(frozen=True)
class Priced:
    """A model with its statistics and every tensor's operating points: ready for any budget."""

    source: Source
    statistics: Statistics
    curves: Curves
    why: Mapping[str, str]
    rules: Rules

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the order of the checkpoint."""
        return self.statistics.infos

    @property
    def params(self) -> int:
        """Parameters, a repeated tensor counted once."""
        return sum(i.size for i in self.infos.values() if not i.group)

    @property
    def original_nbytes(self) -> int:
        """Bytes of the original's tensors as stored."""
        return sum(i.nbytes for i in self.infos.values())


def read(source: Source, info: TensorInfo) -> Array:
    """Stored bits of a tensor or slice."""
    return (
        source.read(info.name) if info.index is None else source.read_slice(info.tensor, info.index)
    )


def check_same(statistics: Statistics, source: Source) -> None:
    """WaterfillError unless the statistics were made from this very model."""
    if statistics.source_fingerprint != source.fingerprint():
        raise WaterfillError(
            f"{statistics.folder} holds statistics of {statistics.source_path or statistics.source_name}, "
            f"which is not (or no longer) the model {source.path or source.name}; calibrate again"
        )


def prepare(
    source: Source,
    statistics: Statistics,
    rules: Rules,
    write: bool = True,
    progress: Progress = quiet,
) -> Priced:
    """Price every tensor; prices are kept beside the statistics for the next budget if `write`."""
    own = {name: info for name, info in statistics.infos.items() if not info.group}
    weighted = {name: statistics.is_weighted(name) for name in own}
    rules.check(own, weighted)
    prices: dict[str, list[Point]] = {}
    why: dict[str, str] = {}
    worth: dict[Any, set[str]] = {}
    with PriceList.open(statistics, write) as known:
        for done, (name, info) in enumerate(own.items(), 1):
            candidates, forced = rules.candidates(info, weighted[name])
            reason = (
                "water level" if weighted[name] else "kept exact: takes part in no matrix product"
            )
            why[name] = forced or statistics.notes.get(name) or reason
            alike = info.kind, info.matrix_shape, info.dtype, frozenset(c.id for c in candidates)
            if not forced and alike in worth:
                candidates = [c for c in candidates if c.id in worth[alike]]
            prices[name] = known.points(name, candidates, partial(_price, source, statistics, info))
            if not forced:
                worth.setdefault(alike, contenders(prices[name]))
            progress("pricing", done, len(own))
    largest_first = sorted(own, key=lambda n: -own[n].size)
    found = curves({n: prices[n] for n in largest_first})
    return Priced(source, statistics, found, why, rules)


def _price(
    source: Source, statistics: Statistics, info: TensorInfo, rungs: Sequence[Codec]
) -> list[Point]:
    return price(read(source, info), info, statistics.weighting(info.name), rungs)


def overhead_nbytes(priced: Priced, points: Mapping[str, Point]) -> int:
    """Header and index bytes to expect: real entries with made-up checksums and sizes."""
    random = np.random.default_rng(0)
    described = []
    for name, info in priced.infos.items():
        entry: dict[str, Any] = {
            "name": name,
            "codec": ["raw", 1, {}],
            "dtype": info.dtype,
            "shape": list(info.shape),
            "kind": info.kind,
            "parts": {},
        }
        if info.group:
            entry |= {"same_as": info.group, "note": {"why": f"same as {info.group}"}}
        else:
            chosen = make_codec(points[name].spec)
            entry["codec"] = _made_up(chosen, random)
            entry["parts"] = {
                part: [int(random.integers(info.size + 1)), int(random.integers(2**32))]
                for part in chosen.names
            }
            nats = {"nats": float(f"{random.random():.4g}")} if chosen.lossy else {}
            entry["note"] = {"why": priced.why[name]} | nats
        entry |= {"index": info.index} if info.index is not None else {}
        entry |= {"transposed": True} if info.transposed else {}
        described.append(entry)
    return file_nbytes(described, about(priced)) - sum(map(payload_nbytes, described))


def _made_up(chosen: Codec, random: np.random.Generator) -> list[Any]:
    """A specification whose continuous settings have as many digits as real ones will."""
    usual = type(chosen)().spec.config
    own = {
        key: float(random.random()) if isinstance(value, float) and value != usual[key] else value
        for key, value in chosen.spec.config.items()
    }
    return Spec(chosen.id, own, chosen.version).to_json()


def context_of(priced: Priced, trial: Trial | None = None) -> Context:
    """What an allocator may look at beside the curves."""
    source, statistics = priced.source, priced.statistics

    def matrix(name: str) -> Floats:
        return priced.infos[name].matrix(read(source, priced.infos[name]))

    def changes() -> Mapping[str, float]:
        try:
            from waterfill.calibrate.influence import influence
        except ImportError as error:
            raise WaterfillError(
                f"running text through the model needs torch and transformers ({error}): "
                "pip install 'waterfill[hf]'"
            ) from error
        if statistics.sample is None:
            raise WaterfillError(f"{statistics.folder} keeps no text to run; calibrate again")
        return influence(source, statistics.sample)

    return Context(priced.infos, matrix, changes, trial)


def plan(
    priced: Priced, budget: int, allocator: str = DEFAULT, context: Context | None = None
) -> Plan:
    """Choose an operating point for every tensor; nothing is encoded.

    Parameters
    ----------
    budget : bytes of the file
    allocator : see `waterfill.plan.allocation`
    context : of `context_of`, the same for all budgets

    Raises
    ------
    BudgetError
        If the budget is smaller than the cheapest plan; the message states the smallest possible.
    """
    c = priced.curves
    allocate, context = find_allocator(allocator).allocate, context or context_of(priced)
    choices = cheapest(c)
    overhead = overhead_nbytes(priced, choices)
    least = smallest(c) + overhead
    if budget < least:
        raise BudgetError(
            f"{budget:,} bytes is too small: the smallest this model can be is about {int(least * 1.01):,} "
            f"bytes ({8 * least * 1.01 / priced.params:.2f} bits per weight)"
        )
    for _ in range(2):  # codecs differ in what their entries take: count those that were chosen
        room = budget - overhead
        choices = allocate(c, room, context)
        overhead = overhead_nbytes(priced, choices)
    nats = sum(point.distortion_nats for point in choices.values())
    return Plan(choices, priced.why, budget, nats, solve_level(c, room))


def predicted_curve(priced: Priced, budget: int) -> tuple[dict[str, float], ...]:
    """Predicted rate-distortion points of the whole model around a budget."""
    overhead = overhead_nbytes(priced, cheapest(priced.curves))
    points = []
    for octave in np.linspace(-1.25, 1.25, 21):
        target = budget * 2.0**octave - overhead
        if target < smallest(priced.curves):
            continue
        nbytes, nats, _ = at_level(priced.curves, solve_level(priced.curves, target))
        total = float(nbytes.sum()) + overhead
        points.append(
            {
                "nbytes": total,
                "bits_per_weight": 8 * total / priced.params,
                "predicted_nats": float(nats.sum()),
            }
        )
    return tuple(
        p for i, p in enumerate(points) if i == 0 or p["nbytes"] > points[i - 1]["nbytes"] * 1.001
    )


def about(priced: Priced) -> dict[str, Any]:
    """Provenance inside the weights file."""
    return {"waterfill": __version__, "model": priced.source.name}


def price_statistics(
    folder: Path,
    keep: Sequence[str] = (),
    codec: Mapping[str, str] | None = None,
    *,
    write: bool = True,
    progress: Progress = quiet,
) -> Priced:
    """Price the model that a statistics folder was made from, keeping the prices in it."""
    statistics = Statistics.open(folder)
    source = open_source(statistics.source_path)
    check_same(statistics, source)
    rules = Rules(tuple(keep), tuple((codec or {}).items()))
    return prepare(source, statistics, rules, write, progress)
