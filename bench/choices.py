"""Every option of `trellis`, by measured KL at equal bytes. ``python -m bench.choices [--json FILE] [--quick]``"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from bench.harness import Row, main
from bench.measure import Subject
from bench.models import source_of
from waterfill import evaluate
from waterfill.calibrate import Statistics
from waterfill.codecs.trellis import Trellis
from waterfill.pipeline import show
from waterfill.registry import parse_spec
from waterfill.types import Array, TensorInfo, Weighting

PROTOCOL = (
    "english-7m (and the demo, not with --quick): the steps of the planner's choice at 3 and at 2 bits, all scaled by "
    "one factor until the matrices take the same bytes (to 0.1 %, the rest allowed for at 6.02 dB a bit) under "
    "each option; KL on held-out text as in bench.quality, 8192 tokens; ratio = KL over the defaults'. A "
    "difference under 0.03 is noise"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "states=1": {"states": 1},
    "states=4": {"states": 4},
    "states=16": {"states": 16},
    "states=256": {"states": 256},
    "damping=0.003": {"damping": 0.003},
    "damping=0.01": {"damping": 0.01},
    "damping=0.03": {"damping": 0.03},
    "damping=0.1": {"damping": 0.1},
    "rows=0": {"rows": 0.0},
    "rows=0.25": {"rows": 0.25},
    "rows=0.75": {"rows": 0.75},
    "rows=1": {"rows": 1.0},
    "mmse=0": {"mmse": 0.0},
    "mmse=0.02": {"mmse": 0.02},
    "mmse=0.1": {"mmse": 0.1},
    "mmse=0.3": {"mmse": 0.3},
    "gains=yes": {"gains": True},
}
QUICK = ("states=1", "states=4", "damping=0.1", "mmse=0", "mmse=0.3")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One tensor, and the step that the planner chose for it."""

    bits: Array
    info: TensorInfo
    weighting: Weighting
    step: float


class Workbench:
    """A model whose matrices are replaced in memory."""

    def __init__(self, name: str, bits: float) -> None:
        self.subject = Subject(name, 8192)
        self.subject.planned("trellis", bits=bits, propagate=False)
        self.model = copy.deepcopy(self.subject.original)
        statistics = Statistics.open(self.subject.statistics)
        source = source_of(name)
        self.matrices = {}
        for entry in show(self.subject.artifact(bits=bits, propagate=False))["ledger"]:
            codec = parse_spec(entry["codec"]) if entry["codec"].startswith("trellis") else None
            weighting = statistics.weighting(entry["name"])
            if isinstance(codec, Trellis) and weighting is not None:
                matrix = source.read(entry["name"])
                info = statistics.infos[entry["name"]]
                self.matrices[entry["name"]] = Matrix(matrix, info, weighting, codec.step)
        self.params = sum(m.info.size for m in self.matrices.values())

    def coded(self, factor: float, options: dict[str, Any]) -> tuple[int, dict[str, Array]]:
        """Bytes of all matrices, and what they decode to."""
        nbytes, values = 0, {}
        for name, m in self.matrices.items():
            codec = Trellis(step=m.step * factor, **options)
            parts, extra = codec.encode(m.bits, m.info, m.weighting)
            nbytes += sum(len(p) for p in parts.values())
            values[name] = m.info.matrix(codec.decode(parts, extra, m.info))
        return nbytes, values

    def harm(self, nbytes: int | None, options: dict[str, Any]) -> tuple[int, float]:
        """Bytes, and KL in nats per token, at about `nbytes`."""
        factor = 1.0
        for _ in range(5):
            got, values = self.coded(factor, options)
            if nbytes is None or abs(got - nbytes) < nbytes / 1000:
                break
            factor *= 2.0 ** (8 * (got - nbytes) / self.params)
        for name, value in values.items():
            parameter = self.model.get_parameter(name)
            like = value.T if self.matrices[name].info.transposed else value
            parameter.data = torch.from_numpy(like.copy()).reshape(parameter.shape).float()
        kl: float = evaluate.compare(self.subject.original, self.model, self.subject.windows)[
            "kl_nats"
        ]
        # What is left of the difference in size, at four times the harm for a bit less.
        return got, kl if nbytes is None else kl * 4.0 ** (8 * (got - nbytes) / self.params)


def run(quick: bool) -> Iterator[Row]:
    """Defaults first, then each option alone."""
    for name in ("english-7m",) if quick else ("english-7m", "demo"):
        for bits in (3.0,) if quick else (3.0, 2.0):
            bench = Workbench(name, bits)
            nbytes, kl = bench.harm(None, {})
            yield Row(
                f"{name}, {bits:g} bits: KL with defaults", kl, "nats", note=f"{nbytes:,} bytes"
            )
            for label in QUICK if quick else OPTIONS:
                _, other = bench.harm(nbytes, OPTIONS[label])
                yield Row(f"{name}, {bits:g} bits, {label}: KL over defaults'", other / kl, "ratio")


if __name__ == "__main__":
    main("choices", PROTOCOL, run)
