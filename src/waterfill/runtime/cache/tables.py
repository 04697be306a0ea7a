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

LEAST, MOST = 1e-6, 6e4  # of a scale: what float16 holds well


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
        """Rows near these, (..., rows, width); of too large or small ones, the direction."""
        top = np.abs(rows).max(-1, keepdims=True, initial=0)
        codes = np.rint(rows * (127 / np.where(top > 0, top, 1))).astype(np.int8)
        scale = np.where(top > 0, np.clip(top / 127, LEAST, MOST), 0).astype(np.float16)
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
