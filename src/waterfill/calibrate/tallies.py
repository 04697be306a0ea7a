"""What is kept of the products that were seen, and the arithmetic of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["BLOCK", "Array64", "Inputs", "Tally", "Use", "locate", "moment_of"]

Array64 = NDArray[np.float64]

BLOCK = 4096  # tokens per float32 product; blocks are added in float64
STRIP = 512  # rows of a moment made at a time: it is in memory once


class Use(NamedTuple):
    """Outputs [start, stop) of a parameter, or of its slice `slice`, as used in a product.

    `axis` is the input axis of the matrix: 1 for (outputs, inputs), 0 for (inputs, outputs).
    """

    parameter: str
    slice: int
    axis: int
    start: int
    stop: int
    kind: str


@dataclass
class Inputs:
    """Inputs that one or several weights share.

    Attributes
    ----------
    uses : who got them
    moment : () -> float64 (n, n), sum of x x^T, and the number of input vectors x
    """

    uses: list[Use]
    moment: Callable[[], tuple[Array64, int]]


@dataclass
class Tally:
    """What one batch's gradients say, summed in float64.

    Attributes
    ----------
    rows : Use -> (m,) sum over positions of squared output gradients
    tokens : embedding parameter -> (V,) how often each row was looked up
    embedded : embedding parameter -> (d, d) sum of g g^T at its output
    energy : embedding parameter -> (V,) sum of |g|^2 over the look-ups of each row
    """

    rows: dict[Use, Array64]
    tokens: dict[str, Array64]
    embedded: dict[str, Array64]
    energy: dict[str, Array64]


def locate(shape: tuple[int, ...], view: torch.Tensor) -> tuple[int, int, int, int] | None:
    """(slice, contracted axis, where the view starts along it, and along the other axis).

    For a view (k, q) of a parameter, contracted over k. None for one that is not made of rows and
    columns of one slice.
    """
    a, b = shape[-2:]
    axes = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            axes.append(-1)  # may have any stride
        elif stride == b:
            axes.append(0)
        elif stride == 1:
            axes.append(1)
        else:
            return None
    match axes:
        case [-1, -1]:
            axes = [1, 0] if b == 1 else [0, 1]
        case [-1, other]:
            axes = [1 - other, other]
        case [one, -1]:
            axes = [one, 1 - one]
    if axes[0] == axes[1]:
        return None
    index, rest = divmod(int(view.storage_offset()), a * b)
    at = divmod(rest, b)
    return index, axes[0], at[axes[0]], at[axes[1]]


def moment_of(make: list[Callable[[], torch.Tensor]], groups: int) -> tuple[Array64, int]:
    """Sum of x x^T over all rows in float64, and their number.

    The groups of a convolution count as one: both are divided by them.
    """
    total: torch.Tensor | None = None
    count = 0
    for rows in make:
        x = rows().detach().float()
        count += x.shape[0]
        if total is None:
            total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        for block in torch.split(x, BLOCK):
            strips = zip(torch.split(total, STRIP), torch.split(block.T, STRIP), strict=True)
            for strip, part in strips:
                strip.add_(part @ block)
    assert total is not None
    return total.div_(groups).cpu().numpy(), count // groups
