"""Bases that a coder holds, in 8-bit numbers: a cache of a thousand tokens is a fifth smaller for it.

A basis is held once, complete, as what components are multiplied with. What vectors are multiplied with is
its inverse, made anew for each encoding: that takes a tenth of what coding a block does, and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Rows", "inverse"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of 8-bit numbers with a scale each.

    Attributes
    ----------
    codes : int8 (..., rows, width)
    scale : float16 (..., rows, 1)
    """

    codes: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, rows: NDArray[np.floating]) -> Rows:
        """Rows near these, (..., rows, width)."""
        top = np.abs(rows).max(-1, keepdims=True, initial=0)
        scale = np.minimum(top / 127, 6e4).astype(np.float16)
        safe = np.where(scale > 0, scale, 1).astype(np.float64)
        codes = np.clip(np.rint(rows / safe), -127, 127).astype(np.int8)
        return cls(torch.from_numpy(codes), torch.from_numpy(scale))

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is held."""
        return self.codes, self.scale

    def floats(self) -> torch.Tensor:
        """float32 (..., rows, width)."""
        return self.codes.float() * self.scale.float()


def inverse(rows: torch.Tensor) -> torch.Tensor:
    """What vectors are multiplied with so that components times these rows are the vectors again.

    Parameters
    ----------
    rows : float32 (heads, width, width)

    Returns
    -------
    float32 (heads, width, width), a column for each component
    """
    found: torch.Tensor = torch.linalg.inv(rows.double()).float()
    return found
