"""Encode a planned model into one weights file of exactly the size allowed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.container import FILE_NAME, describe, file_nbytes, payload_nbytes, write
from waterfill.pipeline.planning import (
    Priced,
    Progress,
    about,
    context_of,
    overhead_nbytes,
    plan,
    quiet,
    read,
)
from waterfill.plan.allocation import DEFAULT
from waterfill.plan.fill import Coded, fill, follow, keep_to
from waterfill.registry import make_codec
from waterfill.runtime.pieces import Pieces
from waterfill.types import (
    Array,
    BudgetError,
    Encoded,
    Point,
    Spec,
    TensorInfo,
    WaterfillError,
    Weighting,
)

ATTEMPTS = 8


COMPARED_NBYTES = 1 << 18  # at a time: what a core's own cache holds


def encode_tensor(
    bits: Array,
    info: TensorInfo,
    weighting: Weighting | None,
    point: Point,
    aim: Array | None = None,
) -> tuple[Encoded, float]:
    """Encode, decode again, and measure: the coded tensor and its predicted nats.

    What is coded are the bits, or those of `aim`; what is measured is how far from the bits it is.
    """
    chosen = make_codec(point.spec)
    parts, extra = chosen.encode(bits if aim is None else aim, info, weighting or Weighting())
    decoded = chosen.decode(parts, extra, info)
    nats = 0.0
    if chosen.lossy:
        nats = (weighting or Weighting()).distortion(info.matrix(bits), info.matrix(decoded))
        if not math.isfinite(nats):
            raise WaterfillError(
                f"{info.name}: its weights are too near the largest that {info.dtype} holds for "
                f"{point.spec.id}; keep it exact with --keep"
            )
    elif not _same_bits(decoded, bits):
        raise WaterfillError(
            f"{info.name}: {point.spec} did not give back the same bits; please report this"
        )
    return Encoded(chosen.spec, info, parts, extra), nats


def _same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays have the same bytes; in pieces, for comparing makes an array of its own."""
    x, y = (v.reshape(-1).view(np.uint8) for v in (a, b))
    starts = range(0, x.size, COMPARED_NBYTES)
    return x.size == y.size and all(
        np.array_equal(x[at : at + COMPARED_NBYTES], y[at : at + COMPARED_NBYTES]) for at in starts
    )


class Encoder:
    """Encodes tensors of a priced model, each at a point at most once; remembers all on disk."""

    def __init__(self, priced: Priced, pieces: Pieces, progress: Progress = quiet) -> None:
        self.priced, self.pieces, self.progress = priced, pieces, progress
        self.provenance = about(priced)
        self._described: dict[str, dict[str, Any]] = {}
        self._aims: dict[str, Path] = {}
        self._done = 0

    def one(self, name: str, point: Point) -> int:
        """Encode a tensor at a point; bytes of its payload."""
        key = self._key(name)
        entry = self.pieces.get(key, point)
        if entry is None:
            info = self.priced.infos[name]
            weighting = self.priced.statistics.weighting(name)
            aim = np.load(self._aims[name]) if name in self._aims else None
            bits = read(self.priced.source, info)
            encoded, nats = encode_tensor(bits, info, weighting, point, aim)
            note = {"why": self.priced.why[name]} | ({"nats": float(f"{nats:.4g}")} if nats else {})
            entry = self.pieces.put(key, point, encoded, note)
        # A piece left by a run with other --keep or --codec rules has its reason, not ours.
        entry["note"]["why"] = self.priced.why[name]
        self._described[f"{key} {point.spec}"] = entry
        self._done += 1
        count = len(self.priced.curves.names)
        self.progress("encoding", min(self._done, count), count)
        return payload_nbytes(entry)

    def aim(self, name: str, bits: Array) -> None:
        """From now on encode other bits in place of a tensor's own."""
        digest = hashlib.sha256(bits.tobytes()).hexdigest()
        self._aims[name] = self.pieces.folder / f"aim-{digest}.npy"
        np.save(self._aims[name], bits)

    def decoded(self, name: str, point: Point) -> Array:
        """Bits of a tensor as it was encoded last at this point."""
        entry = self._described[f"{self._key(name)} {point.spec}"]
        parts = dict(zip(entry["parts"], self.pieces.payload(self._key(name), point), strict=True))
        return make_codec(point.spec).decode(parts, entry.get("extra", {}), self.priced.infos[name])

    def nbytes(self, coded: Mapping[str, Coded]) -> int:
        """Of the file that these tensors make."""
        return file_nbytes(self._entries(coded), self.provenance)

    def write(self, path: Path, coded: Mapping[str, Coded]) -> int:
        """Write the weights file; its size."""
        payloads = (
            () if info.group else self.pieces.payload(self._key(name), coded[name].point)
            for name, info in self.priced.infos.items()
        )
        return write(path, self._entries(coded), payloads, self.provenance)

    def _entries(self, coded: Mapping[str, Coded]) -> list[dict[str, Any]]:
        return [
            repeat(info)
            if info.group
            else self._described[f"{self._key(name)} {coded[name].point.spec}"]
            for name, info in self.priced.infos.items()
        ]

    def _key(self, name: str) -> str:
        return f"{name} {self._aims[name].stem}" if name in self._aims else name


def encode(
    encoder: Encoder,
    budget: int,
    out: Path,
    planned: Mapping[str, Point] | None = None,
    allocator: str = DEFAULT,
) -> dict[str, Coded]:
    """Encode every tensor and write the weights file into folder `out`.

    The budget is filled; with points `planned` before, those are kept to instead.
    """
    priced = encoder.priced
    if planned is not None:
        coded = keep_to(priced.curves, planned, budget, encoder.one, encoder.nbytes)
    elif allocator != DEFAULT:
        context = context_of(priced)

        def choose(aim: int) -> Mapping[str, Point]:
            return plan(priced, aim, allocator, context).choices

        coded = follow(priced.curves, choose, budget, encoder.one, encoder.nbytes)
    else:  # the hull learns from each tensor what the others should be
        overhead, aim = overhead_nbytes(priced, plan(priced, budget).choices), budget
        for _ in range(ATTEMPTS):
            coded = fill(priced.curves, aim, overhead, encoder.one, encoder.nbytes)
            excess = encoder.nbytes(coded) - budget
            if excess <= 0:
                break
            # Codecs with rungs only have nothing to trim a surprise with: aim lower by as much.
            aim -= excess
    nbytes = encoder.write(out / FILE_NAME, coded)
    if nbytes > budget:
        raise BudgetError(
            f"{budget:,} bytes is too small for the codecs asked for: the smallest found is {nbytes:,} "
            f"bytes ({8 * nbytes / priced.params:.2f} bits per weight)"
        )
    return coded


def repeat(info: TensorInfo) -> dict[str, Any]:
    """The index entry of a tensor that another one's bytes stand for."""
    return describe(Encoded(Spec("raw"), info, {}, {}), {"why": f"same as {info.group}"})
