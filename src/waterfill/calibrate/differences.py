"""Sensitivities by trial: noise in one tensor at a time, KL measured. Slow, assumes little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from waterfill.calibrate.names import Placement
from waterfill.calibrate.passes import model_inputs
from waterfill.types import TensorInfo, WaterfillError, Weighting

__all__ = ["Trial", "scale_of"]

TARGET = 1e-3  # nats per token: small enough to be quadratic, large enough to be seen
WINDOWS = 4
TRIES = 4


class Trial:
    """A model in memory whose parameters can be disturbed.

    Parameters
    ----------
    model : with all its parameters real
    parameters : parameter name -> the tensor
    placements : item of the checkpoint -> where it lies in the parameters
    plain : tensor of the checkpoint -> parameter of the same shape
    ids : int64 (windows, window)
    seed : of the noise
    """

    def __init__(
        self,
        model: Any,
        parameters: Mapping[str, torch.Tensor],
        placements: Mapping[tuple[str, int | None], list[Placement]],
        plain: Mapping[str, str],
        ids: NDArray[np.int64],
        seed: int,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.placements = placements
        self.plain = plain
        self.inputs = model_inputs(model, ids[:WINDOWS])
        self.generator = np.random.default_rng(seed)
        self.reference = self._log_probabilities()

    def kl(self, items: list[tuple[str, int | None]], noise: NDArray[np.float32]) -> float:
        """Nats per token when `noise`, of an item's shape as stored, is added to the items."""
        where = [p for item in items for p in self.placements.get(item, [])]
        whole = [self.plain[name] for name, index in items if index is None and name in self.plain]
        whole = [] if where else whole
        names = {p.parameter for p in where} | set(whole)
        kept = {name: self.parameters[name].clone() for name in names}
        try:
            for name in whole:
                self.parameters[name].add_(torch.from_numpy(noise))
            for p in where:
                target = self.parameters[p.parameter]
                target = target if p.index is None else target[p.index]
                part = torch.from_numpy(noise[np.ix_(p.file_rows, p.file_columns)])
                rows, columns = torch.from_numpy(p.rows), torch.from_numpy(p.columns)
                at = (columns[:, None], rows) if p.transposed else (rows[:, None], columns)
                target[at] += part.T if p.transposed else part
            changed = self._log_probabilities()
        finally:
            for name, values in kept.items():
                self.parameters[name].copy_(values)
        return float((self.reference.exp() * (self.reference - changed)).sum(-1).mean())

    def _log_probabilities(self) -> torch.Tensor:
        with torch.no_grad():
            out = self.model(**self.inputs)
            if getattr(out, "logits", None) is None:
                raise WaterfillError(
                    f"{type(self.model).__name__} has no logits to compare; use method='fisher'"
                )
            logits: torch.Tensor = out.logits.double()
        return logits.log_softmax(-1)


def scale_of(
    kl: Callable[[NDArray[np.float32]], float],
    info: TensorInfo,
    weighting: Weighting,
    generator: np.random.Generator,
    size: float,
) -> float:
    """Factor by which `weighting` must be multiplied to predict the KL that noise causes.

    Parameters
    ----------
    kl : noise of the item's stored shape -> nats per token
    info : of the item
    weighting : any weighting, up to its scale
    generator : of the noise
    size : standard deviation of the item's values
    """
    m, n = info.matrix_shape
    unit = generator.standard_normal((m, n)).astype(np.float32)
    predicted = weighting.distortion(unit, np.zeros_like(unit))
    noise = (unit.T if info.transposed else unit).reshape(info.shape)
    step = 0.02 * size or 1e-3
    measured = 0.0
    for _ in range(TRIES):
        measured = kl(noise * np.float32(step))
        if TARGET / 4 < measured < TARGET * 4:
            break
        step *= float(np.clip(np.sqrt(TARGET / max(measured, TARGET * 1e-4)), 0.02, 100.0))
    if not np.isfinite(measured):
        raise WaterfillError(f"noise in {info.name} gives no finite KL; use method='fisher'")
    return max(measured, 0.0) / (step**2 * predicted) if predicted > 0 else 0.0
