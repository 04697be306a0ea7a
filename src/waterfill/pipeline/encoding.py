"""Encode a planned model into one weights file of exactly the size allowed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.container import FILE_NAME, describe, file_nbytes, payload_nbytes, write
from waterfill.pipeline.planning import Priced, Progress, about, overhead_nbytes, plan, quiet, read
from waterfill.plan.fill import Coded, fill, keep_to
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
    make_codec,
)

ATTEMPTS = 8


def encode_tensor(
    bits: Array, info: TensorInfo, weighting: Weighting | None, point: Point
) -> tuple[Encoded, float]:
    """Encode, decode again, and measure: the coded tensor and its predicted nats."""
    chosen = make_codec(point.spec)
    parts, extra = chosen.encode(bits, info, weighting or Weighting())
    decoded = chosen.decode(parts, extra, info)
    nats = 0.0
    if chosen.lossy:
        nats = (weighting or Weighting()).distortion(info.matrix(bits), info.matrix(decoded))
    elif not np.array_equal(decoded.reshape(-1).view(np.uint8), bits.reshape(-1).view(np.uint8)):
        raise WaterfillError(
            f"{info.name}: {point.spec} did not give back the same bits; please report this"
        )
    return Encoded(chosen.spec, info, parts, extra), nats


def encode(
    priced: Priced,
    budget: int,
    out: Path,
    pieces: Pieces,
    progress: Progress = quiet,
    planned: Mapping[str, Point] | None = None,
) -> dict[str, Coded]:
    """Encode every tensor and write the weights file into folder `out`.

    The budget is filled; with points `planned` before, those are kept to instead.
    """
    overhead = 0 if planned else overhead_nbytes(priced, plan(priced, budget).choices)
    provenance = about(priced)
    described: dict[tuple[str, str], dict[str, Any]] = {}
    done = 0

    def one(name: str, point: Point) -> int:
        nonlocal done
        entry = pieces.get(name, point)
        if entry is None:
            info = priced.infos[name]
            weighting = priced.statistics.weighting(name)
            encoded, nats = encode_tensor(read(priced.source, info), info, weighting, point)
            note = {"why": priced.why[name]} | ({"nats": float(f"{nats:.4g}")} if nats else {})
            entry = pieces.put(name, point, encoded, note)
        # A piece left by a run with other --keep or --codec rules has its reason, not ours.
        entry["note"]["why"] = priced.why[name]
        described[name, _key(point)] = entry
        done += 1
        progress("encoding", min(done, len(priced.curves.names)), len(priced.curves.names))
        return payload_nbytes(entry)

    def entries(coded: Mapping[str, Coded]) -> list[dict[str, Any]]:
        return [
            _repeat(info) if info.group else described[name, _key(coded[name].point)]
            for name, info in priced.infos.items()
        ]

    def total(coded: Mapping[str, Coded]) -> int:
        return file_nbytes(entries(coded), provenance)

    aim = budget
    for _ in range(ATTEMPTS):
        if planned is not None:
            coded = keep_to(priced.curves, planned, budget, one, total)
            break
        coded = fill(priced.curves, aim, overhead, one, total)
        excess = total(coded) - budget
        if excess <= 0:
            break
        # Codecs with rungs only have nothing to trim a surprise with: aim lower by as much.
        aim -= excess
    payloads = (
        () if info.group else pieces.payload(name, coded[name].point)
        for name, info in priced.infos.items()
    )
    nbytes = write(out / FILE_NAME, entries(coded), payloads, provenance)
    if nbytes > budget:
        raise BudgetError(
            f"{budget:,} bytes is too small for the codecs asked for: the smallest found is {nbytes:,} "
            f"bytes ({8 * nbytes / priced.params:.2f} bits per weight)"
        )
    return coded


def _key(point: Point) -> str:
    return json.dumps(point.spec.to_json())


def _repeat(info: TensorInfo) -> dict[str, Any]:
    return describe(Encoded(Spec("raw"), info, {}, {}), {"why": f"same as {info.group}"})
