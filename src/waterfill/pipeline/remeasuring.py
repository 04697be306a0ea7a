"""The whole file's harm on the text it was calibrated on: what the sum over tensors leaves out.

Predictions are made for one tensor at a time and added. At low rates errors meet: the sum is too
small. So once the file is there, a slice of the calibration text is run through both models. This
is still a prediction: the text is the one the errors were shaped to, not the one you will read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.calibrate import Statistics
from waterfill.container import FILE_NAME, Reader
from waterfill.pipeline.encoding import Encoder
from waterfill.pipeline.planning import Progress, quiet
from waterfill.plan.fill import Coded
from waterfill.runtime.arrays import checkpoint_infos, decode
from waterfill.sources import Source
from waterfill.types import Array

BATCH_LOGITS = 1 << 24  # numbers, of one model: 64 MB as float32
MOST_BATCHES = 4  # each reads both models once


class Decoded:
    """A source whose tensors are those of an artifact; all else is as in the original."""

    def __init__(self, reader: Reader, original: Source) -> None:
        self._reader = reader
        self._original = original
        self.tensors = checkpoint_infos(reader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def read(self, name: str) -> Array:
        """A tensor, decoded anew; slices are joined."""
        if name in self._reader.entries:
            return decode(self._reader, name)
        count = self.tensors[name][1][0]
        return np.stack([self.read_slice(name, i) for i in range(count)])

    def read_slice(self, name: str, index: int) -> Array:
        """Entry `index` of a tensor along its first axis."""
        item = f"{name}[{index}]"
        if item in self._reader.entries:
            return decode(self._reader, item)
        whole: Array = self.read(name)[index]
        return whole


def remeasure(
    source: Source, statistics: Statistics, weights: Path, progress: Progress = quiet
) -> dict[str, float]:
    """KL of the file on a slice of the calibration text.

    Parameters
    ----------
    source : the original
    statistics : with the windows that `calibrate` set aside for this
    weights : the weights file

    Returns
    -------
    dict
        ``kl_nats_calibration`` (nats per token), its standard error with windows as the draws, and
        ``tokens_calibration``; {} where nothing can be measured: no windows were kept, the model
        has no logits, or torch is not installed.
    """
    if statistics.sample is None:
        return {}
    try:
        from waterfill.calibrate.logits import streamed_logits
        from waterfill.evaluate.language import mean_divergence
    except ImportError:
        return {}
    config = source.config.get("text_config", source.config)
    batches = _batches(statistics.sample, int(config.get("vocab_size") or 1))
    found: list[float] = []
    with Reader(weights) as reader:
        changed = streamed_logits(Decoded(reader, source), batches)
        for ids, p in zip(batches, streamed_logits(source, batches), strict=True):
            if p is None:
                return {}
            q = next(changed)
            each = np.split(mean_divergence(p, q)[1], len(ids))
            found += [float(kl.mean()) for kl in each]
            progress("measuring", len(found), sum(map(len, batches)))
    spread = float(np.std(found, ddof=1) / np.sqrt(len(found))) if len(found) > 1 else 0.0
    return {
        "kl_nats_calibration": float(np.mean(found)),
        "kl_nats_calibration_stderr": spread,
        "tokens_calibration": len(found) * statistics.sample.shape[1],
    }


def keep_better(
    encoder: Encoder,
    coded: Mapping[str, Coded],
    budget: int,
    folder: Path,
    before: dict[str, float],
) -> dict[str, float]:
    """Write another weights file; the better of the two on the calibration text stays in `folder`.

    Parameters
    ----------
    encoder : of both
    coded : what the new one holds
    budget : bytes that it may have
    before : what `remeasure` says of the file that is there

    Returns
    -------
    What `remeasure` says of the file that stays: `before` itself, where it is the old one.
    """
    second = folder / f"{FILE_NAME}.second"
    priced = encoder.priced
    try:
        if encoder.write(second, coded) <= budget:
            after = remeasure(priced.source, priced.statistics, second, encoder.progress)
            if after["kl_nats_calibration"] < before["kl_nats_calibration"]:
                second.replace(folder / FILE_NAME)
                return after
    finally:
        second.unlink(missing_ok=True)  # an artifact holds one weights file, whatever happens
    return before


def _batches(ids: NDArray[np.int64], vocabulary: int) -> list[NDArray[np.int64]]:
    """Windows in batches whose logits fit; fewer windows, spread evenly, where they are too many."""
    per_batch = max(1, BATCH_LOGITS // (vocabulary * ids.shape[1]))
    count = min(len(ids), per_batch * MOST_BATCHES)
    chosen = ids[np.linspace(0, len(ids) - 1, count).astype(np.int64)]
    return np.array_split(chosen, -(-count // per_batch))
