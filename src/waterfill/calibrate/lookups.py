"""Sees look-ups in embedding tables, which are no matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from waterfill.calibrate.tallies import moment_of
from waterfill.calibrate.watch import Watch

__all__ = ["EmbeddingWatch"]


class EmbeddingWatch(TorchFunctionMode):
    """Sees embedding look-ups; their outputs are where the backward graph starts."""

    def __init__(self, watch: Watch, gradients: bool) -> None:
        super().__init__()
        self.watch = watch
        self.gradients = gradients

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.nn.functional.embedding:
            return out
        ids, weight = args[0], args[1]
        found = self.watch.find(weight)
        if found is None:
            return out
        name, shape = found
        rows = ids.reshape(-1).cpu().numpy()
        if not self.watch.backward:
            counts = np.bincount(rows, minlength=shape[0])
            tokens = self.watch.tally.tokens
            tokens[name] = tokens.get(name, np.zeros(shape[0])) + counts
        if self.gradients and torch.is_grad_enabled():
            out = out.detach().requires_grad_()
            out.register_hook(lambda g: self._gradient(name, g, rows, shape[0]))
        return out

    def _gradient(self, name: str, gradient: torch.Tensor, rows: Any, count: int) -> None:
        tally = self.watch.tally
        gradient = gradient.reshape(-1, gradient.shape[-1])
        sums, _ = moment_of([lambda: gradient], 1)
        tally.embedded[name] = np.asarray(tally.embedded.get(name, 0.0) + sums)
        each = gradient.square().sum(-1).cpu().numpy()
        energy = np.bincount(rows, each, minlength=count)
        tally.energy[name] = np.asarray(tally.energy.get(name, 0.0) + energy, np.float64)
