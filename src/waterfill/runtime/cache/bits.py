"""Codes of few bits packed into bytes, on any device.

A width is split in powers of two, 5 bits in 4 and 1, so that a byte never holds part of a field: n codes
are a field of 4 bits in n / 2 bytes, then one of 1 bit in n / 8. Within a field of w bits, byte j holds
codes j, j + n w / 8, j + 2 n w / 8 and so on, lowest bits first.
"""

from __future__ import annotations

import torch

__all__ = ["fields", "pack", "unpack"]


def fields(bits: int) -> list[tuple[int, int]]:
    """Widths of a code's fields and how far each is shifted in the code, highest first."""
    found, left = [], bits
    for width in (8, 4, 2, 1):
        if left >= width:
            left -= width
            found.append((width, left))
    return found


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 (..., n * bits / 8) of codes (..., n), 0 to 2**bits - 1; n is a multiple of 8, bits 1 to 8."""
    codes = codes.to(torch.uint8)
    n, parts = codes.shape[-1], []
    for width, shift in fields(bits):
        part = (codes >> shift) & ((1 << width) - 1)
        lanes = part.reshape(*part.shape[:-1], 8 // width, n * width // 8).unbind(-2)
        packed = lanes[0]
        for i, lane in enumerate(lanes[1:], 1):
            packed = packed | (lane << (i * width))
        parts.append(packed)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack`: uint8 (..., n)."""
    n = packed.shape[-1] * 8 // bits
    out, at = None, 0
    for width, shift in fields(bits):
        part = packed[..., at : at + n * width // 8]
        at += part.shape[-1]
        top = (1 << width) - 1
        lanes = torch.cat([(part >> (i * width)) & top for i in range(8 // width)], -1)
        out = lanes << shift if out is None else out | (lanes << shift)
    assert out is not None
    return out
