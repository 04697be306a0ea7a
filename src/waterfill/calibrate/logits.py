"""The logits of a model of which one block's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from waterfill.calibrate.loader import Loader
from waterfill.calibrate.passes import check_finite, model_inputs
from waterfill.calibrate.stream import build_skeleton, install_doors
from waterfill.calibrate.watch import Watch
from waterfill.sources.base import Source

__all__ = ["streamed_logits"]


def streamed_logits(source: Source, batches: list[NDArray[np.int64]]) -> Iterator[Any]:
    """Logits (tokens, vocabulary) of each batch, float32; None where the model has none.

    Parameters
    ----------
    source : the weights, read anew for every batch
    batches : int64 (windows, window)
    """
    model = build_skeleton(source)
    install_doors(Loader(model, source), Watch(), lambda: False, lambda _: None)
    for ids in batches:
        with torch.no_grad():
            out = model(**model_inputs(model, ids))
        check_finite(out)
        logits = getattr(out, "logits", None)
        yield None if logits is None else logits.reshape(-1, logits.shape[-1])
