"""What methods that code a block by itself share: uniform grids in two bytes, sparse outliers.

A grid of 2**bits levels has a step of whole sixths of an octave and a centre of whole sixteenths of its own
range, a byte each. Which of a few steps is best is tried: the ends of a range are worth less than they cost
where bits are few.
"""

from __future__ import annotations

import torch

from waterfill.runtime.cache.method import BLOCK

__all__ = [
    "bundled",
    "fit",
    "grouped",
    "outliers",
    "reals",
    "restored",
    "steps",
]

OCTAVE, UNIT = 6, 160  # steps are 2**((byte - UNIT) / OCTAVE): 2e-8 to 6e4
TRIED = range(1, -7, -1)  # sixths of an octave about the step that spans the range
HALF_MAX = 65504.0
GROUP = 64  # numbers of a head's consecutive values that share a grid, at least


def steps(codes: torch.Tensor) -> torch.Tensor:
    """float32 of bytes that say a step."""
    return torch.exp2((codes.float() - UNIT) / OCTAVE)


def step_codes(least: torch.Tensor) -> torch.Tensor:
    """Bytes, as float32, of the smallest steps that are at least so large."""
    return (torch.ceil(OCTAVE * torch.log2(least.clamp_min(1e-30))) + UNIT).clamp_(0, 255)


def fit(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A grid for each group of numbers, of least squared error among those tried, and its codes.

    Parameters
    ----------
    x : float32 (..., count), groups last
    bits : 1 to 8

    Returns
    -------
    codes : uint8 (..., count), 0 to 2**bits - 1
    step : uint8 (...)
    centre : int8 (...)
    """
    low, high = x.amin(-1), x.amax(-1)
    middle = (low + high) / 2
    unit = 2**bits / 16  # of a centre, in steps
    # A centre far out must be within reach.
    least = torch.maximum((high - low) / max(2**bits - 1, 2), middle.abs() / (127 * unit))
    spanning = step_codes(least)
    best: tuple[torch.Tensor, ...] | None = None
    for more in TRIED:
        step = (spanning + more).clamp_(0, 255)
        size = steps(step)
        centre = (middle / (size * unit)).round_().clamp_(-127, 127)
        codes = _codes(x, size, centre, bits)
        error = (_reals(codes, size, centre, bits) - x).square_().sum(-1)
        if best is None:
            best = error, step, centre
        else:
            better = error < best[0]
            best = tuple(
                torch.where(better, new, old)
                for new, old in zip((error, step, centre), best, strict=True)
            )
    assert best is not None
    _, step, centre = best
    codes = _codes(x, steps(step), centre, bits)
    return codes.to(torch.uint8), step.to(torch.uint8), centre.to(torch.int8)


def reals(codes: torch.Tensor, step: torch.Tensor, centre: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `fit`: float32 (..., count)."""
    return _reals(codes.float(), steps(step), centre.float(), bits)


def _codes(x: torch.Tensor, size: torch.Tensor, centre: torch.Tensor, bits: int) -> torch.Tensor:
    zero = centre * (2**bits / 16) - (2**bits - 1) / 2
    codes: torch.Tensor = x / size[..., None] - zero[..., None]
    return codes.round_().clamp_(0, 2**bits - 1)


def _reals(
    codes: torch.Tensor, size: torch.Tensor, centre: torch.Tensor, bits: int
) -> torch.Tensor:
    zero = centre * (2**bits / 16) - (2**bits - 1) / 2
    found: torch.Tensor = (codes + zero[..., None]) * size[..., None]
    return found


def bundled(x: torch.Tensor) -> torch.Tensor:
    """(..., rows, numbers) as (..., bundles, numbers): as many whole rows as have their places in a byte."""
    *before, rows, numbers = x.shape
    size = rows & -rows
    while size > 1 and size * numbers > 1 << 8:
        size //= 2
    return x.reshape(*before, rows // size, size * numbers)


def grouped(values: torch.Tensor) -> torch.Tensor:
    """(..., BLOCK, width) as (..., groups, numbers): whole tokens, few but for narrow values."""
    tokens = 1
    while tokens < BLOCK and tokens * values.shape[-1] < GROUP:
        tokens *= 2
    return values.reshape(*values.shape[:-2], BLOCK // tokens, tokens * values.shape[-1])


def outliers(x: torch.Tensor, score: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of highest score, of each group as many.

    Parameters
    ----------
    x, score : float32 (..., numbers)
    count : of numbers to take

    Returns
    -------
    index : uint8, int16 or int32 (..., count), the narrowest that holds every place
    numbers : float16 (..., count)
    """
    index = score.topk(count, -1).indices
    places = x.shape[-1]
    dtype = torch.uint8 if places <= 1 << 8 else torch.int16 if places <= 1 << 15 else torch.int32
    numbers = x.gather(-1, index).clamp_(-HALF_MAX, HALF_MAX).half()
    return index.to(dtype), numbers


def restored(x: torch.Tensor, index: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """With outliers put back where they were."""
    return x.scatter(-1, index.long(), numbers.to(x.dtype))
