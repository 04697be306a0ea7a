"""A model in memory whose tensors can be exchanged, and its distance from what it was at first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from waterfill.calibrate.loader import Loader, load_all
from waterfill.calibrate.passes import check_finite, model_inputs
from waterfill.calibrate.stream import build_skeleton
from waterfill.sources.base import Source
from waterfill.types import WaterfillError

__all__ = ["Resident"]

KEPT_NBYTES = 1 << 29  # of log probabilities of the model as it was at first


class Resident:
    """A model whose weights are all in memory, as float32.

    Parameters
    ----------
    source : its weights; read again by `reload`
    ids : int64 (windows, window). Those beyond what may be kept in memory are left out.
    """

    def __init__(self, source: Source, ids: NDArray[np.int64]) -> None:
        self.model = build_skeleton(source)
        self.loader = Loader(self.model, source)
        self.parameters = load_all(self.loader)
        first = self._log_probabilities(ids[:1])
        fits = max(1, KEPT_NBYTES // max(4 * first.numel(), 1))
        self.ids = ids[:fits]
        self.original = [first, *(self._log_probabilities(row[None]) for row in self.ids[1:])]

    def reload(self, names: set[str]) -> None:
        """Read the parameters anew that some tensors of the checkpoint make."""
        made = {
            out for job in self.loader.all_jobs if names & set(job.files) for out in job.outputs
        }
        for name, values in self.loader.load(made & self.parameters.keys()).items():
            with torch.no_grad():
                self.parameters[name].copy_(values)

    def divergences(self, windows: Sequence[int]) -> list[float]:
        """Nats per token of KL(as at first || as now) in each of some windows, by their numbers."""
        found = []
        for i in windows:
            p, q = self.original[i], self._log_probabilities(self.ids[i : i + 1])
            # What the original rules out (-inf) weighs nothing, whatever it has become.
            term = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
            found.append(float(term.sum(-1, dtype=torch.float64).mean()))
        return found

    def _log_probabilities(self, ids: NDArray[np.int64]) -> torch.Tensor:
        with torch.no_grad():
            out = self.model(**model_inputs(self.model, ids))
            check_finite(out)
            logits = getattr(out, "logits", None)
            if logits is None:
                raise WaterfillError(
                    f"{type(self.model).__name__} has no logits, so nothing tells what harms it less"
                )
            return torch.log_softmax(logits.reshape(-1, logits.shape[-1]).float(), -1)
