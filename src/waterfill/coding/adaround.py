"""Rounding up or down by gradient: a layer's error minimised over all its weights at once.

AdaRound (Nagel et al. 2020): a weight may become either of its two neighbours on the grid; which, says
``h(v)`` in 0..1, a stretched sigmoid, whose v follows the gradient of the layer's error while a growing
penalty drives every h to 0 or 1. The gradient is written out here: one product with S a step.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from waterfill.coding.coordinate import Quadratic
from waterfill.coding.native import device
from waterfill.coding.trellis_torch import find_device
from waterfill.coding.uniform import Grid, Rounded
from waterfill.types import Floats

if TYPE_CHECKING:
    import torch

STEPS = 200
RATE = 0.2  # of Adam: twenty times the paper's, which takes fifty times the steps
DECAYS = 0.9, 0.999
PENALTY = 5.0  # of half-way weights, in units of the harm of rounding to nearest
WARM = 0.2  # share of the steps before the penalty
FIRST_POWER, LAST_POWER = 20.0, 2.0  # of the penalty
STRETCH, SHIFT = 1.2, 0.1  # h = clip(STRETCH * sigmoid(v) - SHIFT, 0, 1)
TOGETHER = 1 << 23  # weights at a time


def adaround(
    columns: Floats, start: Rounded, grid: Grid, quadratic: Quadratic, steps: int = STEPS
) -> Rounded:
    """Each weight up or down on the grid of `start`; a row that would come out worse stays as it was.

    Parameters
    ----------
    columns : float32 (n, m)
    start : rounded to nearest; what it keeps beside the grid stays
    steps : of Adam

    Raises
    ------
    WaterfillError
        Where torch, or the device that WATERFILL_DEVICE names, is not there.
    """
    where = find_device(device())
    import torch

    n, m = columns.shape
    moment = torch.from_numpy(np.ascontiguousarray(quadratic.moment)).to(where)
    values = start.values.copy()
    many = max(1, TOGETHER // max(n, 1))
    for first in range(0, m, many):
        rows = slice(first, first + many)
        scale = np.where(start.scales[:, rows] == 0, 1, start.scales[:, rows])
        inputs = (columns[:, rows], start.values[:, rows], grid.spread(scale, n))
        weight, first_guess, spread = (
            torch.from_numpy(np.ascontiguousarray(a)).to(where) for a in inputs
        )
        found = _round(weight, first_guess, spread, grid.ends, moment, quadratic.damping, steps)
        values[:, rows] = found.cpu().numpy()
    if start.kept is not None:
        values[start.kept] = start.values[start.kept]
    worse = quadratic.harms(values - columns) > quadratic.harms(start.values - columns)
    values[:, worse] = start.values[:, worse]
    return replace(start, values=values)


def _round(
    weight: torch.Tensor,
    start: torch.Tensor,
    scale: torch.Tensor,
    ends: tuple[int, int],
    moment: torch.Tensor,
    damping: float,
    steps: int,
) -> torch.Tensor:
    """Values (n, m) for weights (n, m); every row follows its own gradient, whatever the others."""
    import torch

    def products(error: torch.Tensor) -> torch.Tensor:
        if moment.ndim == 1:
            return (moment[:, None] + damping) * error
        return torch.addmm(error, moment, error, beta=damping)

    below = torch.floor(weight / scale)
    error = start - weight
    unit = (products(error) * error).sum(0).clamp_min(1e-30)
    share = (weight / scale - below).clamp(0.01, 0.99)
    v = -torch.log(STRETCH / (share + SHIFT) - 1)
    mean, square = torch.zeros_like(v), torch.zeros_like(v)
    for step in range(steps):
        sigmoid = torch.sigmoid(v)
        h = (STRETCH * sigmoid - SHIFT).clamp_(0, 1)
        code = below + h
        error = code.clamp(*ends) * scale - weight
        slope = products(error) * (2 * scale / unit)
        slope *= (code >= ends[0]) & (code <= ends[1])
        slope += _penalty(h, step / steps)
        slope *= ((h > 0) & (h < 1)) * sigmoid * (1 - sigmoid) * STRETCH
        mean.lerp_(slope, 1 - DECAYS[0])
        square.mul_(DECAYS[1]).addcmul_(slope, slope, value=1 - DECAYS[1])
        scaled = (square / (1 - DECAYS[1] ** (step + 1))).sqrt_().add_(1e-8)
        v.addcdiv_(mean, scaled, value=-RATE / (1 - DECAYS[0] ** (step + 1)))
    return (below + (v >= 0)).clamp_(*ends) * scale


def _penalty(h: torch.Tensor, done: float) -> torch.Tensor | float:
    """Slope of ``1 - |2 h - 1| ** power``, the power falling on a cosine once warm."""
    if done <= WARM:
        return 0.0
    angle = math.pi * (done - WARM) / (1 - WARM)
    power = LAST_POWER + (FIRST_POWER - LAST_POWER) * 0.5 * (1 + math.cos(angle))
    side = 2 * h - 1
    return side.sign() * side.abs().pow(power - 1) * (-2 * power * PENALTY / max(len(h), 1))
