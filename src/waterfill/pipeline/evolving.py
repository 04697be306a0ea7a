"""Search for a better file than the one there is, by running the model; keep it if it is better."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from waterfill.calibrate import Statistics
from waterfill.coding.native import return_freed_memory
from waterfill.pipeline.encoding import Encoder
from waterfill.pipeline.planning import context_of
from waterfill.pipeline.remeasuring import keep_better
from waterfill.plan.allocation import Allocator
from waterfill.plan.fill import Coded, refill
from waterfill.sources.base import Source
from waterfill.types import Array, Point, WaterfillError

MINUTES = 10.0
TOKENS = 16384  # of the calibration text, that the search sees


class Chosen:
    """A source whose tensors are those of a choice of points; all else is as in the original."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._original: Source = encoder.priced.source
        self.choices: dict[str, Point] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def read(self, name: str) -> Array:
        """A tensor, decoded anew; slices are joined."""
        infos = self._encoder.priced.infos
        if name not in infos:
            bits = self._original.read(name).copy()
            for i in range(len(bits)):
                if f"{name}[{i}]" in infos:
                    bits[i] = self.read(f"{name}[{i}]")
            return bits
        own = infos[name].group or name
        if own in self.choices:
            return self._encoder.decoded(own, self.choices[own])
        info = infos[name]
        return (
            self._original.read(name)
            if info.index is None
            else self._original.read_slice(info.tensor, info.index)
        )


class Tried:
    """The `Trial` of a model that is being compressed.

    Parameters
    ----------
    encoder : that made the file to be bettered
    coded : what was chosen for it
    budget : bytes of the file
    state : file for `keep`; gone with the work folder
    minutes, generations : after either the search is over
    seed : of all that is drawn
    """

    def __init__(
        self,
        encoder: Encoder,
        coded: Mapping[str, Coded],
        budget: int,
        state: Path,
        minutes: float,
        generations: int | None,
        seed: int,
    ) -> None:
        from waterfill.calibrate.resident import Resident

        self.start = {name: one.point for name, one in coded.items()}
        self.seed = seed
        self._encoder, self._budget, self._state = encoder, budget, state
        self._minutes, self._generations = minutes, generations
        self._known: dict[tuple[str, str], int] = {}
        self._began, self._before = time.monotonic(), 0.0
        self._chosen = Chosen(encoder)
        self._resident = Resident(self._chosen, _windows(encoder.priced.statistics))
        self.windows, self.window = self._resident.ids.shape

    def nbytes(self, name: str, point: Point) -> int:
        """Bytes of a tensor as really encoded; each point once."""
        key = name, str(point.spec)
        if key not in self._known:
            self._known[key] = self._encoder.one(name, point)
        return self._known[key]

    def slack(self, choices: Mapping[str, Point]) -> int:
        """Bytes left of the budget."""
        coded = {name: Coded(point, self.nbytes(name, point)) for name, point in choices.items()}
        return self._budget - self._encoder.nbytes(coded)

    def harms(self, choices: Mapping[str, Point], windows: Sequence[int]) -> list[float]:
        """Nats per token in some windows; only tensors that have changed are decoded."""
        before, infos = self._chosen.choices, self._encoder.priced.infos
        changed = {n for n, p in choices.items() if n not in before or before[n].spec != p.spec}
        for name in changed:
            self.nbytes(name, choices[name])
        self._chosen.choices = dict(choices)
        touched = {i.tensor for i in infos.values() if (i.group or i.name) in changed}
        self._resident.reload(touched)
        return self._resident.divergences(windows)

    def kept(self) -> dict[str, Any] | None:
        """The state of a run of the same beginnings, with the time it took."""
        if not self._state.exists():
            return None
        table: dict[str, Any] = json.loads(self._state.read_text())
        if table.pop("beginnings") != self._beginnings():
            return None
        self._before = table.pop("seconds")
        return table

    def keep(self, state: Mapping[str, Any]) -> None:
        """Written to a temporary name, then renamed."""
        partial = self._state.with_suffix(".partial")
        about = {"beginnings": self._beginnings(), "seconds": self._seconds()}
        partial.write_text(json.dumps({**about, **state}))
        partial.replace(self._state)

    def is_over(self, generation: int) -> bool:
        """Whether the minutes are up, or the generations."""
        spent, given = self._seconds(), 60 * self._minutes
        self._encoder.progress("evolving", int(min(spent, given)), int(given))
        return spent >= given or generation == self._generations

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def _beginnings(self) -> str:
        start = {name: point.spec.to_json() for name, point in self.start.items()}
        about = [self._encoder.pieces.context, self._budget, self.seed, self._resident.ids.shape]
        return hashlib.sha256(json.dumps([about, start]).encode()).hexdigest()


def _windows(statistics: Statistics) -> Any:
    ids = statistics.rest
    if ids is None:
        raise WaterfillError(
            f"{statistics.folder} keeps too little text to search with; calibrate on more tokens"
        )
    count = max(1, min(len(ids), TOKENS // ids.shape[1]))
    return ids[[round(i * (len(ids) - 1) / max(count - 1, 1)) for i in range(count)]]


def evolve(
    allocator: Allocator,
    encoder: Encoder,
    coded: Mapping[str, Coded],
    budget: int,
    folder: Path,
    before: dict[str, float],
    *,
    state: Path,
    minutes: float = MINUTES,
    generations: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, float], Mapping[str, Coded]]:
    """Let an allocator that runs the model look for a better file than the one in `folder`.

    What it finds is judged on text that the search has not seen, so that nothing gets worse.

    Parameters
    ----------
    encoder, coded, budget, folder, before : as of `propagate_losses`
    state, minutes, generations, seed : as of `Tried`

    Returns
    -------
    What `remeasure` says of the file that stays, and what was chosen for it.

    Raises
    ------
    WaterfillError
        Where the model or its text do not allow it; the file is as it was.
    """
    if not before:
        raise WaterfillError(
            f"{allocator.name} measures the model, and this one cannot be measured: it has no logits, "
            "or its statistics keep no text"
        )
    curves = encoder.priced.curves
    trial = Tried(encoder, coded, budget, state, minutes, generations, seed)
    found = allocator.allocate(curves, budget, context_of(encoder.priced, trial))
    del trial
    return_freed_memory()
    if found == {name: one.point for name, one in coded.items()}:
        return before, coded
    chosen = {name: Coded(point, encoder.one(name, point)) for name, point in found.items()}
    again = refill(curves, chosen, budget, encoder.one, encoder.nbytes)
    after = keep_better(encoder, again, budget, folder, before)
    return (before, coded) if after is before else (after, again)
