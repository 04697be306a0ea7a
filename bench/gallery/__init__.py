"""Claims of papers, measured on real layers: one file for each codec, or each room of `plan/`.

Each module defines ``rows(quick: bool) -> Iterator[Row]``. An ordering that a paper claims is a row
whose figure is a ratio; its note says from the figure whether it was reproduced.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bench.harness import Row
from bench.models import source_of, statistics_of
from waterfill.registry import Codec, parse_spec
from waterfill.types import Array, Encoded, TensorInfo, Weighting


@dataclass(frozen=True, eq=False)
class Layer:
    """One real weight matrix, and what an error in it costs.

    Attributes
    ----------
    model : see `bench.models`
    info : TensorInfo
    bits : the stored array
    weighting : of the model's own calibration, in nats per token
    """

    model: str
    info: TensorInfo
    bits: Array
    weighting: Weighting


@functools.cache
def layers(model: str = "english-7m", count: int = 6) -> tuple[Layer, ...]:
    """So many linear layers of a model, spread evenly over its depth and kinds."""
    source, statistics = source_of(model), statistics_of(model)
    names = [
        name
        for name, info in statistics.infos.items()
        if info.kind == "linear" and not info.group and statistics.is_weighted(name)
    ]
    # A step that shares no factor with the number of matrices in a block meets all of them.
    chosen = [names[i * len(names) // count + i % 3] for i in range(min(count, len(names) - 2))]
    found = []
    for name in chosen:
        weighting = statistics.weighting(name)
        assert weighting is not None
        found.append(Layer(model, statistics.infos[name], source.read(name), weighting))
    return tuple(found)


def harm(codec: str | Codec, layer: Layer) -> tuple[int, float]:
    """Bytes, and predicted nats per token, of a layer under a codec."""
    chosen = parse_spec(codec) if isinstance(codec, str) else codec
    info = layer.info
    parts, extra = chosen.encode(layer.bits, info, layer.weighting)
    decoded = chosen.decode(parts, extra, info)
    nats = layer.weighting.distortion(info.matrix(layer.bits), info.matrix(decoded))
    return Encoded(chosen.spec, info, parts, extra).nbytes, nats


def total(codec: str, chosen: tuple[Layer, ...]) -> tuple[int, float]:
    """`harm`, summed over layers."""
    each = [harm(codec, layer) for layer in chosen]
    return sum(nbytes for nbytes, _ in each), sum(nats for _, nats in each)


def versus(claim: str, left: str, right: str, chosen: tuple[Layer, ...]) -> Row:
    """The harm of one codec over another's, whatever their bytes; bytes are in the note.

    The claim is that the ratio is at most one.
    """
    (left_nbytes, left_nats), (right_nbytes, right_nats) = total(left, chosen), total(right, chosen)
    note = f"{left}: {left_nbytes:,} bytes, {left_nats:.3g} nats; {right}: {right_nbytes:,}, {right_nats:.3g}"
    return ordering(claim, left_nats / right_nats, note)


def at_equal_bytes(claim: str, left: str, right: list[str], chosen: tuple[Layer, ...]) -> Row:
    """The harm of one codec over that of a ladder of another at the same bytes.

    Between rungs, the ladder's harm is taken to fall straight in its logarithm; beyond them, by
    6.02 dB a bit.
    """
    import numpy as np

    nbytes, nats = total(left, chosen)
    points = sorted(total(text, chosen) for text in right)
    weights = sum(layer.info.size for layer in chosen)
    sizes, harms = np.array([p[0] for p in points]), np.log([p[1] for p in points])
    inside = float(np.interp(nbytes, sizes, harms))
    beyond = nbytes - float(np.clip(nbytes, sizes[0], sizes[-1]))
    other = float(np.exp(inside - np.log(4) * 8 * beyond / weights))
    note = f"{left}: {8 * nbytes / weights:.2f} bits, {nats:.3g} nats; the other there {other:.3g}"
    return ordering(claim, nats / other, note)


def ordering(claim: str, ratio: float, note: str) -> Row:
    """A row for what a paper claims: that a ratio is at most one."""
    verdict = "reproduced" if ratio <= 1 else "contradicted"
    return Row(claim, ratio, "ratio", note=f"{verdict}; {note}")
