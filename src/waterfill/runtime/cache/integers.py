"""Integers with a scale and a zero, the way most caches are quantised."""

from __future__ import annotations

import torch

from waterfill.runtime.cache.bits import pack, unpack

__all__ = ["from_integers", "to_integers"]

LEAST = 6e-8  # the smallest step that float16 holds


def to_integers(
    blocks: torch.Tensor, axis: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, step and lowest number of blocks, all numbers along an axis sharing the latter two.

    Parameters
    ----------
    blocks : float32 (batch, blocks, heads, BLOCK, width)

    Returns
    -------
    uint8 (batch, blocks, heads, width, BLOCK * bits / 8), and twice float16, as `blocks` but 1 along the axis
    """
    low, high = blocks.amin(axis, True), blocks.amax(axis, True)
    step = ((high - low) / (2**bits - 1)).clamp(1e-20, 6e4).half()
    low = low.clamp(-6e4, 6e4).half()
    codes = ((blocks - low.float()) / step.float().clamp_min(LEAST)).round_()
    # Tokens last: a multiple of 8 whatever the width.
    return pack(codes.clamp_(0, 2**bits - 1).transpose(3, 4), bits), step, low


def from_integers(
    codes: torch.Tensor, step: torch.Tensor, low: torch.Tensor, bits: int
) -> torch.Tensor:
    """Inverse of `to_integers`: float32 (batch, blocks, heads, BLOCK, width)."""
    numbers = unpack(codes, bits).transpose(3, 4).float()
    return numbers * step.float().clamp_min(LEAST) + low.float()
